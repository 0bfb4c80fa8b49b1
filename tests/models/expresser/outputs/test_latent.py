"""Vectors of cells: what they depend on and what not."""

import anndata as ad
import numpy as np
import pytest
from scipy import sparse

from epivi._errors import ConfigError


@pytest.mark.parametrize("pool", ["mean", "expression", "decoder"])
def test_neither_order_nor_batch_size_matters(trained, pool) -> None:
    whole = trained.get_latent_representation(pool=pool)
    rows = np.random.default_rng(0).permutation(40)[:13]
    assert np.allclose(trained.get_latent_representation(indices=rows, batch_size=3, pool=pool), whole[rows], atol=1e-5)


def test_the_mean_does_not_depend_on_values_and_the_others_do(trained) -> None:
    data = trained.adata
    other = ad.AnnData(data.X.copy(), obs=data.obs[["batch"]], var=data.var)
    other.X.data = np.random.default_rng(0).integers(1, 9, other.X.nnz).astype(np.float32)
    one = {pool: trained.get_latent_representation(pool=pool) for pool in ("mean", "expression", "decoder")}
    two = {pool: trained.get_latent_representation(other, pool=pool) for pool in one}
    assert np.array_equal(one["mean"], two["mean"])
    assert not np.allclose(one["expression"], two["expression"], atol=1e-4)
    assert not np.allclose(one["decoder"], two["decoder"], atol=1e-6)


def test_pools_are_the_means_that_they_are_called(trained) -> None:
    context = {}
    for positions, cells in trained._read(indices=[7]).batches:
        encoded = trained._encoding(trained.adata).encoded(cells, np.zeros(cells.token_o.size, dtype=bool))
        context = trained._context(encoded)[0].detach().numpy()
        values = encoded["value"][0].numpy()
        assert positions.tolist() == [0]
    assert np.allclose(trained.get_latent_representation(indices=[7])[0], context.mean(0), atol=1e-5)
    weighted = trained.get_latent_representation(indices=[7], pool="expression")[0]
    assert np.allclose(weighted, (context * values[:, None]).sum(0) / values.sum(), atol=1e-5)


def test_cells_with_too_few_genes_are_nan_and_change_no_other(trained, caplog) -> None:
    data = trained.adata
    x = data.X.toarray()
    x[3] = 0
    x[8] = 0
    x[8, 5] = 4
    other = ad.AnnData(sparse.csr_matrix(x), obs=data.obs[["batch"]], var=data.var)
    rest = np.setdiff1d(np.arange(40), [3, 8])
    for pool, lost in (("mean", [3]), ("expression", [3]), ("decoder", [3, 8])):
        got = trained.get_latent_representation(other, pool=pool)
        assert np.flatnonzero(np.isnan(got).any(1)).tolist() == lost
        assert np.allclose(got[rest], trained.get_latent_representation(pool=pool)[rest], atol=1e-5)
    assert "2 of 40 cells have too few expressed genes" in caplog.text


def test_an_unknown_pool_is_refused(trained) -> None:
    with pytest.raises(ConfigError, match="pool='max'"):
        trained.get_latent_representation(pool="max")


def test_the_ablation_has_all_pools(build, make, fit) -> None:
    model = fit(make(build(), decoder="encoder"), max_epochs=1)
    for pool in ("mean", "expression", "decoder"):
        assert np.isfinite(model.get_latent_representation(pool=pool)).all()
