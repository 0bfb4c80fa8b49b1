"""Imputation: observed entries stay, hidden ones are not read, chunks and order do not matter."""

import anndata as ad
import numpy as np
import pytest
from scipy import sparse
from scipy.stats import norm

from epivi._errors import ConfigError, DataError
from epivi.models.expresser.outputs import imputation


def lognorm(x, total=None):
    return np.log1p(1e4 * x / (x.sum(1, keepdims=True) if total is None else total))


@pytest.fixture
def mask(trained):
    rng = np.random.default_rng(5)
    return (trained.adata.X.toarray() > 0) & (rng.random((40, 60)) < 0.2)


@pytest.mark.parametrize("mode", ["dropped", "all"])
def test_observed_entries_are_unchanged(trained, mask, mode) -> None:
    x = trained.adata.X.toarray()
    seen = np.where(mask, 0, x)
    got = trained.impute(mask=mask, mode=mode)
    counts = trained.impute(mask=mask, mode=mode, scale="counts")
    at = seen > 0
    assert np.array_equal(counts.X.toarray()[at], x[at])
    assert np.allclose(got.X.toarray()[at], lognorm(seen)[at], atol=1e-6)
    assert list(got.obs_names) == list(trained.adata.obs_names)
    assert list(got.var_names) == list(trained.feature_names)


@pytest.mark.parametrize("mode", ["dropped", "all"])
def test_masked_counts_are_not_read(trained, mask, mode) -> None:
    changed = trained.adata.X.toarray()
    changed[mask] = 77
    other = ad.AnnData(sparse.csr_matrix(changed), obs=trained.adata.obs[["batch"]], var=trained.adata.var)
    zeroed = ad.AnnData(
        sparse.csr_matrix(np.where(mask, 0, changed)), obs=trained.adata.obs[["batch"]], var=trained.adata.var
    )
    expected = trained.impute(mask=mask, mode=mode).X.toarray()
    assert np.array_equal(trained.impute(other, mask=sparse.csr_matrix(mask), mode=mode).X.toarray(), expected)
    assert np.array_equal(trained.impute(zeroed, mask=mask, mode=mode).X.toarray(), expected)


def test_dropped_entries_alone_are_predicted_and_all_are_in_the_other_mode(trained, mask) -> None:
    x = trained.adata.X.toarray()
    assert trained.impute(mask=mask).X.nnz == (x > 0).sum()
    assert trained.impute(mode="all").X.nnz == x.size


def test_scales_agree(trained, mask) -> None:
    x = trained.adata.X.toarray()
    total = np.where(mask, 0, x).sum(1, keepdims=True)
    counts = trained.impute(mask=mask, scale="counts").X.toarray()
    assert np.allclose(lognorm(counts, total), trained.impute(mask=mask).X.toarray(), atol=1e-4)


@pytest.mark.parametrize("mode", ["dropped", "all"])
def test_chunks_order_and_choice_of_genes_do_not_matter(trained, mask, mode, monkeypatch) -> None:
    whole = trained.impute(mask=mask, mode=mode).X.toarray()
    rows, genes = np.array([30, 2, 11]), ["g40", "g3", "g17"]
    columns = [40, 3, 17]
    asked = []
    ask = trained.module.ask
    monkeypatch.setattr(trained.module, "ask", lambda **inputs: asked.append(inputs["asked"].shape) or ask(**inputs))
    # room for one gene of two cells
    monkeypatch.setattr(imputation, "NUMBERS_AT_ONCE", 500)
    part = trained.impute(indices=rows, batch_size=2, genes=genes, mask=mask, mode=mode)
    assert np.allclose(part.X.toarray(), whole[np.ix_(rows, columns)], atol=1e-5)
    assert list(part.var_names) == genes
    # never cells x genes x width: what is held at once stays under the limit
    assert all(u == 1 for _, u in asked)
    assert bool(asked) == (mode == "all")


def test_cells_without_observed_genes_are_nan(trained) -> None:
    x = trained.adata.X.toarray()
    mask = np.zeros_like(x, dtype=bool)
    mask[4] = x[4] > 0
    got = trained.impute(mask=mask).X.toarray()
    assert np.isnan(got[4][mask[4]]).all()
    assert np.isfinite(np.delete(got, 4, axis=0)).all()
    assert np.isnan(trained.impute(indices=[4], mask=mask, mode="all").X.toarray()).all()


