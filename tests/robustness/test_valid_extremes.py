"""Unusual data that are valid: they train, and where only their storage differs the latents are bitwise the same."""

from __future__ import annotations

import anndata as ad
import mudata as md
import numpy as np
import pytest
from scipy import sparse

import epivi

# scvi-tools warns of batches with few cells, as it should
pytestmark = pytest.mark.filterwarnings("ignore:Category . in adata.obs:UserWarning")

SMALL = {"n_latent": 2, "n_hidden": (4, 3), "seed": 1}


def with_stored_zeros(matrix):
    stored = matrix.copy()
    stored.data[::3] = 0
    kept = matrix.copy()
    kept.data[::3] = 0
    kept.eliminate_zeros()
    return stored, kept


def unsorted(matrix):
    shuffled = matrix.copy()
    for row in range(matrix.shape[0]):
        part = slice(*matrix.indptr[row : row + 2])
        shuffled.indices[part] = shuffled.indices[part][::-1]
        shuffled.data[part] = shuffled.data[part][::-1]
    shuffled.has_sorted_indices = False
    return shuffled


FORMS = {
    "csr array": sparse.csr_array,
    "csc": sparse.csc_matrix,
    "csc array": sparse.csc_array,
    "dense": lambda x: x.toarray(),
    "dense by columns": lambda x: np.asfortranarray(x.toarray()),
    "int8": lambda x: x.astype(np.int8),
    "uint16": lambda x: x.astype(np.uint16),
    "int64 dense": lambda x: x.toarray().astype(np.int64),
    "bool": lambda x: x.astype(bool),
    "bool dense": lambda x: x.toarray().astype(bool),
    "float16 dense": lambda x: x.toarray().astype(np.float16),
    "float64": lambda x: x.astype(np.float64),
    "unsorted": unsorted,
}


@pytest.fixture(scope="module")
def latent_of(quiet):
    """Set up, train one epoch, embed."""

    def run(data, **setup):
        if hasattr(data, "mod"):
            epivi.SAILERX.setup_mudata(data, batch_key="batch")
            model = epivi.SAILERX(data, **SMALL)
        else:
            epivi.SAILER.setup_anndata(data, **({"batch_key": "batch"} | setup))
            model = epivi.SAILER(data, **SMALL)
        model.train(max_epochs=1, batch_size=16, plan_kwargs={"n_epochs_kl_cycle": 0}, **quiet)
        latent = model.get_latent_representation()
        assert latent.shape == (data.n_obs, 2)
        assert np.isfinite(latent).all()
        return latent

    return run


@pytest.fixture(scope="module")
def expected(latent_of, make_peaks, make_multiome):
    return {"sailer": latent_of(make_peaks()), "sailerx": latent_of(make_multiome())}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("model", ["sailer", "sailerx"])
def test_the_storage_changes_nothing(form, model, make_peaks, make_multiome, latent_of, expected):
    data = make_peaks() if model == "sailer" else make_multiome()
    atac = data if model == "sailer" else data.mod["atac"]
    atac.X = FORMS[form](atac.X)
    assert np.array_equal(latent_of(data), expected[model])


def test_stored_zeros_are_closed_peaks(make_peaks, latent_of):
    first, second = make_peaks(), make_peaks()
    first.X, second.X = with_stored_zeros(first.X)
    assert first.X.nnz > second.X.nnz
    assert np.array_equal(latent_of(first), latent_of(second))


@pytest.mark.parametrize("form", ["csr", "csc", "dense"])
def test_data_on_disk(form, make_peaks, latent_of, expected, tmp_path):
    adata = make_peaks()
    adata.X = {"csr": sparse.csr_matrix, "csc": sparse.csc_matrix, "dense": lambda x: x.toarray()}[form](adata.X)
    adata.write_h5ad(tmp_path / "cells.h5ad")
    backed = ad.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    before = (tmp_path / "cells.h5ad").read_bytes()
    assert backed.isbacked
    assert np.array_equal(latent_of(backed), expected["sailer"])
    backed.file.close()
    assert (tmp_path / "cells.h5ad").read_bytes() == before


def test_a_multiome_on_disk(make_multiome, latent_of, expected, tmp_path):
    make_multiome().write(tmp_path / "cells.h5mu")
    backed = md.read_h5mu(tmp_path / "cells.h5mu", backed="r")
    assert np.array_equal(latent_of(backed), expected["sailerx"])
    backed.file.close()


def test_a_cell_without_open_peaks(make_peaks, make_multiome, latent_of):
    for data in (make_peaks(), make_multiome()):
        atac = data.mod["atac"] if hasattr(data, "mod") else data
        counts = atac.X.toarray()
        counts[3] = 0
        atac.X = sparse.csr_matrix(counts)
        latent_of(data)


@pytest.mark.parametrize("change", ["one batch", "no batch", "one peak", "two cells", "unused category", "numbers"])
def test_small_and_uniform_data(change, make_peaks, latent_of):
    adata = make_peaks()
    setup = {}
    if change == "one batch":
        adata.obs["batch"] = "only"
    elif change == "no batch":
        setup = {"batch_key": None}
    elif change == "one peak":
        adata = adata[:, 5:6].copy()
    elif change == "two cells":
        with pytest.raises(epivi._errors.ConfigError, match="at least 2 are needed"):
            epivi.SAILER(make_peaks(2)).train(max_epochs=1, train_size=0.5)
        adata = make_peaks(3)
    elif change == "unused category":
        adata.obs["batch"] = adata.obs["batch"].astype("category").cat.add_categories(["b9"])
    else:
        adata.obs["batch"] = (adata.obs["batch"] == "b1").astype(int)
    latent_of(adata, **setup)


def test_a_batch_unseen_in_training_is_mapped(make_peaks, quiet):
    adata, query = make_peaks(), make_peaks(seed=9)
    epivi.SAILER.setup_anndata(adata, batch_key="batch")
    reference = epivi.SAILER(adata, **SMALL)
    reference.train(max_epochs=2, **quiet)
    query.obs["batch"] = "b9"
    mapped = epivi.SAILER.load_query_data(query, reference)
    before = mapped.get_latent_representation()
    mapped.train(max_epochs=2, plan_kwargs={"n_epochs_kl_cycle": 0}, **quiet)
    assert np.array_equal(mapped.get_latent_representation(), before)
    latent = mapped.get_latent_representation(adata.copy())
    assert np.array_equal(latent, reference.get_latent_representation())


@pytest.mark.parametrize("rna", ["none", "empty", "all missing"])
def test_a_query_without_rna(rna, make_multiome, quiet):
    mdata, query = make_multiome(), make_multiome(seed=9)
    epivi.SAILERX.setup_mudata(mdata, batch_key="batch")
    reference = epivi.SAILERX(mdata, **SMALL)
    reference.train(max_epochs=2, **quiet)
    parts = {"atac": query.mod["atac"]}
    if rna == "empty":
        parts["rna"] = query.mod["rna"][:0].copy()
    elif rna == "all missing":
        parts["rna"] = query.mod["rna"]
        parts["rna"].obsm["X_pca"][:] = np.nan
    query = md.MuData(parts)
    query.obs["batch"] = "b9"
    mapped = epivi.SAILERX.load_query_data(query, reference)
    mapped.train(max_epochs=1, plan_kwargs={"n_epochs_kl_cycle": 0}, **quiet)
    assert (mapped.get_alignment_weights() == 0).all()
    assert np.isfinite(mapped.get_latent_representation()).all()


def test_two_multiome_cells_are_enough(make_multiome, latent_of):
    latent_of(make_multiome(n_rna=2))
