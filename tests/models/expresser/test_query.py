"""New data and new genes for a trained model."""

import anndata as ad
import numpy as np
import pytest
import torch
from scipy import sparse

import epivi
from epivi._errors import ConfigError, DataError

QUIET = {"enable_progress_bar": False, "accelerator": "cpu", "logger": False, "batch_size": 16}


@pytest.fixture
def query(build):
    """Cells with 50 of the model's 60 genes and 8 new ones, of which new0 is a copy of g20."""
    data = build(n_cells=30, seed=9)
    x = data.X.toarray()
    new = np.random.default_rng(0).poisson(1.0, (30, 8))
    new[:, 0] = x[:, 20]
    adata = ad.AnnData(sparse.csr_matrix(np.hstack([x[:, 10:], new]).astype(np.float32)), obs=data.obs)
    adata.var_names = [*data.var_names[10:], *(f"new{i}" for i in range(8))]
    return adata


def test_projection_keeps_the_model_and_training_goes_on(trained, query) -> None:
    before = trained.get_gene_embeddings()
    model = epivi.Expresser.load_query_data(query, trained)
    assert np.array_equal(model.get_latent_representation(), trained.get_latent_representation(query))
    model.train(1, **QUIET)
    assert not model.get_gene_embeddings().equals(before)
    assert trained.get_gene_embeddings().equals(before)


def test_a_folder_is_a_reference_too(trained, query, tmp_path) -> None:
    trained.save(tmp_path / "model")
    model = epivi.Expresser.load_query_data(query, tmp_path / "model")
    assert len(model.feature_names) == 60


def test_frozen_genes_keep_their_vectors_bit_for_bit(trained, query, tmp_path) -> None:
    model = epivi.Expresser.load_query_data(query, trained, new_genes="extend", freeze=True)
    assert list(model.feature_names[60:]) == [f"new{i}" for i in range(8)]
    start = model.get_gene_embeddings()
    others = {name: p.clone() for name, p in model.module.named_parameters() if "genes.table" not in name}
    model.train(2, lr=1e-2, **QUIET)
    after = model.get_gene_embeddings()
    assert after[:60].equals(trained.get_gene_embeddings())
    assert (after[60:].to_numpy() != start[60:].to_numpy()).any(axis=1).all()
    assert all(torch.equal(p, others[name]) for name, p in model.module.named_parameters() if name in others)
    model.save(tmp_path / "extended")
    again = epivi.Expresser.load(tmp_path / "extended", query, accelerator="cpu")
    again.train(1, lr=1e-2, **QUIET)
    assert again.get_gene_embeddings()[:60].equals(trained.get_gene_embeddings())


def test_new_genes_start_near_their_correlates(trained, query) -> None:
    model = epivi.Expresser.load_query_data(query, trained, new_genes="extend")
    values = query.X.toarray()
    values = np.log1p(1e4 * values / values.sum(1, keepdims=True))
    cosine = (values[:, 50] @ values[:, :50]) / np.maximum(np.linalg.norm(values[:, :50], axis=0), 1e-12)
    best = query.var_names[np.argsort(-cosine, kind="stable")[:10]]
    assert best[0] == "g20"
    expected = trained.get_gene_embeddings().loc[best].mean()
    assert np.allclose(model.get_gene_embeddings().loc["new0"], expected, atol=1e-6)


def test_what_cannot_be_mapped_is_refused(trained, query, build) -> None:
    load = epivi.Expresser.load_query_data
    with pytest.raises(ConfigError, match="freeze=True trains the vectors of new genes"):
        load(query, trained, freeze=True)
    with pytest.raises(ConfigError, match="new_genes='add'"):
        load(query, trained, new_genes="add")
    with pytest.raises(ConfigError, match="must be a Expresser"):
        load(query, object())
    with pytest.raises(ConfigError, match="no gene that the model does not know"):
        load(build(seed=4), trained, new_genes="extend")
    query.var_names = [f"other{i}" for i in range(58)]
    with pytest.raises(DataError, match="of the counts"):
        load(query, trained)
