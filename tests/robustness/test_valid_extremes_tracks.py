"""Unusual tracks that are valid: they train, and where only their storage differs the latents are bitwise the same."""

from __future__ import annotations

import anndata as ad
import mudata as md
import numpy as np
import pytest
from scipy import sparse

import epivi

# scvi-tools warns of batches with few cells, as it should
pytestmark = pytest.mark.filterwarnings("ignore:Category . in adata.obs:UserWarning")

MODELS = ["ConvNetVAE", "FCVAE"]
SMALL = {"n_latent": 2, "n_hidden": 4, "seed": 1}
CONV = {"kernel_size": 5, "stride": 3, "n_filters": (3,)}


def dense(dtype, order="C"):
    return lambda x: np.asarray(x.toarray().reshape(x.shape[0], 3, -1), dtype=dtype, order=order)


def unsorted(matrix):
    shuffled = matrix.copy()
    for row in range(matrix.shape[0]):
        part = slice(*matrix.indptr[row : row + 2])
        shuffled.indices[part] = shuffled.indices[part][::-1]
        shuffled.data[part] = shuffled.data[part][::-1]
    shuffled.has_sorted_indices = False
    return shuffled


def with_stored_zeros(matrix):
    full = sparse.csr_matrix(np.ones(matrix.shape))
    full.data[:] = matrix.toarray().ravel()
    return full


FORMS = {
    "csr array": sparse.csr_array,
    "int8": lambda x: x.astype(np.int8),
    "uint16": lambda x: x.astype(np.uint16),
    "float64": lambda x: x.astype(np.float64),
    "long indices": lambda x: sparse.csr_matrix(
        (x.data, x.indices.astype(np.int64), x.indptr.astype(np.int64)), x.shape
    ),
    "unsorted": unsorted,
    "stored zeros": with_stored_zeros,
    "dense uint8": dense(np.uint8),
    "dense int64": dense(np.int64),
    "dense float16": dense(np.float16),
    "dense by columns": dense(np.float32, "F"),
}
MODALITY_FORMS = {
    "csc": sparse.csc_matrix,
    "csr array": sparse.csr_array,
    "dense": lambda x: x.toarray(),
    "int8": lambda x: x.astype(np.int8),
}


@pytest.fixture(scope="module")
def latent_of(quiet):
    """Set up, train one epoch, embed."""

    def run(model, data, *, options=None, **setup):
        cls = getattr(epivi, model)
        setup = {"batch_key": "batch"} | setup
        (cls.setup_mudata if isinstance(data, md.MuData) else cls.setup_anndata)(data, **setup)
        trained = cls(data, **(SMALL | (CONV if model == "ConvNetVAE" else {}) | (options or {})))
        trained.train(max_epochs=1, batch_size=16, **quiet)
        latent = trained.get_latent_representation()
        assert latent.shape == (data.n_obs, 2)
        assert np.isfinite(latent).all()
        assert np.isfinite(trained.get_normalized_expression(return_numpy=True)).all()
        assert np.isfinite(trained.get_elbo())
        return latent

    return run


@pytest.fixture(scope="module")
def expected(latent_of, make_tracks):
    return {model: latent_of(model, make_tracks()) for model in MODELS}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("model", MODELS)
def test_the_storage_changes_nothing(form, model, make_tracks, latent_of, expected):
    adata = make_tracks()
    adata.obsm["tracks"] = FORMS[form](adata.obsm["tracks"])
    assert np.array_equal(latent_of(model, adata), expected[model])


@pytest.mark.parametrize("form", MODALITY_FORMS)
@pytest.mark.parametrize("model", MODELS)
def test_the_storage_of_modalities_changes_nothing(form, model, make_tracks_mudata, latent_of, expected):
    mdata = make_tracks_mudata()
    mdata.mod["atac"].X = MODALITY_FORMS[form](mdata.mod["atac"].X)
    assert np.array_equal(latent_of(model, mdata), expected[model])


