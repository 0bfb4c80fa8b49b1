"""Loadings of genes on the components of their correlations, and the table that starts there."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import sparse

import epivi
from epivi._errors import ConfigError
from epivi.models.expresser.start import correlation_loadings


@pytest.fixture(scope="module")
def values() -> np.ndarray:
    """Two groups of four genes that vary together, and a gene of its own."""
    rng = np.random.default_rng(0)
    score = rng.normal(size=(300, 3))
    weight = np.zeros((3, 9))
    weight[0, :4], weight[1, 4:8], weight[2, 8] = 2.0, 1.0, 3.0
    return np.maximum(score @ weight + 0.3 * rng.normal(size=(300, 9)) + 1.0, 0.0)


def test_products_of_loadings_are_the_correlations(values: np.ndarray) -> None:
    loadings = correlation_loadings(sparse.csr_matrix(values), 8)
    _, s, vt = np.linalg.svd((values - values.mean(0)) / values.std(0), full_matrices=False)
    expected = (vt[:8].T * s[:8] ** 2) @ vt[:8] / len(values)
    np.testing.assert_allclose(loadings @ loadings.T, expected, atol=1e-8)
    assert np.all(np.diff(np.linalg.norm(loadings, axis=0)) <= 1e-9)


def test_scale_and_shift_of_a_gene_do_not_matter(values: np.ndarray) -> None:
    changed = values.copy()
    changed[:, 2] *= 7.0
    np.testing.assert_allclose(
        correlation_loadings(sparse.csr_matrix(values), 3),
        correlation_loadings(sparse.csr_matrix(changed), 3),
        atol=1e-7,
    )


def test_genes_that_a_data_set_lacks_stand_at_their_mean(values: np.ndarray) -> None:
    code = np.repeat([0, 1], 150)
    measured = np.ones((2, 9), dtype=bool)
    measured[1, [0, 4]] = False
    seen = np.where(measured[code], values, 0.0)
    z = np.zeros_like(values)
    for gene in range(9):
        rows = measured[code, gene]
        z[rows, gene] = (values[rows, gene] - values[rows, gene].mean()) / values[rows, gene].std()
    _, s, vt = np.linalg.svd(z, full_matrices=False)
    found = correlation_loadings(sparse.csr_matrix(seen), 2, measured=(measured, code))
    np.testing.assert_allclose(found @ found.T, (vt[:2].T * s[:2] ** 2) @ vt[:2] / 300, atol=1e-8)
    # taken as zeros, both genes follow the data set, and each other
    naive = correlation_loadings(sparse.csr_matrix(seen), 2)
    assert (naive @ naive.T)[0, 4] > (found @ found.T)[0, 4] + 0.1


def test_gene_without_variance_has_no_loading_and_few_cells_are_enough(values: np.ndarray) -> None:
    constant = values.copy()
    constant[:, 5] = 2.0
    loadings = correlation_loadings(sparse.csr_matrix(constant), 4)
    assert np.abs(loadings[5]).max() < 1e-12
    assert np.isfinite(loadings).all()
    assert correlation_loadings(sparse.csr_matrix(values[:3]), 8).shape == (9, 2)
    assert correlation_loadings(sparse.csr_matrix(np.ones((4, 3))), 2).tolist() == [[0.0, 0.0]] * 3


@pytest.mark.parametrize("gene_init", ["random", "correlation"])
def test_vectors_tell_the_modules_of_genes_from_the_first_step(gene_init: str) -> None:
    adata = epivi.simulate.gene_programs(300, seed=0)
    epivi.Expresser.setup_anndata(adata)
    model = epivi.Expresser(adata, size="test", gene_init=gene_init, seed=0)
    before = model.module.network.genes.table.weight.detach().clone()
    model.training_data(_config(), 1)
    after = model.module.network.genes.table.weight.detach()
    assert torch.equal(before[0], after[0])
    vectors = torch.nn.functional.normalize(after[1:], dim=1).numpy()
    module = adata.var["module"].to_numpy()
    same = module[:, None] == module[None]
    np.fill_diagonal(same, val=False)
    cosine = vectors @ vectors.T
    gap = cosine[same].mean() - cosine[(module[:, None] != module[None])].mean()
    if gene_init == "random":
        assert torch.equal(before, after)
        assert abs(gap) < 0.05
    else:
        assert gap > 0.15


def test_training_goes_on_from_trained_vectors_not_from_loadings() -> None:
    adata = epivi.simulate.gene_programs(120, seed=0)
    epivi.Expresser.setup_anndata(adata)
    model = epivi.Expresser(adata, size="test", gene_init="correlation", seed=0)
    model.train(max_epochs=1, enable_progress_bar=False)
    trained = model.module.network.genes.table.weight.detach().clone()
    model.training_data(_config(), 1)
    assert torch.equal(trained, model.module.network.genes.table.weight)


def test_unknown_start_is_refused() -> None:
    adata = epivi.simulate.gene_programs(60, seed=0)
    epivi.Expresser.setup_anndata(adata)
    with pytest.raises(ConfigError, match="gene_init"):
        epivi.Expresser(adata, size="test", gene_init="pca")


def _config() -> object:
    from epivi.train.config import TrainingConfig

    return TrainingConfig(max_epochs=1, seed=0)