def test_normalised_expression_predicts_each_expressed_gene_from_others(trained) -> None:
    x = trained.adata.X.toarray()
    got = trained.get_normalized_expression(gene_list=["g1", "g0"])
    assert got.X.nnz == (x[:, [1, 0]] > 0).sum()
    whole = trained.get_normalized_expression().X.toarray()
    assert np.allclose(got.X.toarray(), whole[:, [1, 0]], atol=1e-5)
    # each fold as impute predicts it when the fold is the mask, on the scale of the whole cell
    reading = trained._read(indices=[6])
    for _, cells in reading.batches:
        fold_o = reading.encoding.folds(cells)
        mask = np.zeros(x.shape, dtype=bool)
        mask[6, cells.token_o[fold_o == 2] - 1] = True
    counts = trained.impute(indices=[6], mask=mask, scale="counts").X.toarray()[0]
    assert np.allclose(lognorm(counts, x[6].sum())[mask[6]], whole[6][mask[6]], atol=1e-4)


def test_normalised_expression_does_not_read_the_gene_itself(trained) -> None:
    x = trained.adata.X.toarray()
    gene = int(np.flatnonzero(x[6])[2])
    changed = x.copy()
    changed[6, gene] += 100
    other = ad.AnnData(sparse.csr_matrix(changed), obs=trained.adata.obs[["batch"]], var=trained.adata.var)
    one = trained.get_normalized_expression(indices=[6], scale="counts").X.toarray()[0]
    two = trained.get_normalized_expression(other, indices=[6], scale="counts").X.toarray()[0]
    assert one[gene] == two[gene]


def test_intervals_and_probabilities(full) -> None:
    x = full.adata.X.toarray()
    narrow, wide = (full.impute(mode="all", interval=p) for p in (0.5, 0.9))
    mean, unseen = narrow.X.toarray(), x == 0
    probability = narrow.layers["probability"].toarray()
    upper = {p: r.layers["upper"].toarray() for p, r in ((0.5, narrow), (0.9, wide))}
    value = mean[unseen] / probability[unseen]
    ratio = (upper[0.9][unseen] - value) / (upper[0.5][unseen] - value)
    assert np.allclose(ratio, norm.ppf(0.95) / norm.ppf(0.75), rtol=1e-2)
    assert ((probability[unseen] > 0) & (probability[unseen] < 1)).all()
    assert (narrow.layers["lower"].toarray()[unseen] >= 0).all()
    assert np.array_equal(upper[0.9][~unseen], mean[~unseen])


def test_probabilities_follow_how_often_genes_are_expressed(build, make, fit) -> None:
    data = build(n_cells=120, n_genes=40, seed=3)
    model = fit(make(data, detection=True, n_layers=1), max_epochs=8, lr=1e-2)
    x = data.X.toarray() > 0
    probability = model.impute(mode="all").layers["probability"].toarray()
    mean = np.array([probability[~x[:, g], g].mean() if (~x[:, g]).any() else np.nan for g in range(40)])
    known = np.isfinite(mean)
    assert np.corrcoef(mean[known], x.mean(0)[known])[0, 1] > 0.8
    assert np.nanmean(mean) == pytest.approx(x.mean(), abs=0.15)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "mode='dropped' needs mask="),
        ({"mode": "zeros"}, "mode='zeros'"),
        ({"mode": "all", "scale": "log"}, "scale='log'"),
        ({"mode": "all", "interval": 0.9}, "needs a model with likelihood='gaussian'"),
        ({"mode": "all", "interval": 1.5}, "interval=1.5"),
    ],
)
def test_what_cannot_be_told_is_refused(trained, arguments, words) -> None:
    with pytest.raises(ConfigError, match=words):
        trained.impute(**arguments)


def test_a_mask_of_another_shape_is_refused(trained) -> None:
    with pytest.raises(DataError, match=r"mask has the shape \(3, 3\), the data \(40, 60\)"):
        trained.impute(mask=np.ones((3, 3), dtype=bool))


def test_counts_need_a_model_of_counts(build, make) -> None:
    data = build()
    x = data.X.toarray() + 1e-3
    data.X = sparse.csr_matrix(np.log1p(1e4 * x / x.sum(1, keepdims=True)))
    model = make(data, {"input_kind": "lognorm"})
    with pytest.raises(ConfigError, match="scale='counts' needs a model of counts"):
        model.impute(mode="all", scale="counts")