@pytest.mark.parametrize("model", MODELS)
def test_files_that_were_written_and_read_are_the_same(
    model, make_tracks, make_tracks_mudata, latent_of, expected, tmp_path
):
    make_tracks().write_h5ad(tmp_path / "cells.h5ad")
    assert np.array_equal(latent_of(model, ad.read_h5ad(tmp_path / "cells.h5ad")), expected[model])
    make_tracks_mudata().write(tmp_path / "cells.h5mu")
    backed = md.read_h5mu(tmp_path / "cells.h5mu", backed="r")
    assert np.array_equal(latent_of(model, backed), expected[model])
    backed.file.close()


def one_bin(adata):
    adata.obsm["tracks"] = adata.obsm["tracks"].toarray().reshape(40, 3, -1)[:, :, :1]
    adata.uns["tracks"] = adata.uns["tracks"] | {"bins": adata.uns["tracks"]["bins"][:1]}


def one_channel(adata):
    adata.obsm["tracks"] = adata.obsm["tracks"][:, 48:96].tocsr()
    adata.uns["tracks"] = adata.uns["tracks"] | {"channels": ["atac"]}


def one_bin_a_chromosome(adata):
    table = adata.uns["tracks"]["bins"].assign(chrom=[f"chr{i}" for i in range(48)], start=0, end=100)
    adata.uns["tracks"] = adata.uns["tracks"] | {"bins": table}


def empty_cell(adata):
    counts = adata.obsm["tracks"].toarray()
    counts[3] = 0
    adata.obsm["tracks"] = sparse.csr_matrix(counts)


def empty_channel(adata):
    counts = adata.obsm["tracks"].toarray()
    counts[:, 48:96] = 0
    adata.obsm["tracks"] = sparse.csr_matrix(counts)


def large_counts(adata):
    counts = adata.obsm["tracks"].toarray()
    counts[3, 5] = 1e6
    adata.obsm["tracks"] = sparse.csr_matrix(counts)


def hardly_measured(adata):
    """Channel 0 in one cell alone; every other cell has one of the other two."""
    measured = np.zeros((40, 3), dtype=bool)
    measured[0] = True
    measured[1:, 1] = np.arange(39) % 2 == 0
    measured[1:, 2] = ~measured[1:, 1]
    adata.obsm["tracks_mask"] = measured


CHANGES = {
    "one bin": one_bin,
    "one channel": one_channel,
    "one bin a chromosome": one_bin_a_chromosome,
    "empty cell": empty_cell,
    "empty channel": empty_channel,
    "large counts": large_counts,
    "hardly measured": hardly_measured,
    "one batch": lambda adata: adata.obs.__setitem__("batch", "only"),
    "numbers as batches": lambda adata: adata.obs.__setitem__("batch", np.arange(40) % 2),
}


@pytest.mark.parametrize("likelihood", ["poisson", "nb"])
@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("model", MODELS)
def test_small_and_uniform_tracks(model, name, likelihood, make_tracks, latent_of):
    adata = make_tracks()
    CHANGES[name](adata)
    latent_of(model, adata, options={"likelihood": likelihood})


@pytest.mark.parametrize("model", MODELS)
def test_three_cells_are_enough(model, make_tracks, latent_of):
    with pytest.raises(epivi._errors.ConfigError, match="at least 2 are needed"):
        getattr(epivi, model)(make_tracks(2)).train(max_epochs=1, train_size=0.5)
    latent_of(model, make_tracks(3))


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 200, "stride": 200},
        {"kernel_size": 1, "stride": 1},
        {"kernel_size": 11, "stride": 3, "n_layers": 3, "n_filters": (2, 3, 4)},
        {"boundaries": "none"},
        {"mask_channels": True},
    ],
)
def test_kernels_of_any_size(options, make_tracks, latent_of):
    latent_of("ConvNetVAE", make_tracks(), options=options)


@pytest.mark.parametrize("model", MODELS)
def test_a_batch_unseen_in_training_is_mapped(model, make_tracks, quiet):
    cls, adata, query = getattr(epivi, model), make_tracks(), make_tracks(seed=9)
    cls.setup_anndata(adata, batch_key="batch")
    reference = cls(adata, **SMALL)
    reference.train(max_epochs=2, **quiet)
    query.obs["batch"] = "b9"
    mapped = cls.load_query_data(query, reference)
    mapped.train(max_epochs=2, **quiet)
    latent = mapped.get_latent_representation(adata.copy())
    assert np.array_equal(latent, reference.get_latent_representation())
