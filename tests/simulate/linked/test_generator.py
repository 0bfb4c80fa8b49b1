from __future__ import annotations

import mudata
import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from scipy.special import expit
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import adjusted_rand_score, roc_auc_score

from epivi._errors import ConfigError
from epivi.simulate import linked_multiome


@pytest.fixture(scope="module")
def default():
    return linked_multiome()


def small(n_cells=120, **changes):
    return linked_multiome(n_cells, **{"n_types": 3, "n_peaks": 60, "n_genes": 20, **changes})


def truth(mdata, *keys):
    return [mdata.uns["simulation"][key] for key in keys]


def codes(mdata, key):
    return mdata.obs[key].cat.codes.to_numpy()


def test_output_has_the_documented_form(default):
    assert list(default.mod) == ["atac", "rna"]
    atac, rna = default["atac"], default["rna"]
    for modality, shape in ((atac, (1000, 500)), (rna, (1000, 200))):
        assert modality.shape == shape
        assert type(modality.X) is sparse.csr_matrix
        assert modality.X.dtype == np.int32
    assert set(atac.X.data) == {1}
    assert list(atac.var) == ["chrom", "start", "end", "kind"]
    assert list(rna.var) == ["chrom", "start", "end", "strand"]
    assert list(default.obs) == ["cell_type", "batch"]
    for obs in (default.obs, atac.obs, rna.obs):
        assert obs["cell_type"].value_counts(sort=False).to_dict() == {f"type_{t}": 125 for t in range(8)}
        assert obs["batch"].cat.categories.tolist() == ["batch_0"]
    pd.testing.assert_series_equal(atac.obs["cell_type"], rna.obs["cell_type"])
    assert not atac.obs["thinned"].any()
    record = default.uns["simulation"]
    assert record["simulator"] == "linked_multiome"
    assert record["n_genes"] == 200
    assert record["cells"].tolist() == default.obs_names.tolist()
    assert record["open_probability"].dtype == record["rate"].dtype == record["state"].dtype == np.float32


def test_truth_follows_from_the_states_by_the_formula():
    mdata = small(n_programs=4)
    probability, rate, state, links = truth(mdata, "open_probability", "rate", "state", "links")
    atac_depth, rna_depth, seen = truth(mdata, "atac_depth", "rna_depth", "type_state")
    # a rate over depth and activity is the constant of its gene, an intensity over depth one of its peak
    level_ng = rate / rna_depth[:, None] / (0.005 + expit(6 * (state.astype(float) - 0.5)))
    np.testing.assert_allclose(level_ng, np.broadcast_to(level_ng[0], level_ng.shape), rtol=1e-4)
    intensity = -np.log1p(-probability.astype(float)) / atac_depth[:, None]
    kind = mdata["atac"].var["kind"].to_numpy()
    background = intensity[:, kind == "background"]
    np.testing.assert_allclose(background, np.broadcast_to(background[0], background.shape), rtol=1e-3)
    types = codes(mdata, "cell_type")
    for rank in range(3):
        own = intensity[types == rank][:, kind == "type"]
        np.testing.assert_allclose(own, np.broadcast_to(own[0], own.shape), rtol=1e-3, atol=1e-5)
    # 1 / intensity = 1 / c + exp(-6 (s - 0.4)) exp(-b) / c: a line whose intercept is the same for all linked peaks
    intercepts = []
    for peak, genes in links.groupby("peak_index")["gene_index"]:
        factor = np.exp(-6 * (state[:, genes].astype(float).sum(axis=1) / np.sqrt(len(genes)) - 0.4))
        usable = intensity[:, peak] > 1e-3  # less is lost in float32
        y, lines = 1 / intensity[usable, peak], np.column_stack([np.ones(usable.sum()), factor[usable]])
        fit = np.linalg.lstsq(lines / y[:, None], np.ones(len(y)), rcond=None)[0]
        np.testing.assert_allclose(lines @ fit, y, rtol=2e-3)
        intercepts.append(fit[0])
    assert len(intercepts) == 54
    np.testing.assert_allclose(intercepts, np.median(intercepts), rtol=5e-3)
    assert seen.shape == (3, 20)


def test_moments_agree_with_the_settings(default):
    probability, rate, atac_depth, rna_depth = truth(default, "open_probability", "rate", "atac_depth", "rna_depth")
    x, y = default["atac"].X.toarray(), default["rna"].X.toarray()
    assert probability.mean() == pytest.approx(0.35, abs=1e-3)
    assert rate.mean(dtype=float) == pytest.approx(3.0, rel=1e-5)
    z_p = (x.sum(axis=0) - probability.sum(axis=0)) / np.sqrt((probability * (1 - probability)).sum(axis=0))
    z_g = (y.sum(axis=0) - rate.sum(axis=0)) / np.sqrt(rate.sum(axis=0))
    for z in (z_p, z_g):
        assert abs(z.mean()) < 0.25
        assert z.std() == pytest.approx(1.0, abs=0.2)
    pearson = (y - rate) / np.sqrt(rate)
    assert pearson.var() == pytest.approx(1.0, abs=0.03)
    for depth in (atac_depth, rna_depth):
        assert depth.mean() == pytest.approx(1.0, abs=0.04)
        assert np.log(depth).std() == pytest.approx(0.3, abs=0.03)
    assert np.corrcoef(np.log(atac_depth), np.log(rna_depth))[0, 1] == pytest.approx(0.5, abs=0.08)


def test_states_have_the_variances_asked_for():
    mdata = linked_multiome(600, n_genes=150, within_sd=0.6)
    state, type_state = truth(mdata, "state", "type_state")
    within = state - type_state[codes(mdata, "cell_type")]
    assert within.std() == pytest.approx(0.6, rel=0.02)
    assert type_state.std() == pytest.approx(1.0, rel=0.1)
    assert np.abs(np.corrcoef(within.T) - np.eye(150)).mean() < 0.05


def test_programs_bound_the_rank_of_the_variation_within_types():
    mdata = small(600, n_programs=3, n_types=2)
    state, type_state = truth(mdata, "state", "type_state")
    within = state - type_state[codes(mdata, "cell_type")]
    singular = np.linalg.svd(within, compute_uv=False)
    assert singular[2] > 1
    assert singular[3] < 1e-3
    np.testing.assert_allclose(within.std(axis=0), 1.0, rtol=0.12)


def test_linked_peaks_follow_their_gene_within_types(default):
    (links,) = truth(default, "links")
    x, y = default["atac"].X.toarray().astype(float), np.log1p(default["rna"].X.toarray())
    types = codes(default, "cell_type")
    for matrix in (x, y):
        for rank in range(8):
            matrix[types == rank] -= matrix[types == rank].mean(axis=0)
    x -= x.mean(axis=1, keepdims=True)
    correlation_pg = np.corrcoef(x.T, y.T)[:500, 500:]
    linked = np.zeros((500, 200), dtype=bool)
    linked[links["peak_index"], links["gene_index"]] = True
    assert correlation_pg[linked].mean() > 0.35
    assert abs(correlation_pg[~linked].mean()) < 0.02
    # the peaks of a gene stand out from all others
    rank_g = [roc_auc_score(linked[:, g], correlation_pg[:, g]) for g in range(200)]
    assert np.mean(rank_g) > 0.98


def test_without_variation_the_type_says_all():
    mdata = small(within_sd=0.0)
    state, type_state = truth(mdata, "state", "type_state")
    np.testing.assert_allclose(state, type_state[codes(mdata, "cell_type")], rtol=1e-6)


def test_types_are_found_in_either_modality(default):
    types = codes(default, "cell_type")
    for matrix in (default["atac"].X.toarray(), np.log1p(default["rna"].X.toarray())):
        embedding = PCA(10, random_state=0).fit_transform(matrix)
        found = KMeans(8, n_init=5, random_state=0).fit_predict(embedding)
        assert adjusted_rand_score(types, found) > 0.9


def test_links_predict_expression_beyond_the_type(default):
    (links,) = truth(default, "links")
    x, expressed = default["atac"].X.toarray(), default["rna"].X.toarray() > 0
    types = np.eye(8)[codes(default, "cell_type")]
    links_gk = links["peak_index"].to_numpy().reshape(200, 3)
    shown = range(0, 200, 10)
    scores = {"type": [], "links": []}
    for g in shown:
        features = {"type": types, "links": np.hstack([types, x[:, links_gk[g]]])}
        for name, feature in features.items():
            fit = LogisticRegression().fit(feature[:700], expressed[:700, g])
            scores[name].append(roc_auc_score(expressed[700:, g], fit.decision_function(feature[700:])))
    assert np.mean(scores["links"]) > 0.88
    assert np.mean(scores["links"]) > np.mean(scores["type"]) + 0.08


def test_batch_effect_thins_and_changes_peaks_of_the_other_batches():
    quiet, loud = (linked_multiome(900, n_batches=3, batch_effect=e, binary=False) for e in (0.0, 1.0))
    batches = codes(loud, "batch")
    np.testing.assert_array_equal(np.bincount(batches), [300, 300, 300])
    np.testing.assert_array_equal(quiet["rna"].X.toarray(), loud["rna"].X.toarray())
    np.testing.assert_array_equal(loud["atac"].obs["thinned"], batches > 0)
    first = batches == 0
    before, after = (truth(mdata, "open_probability")[0].astype(float) for mdata in (quiet, loud))
    np.testing.assert_array_equal(before[first], after[first])
    effect_bp = truth(loud, "peak_effect")[0]
    assert not truth(quiet, "peak_effect")[0].any()
    np.testing.assert_array_equal((effect_bp == -1).sum(axis=1), [0, 25, 25])
    np.testing.assert_array_equal((effect_bp == 1).sum(axis=1), [0, 25, 25])
    assert (effect_bp[1] != effect_bp[2]).any()
    x = loud["atac"].X.toarray()
    for b in (1, 2):
        rows, effect = batches == b, effect_bp[b]
        np.testing.assert_allclose(
            np.log1p(-after[rows][:, effect == 0]), 0.4 * np.log1p(-before[rows][:, effect == 0]), rtol=2e-3, atol=1e-6
        )
        assert x[rows][:, effect == -1].sum() == 0
        gained = after[rows][:, effect == 1]
        np.testing.assert_allclose(gained, np.broadcast_to(gained[:, :1], gained.shape), rtol=1e-6)
        kept = x[rows][:, effect == 0].sum() / quiet["atac"].X.toarray()[rows][:, effect == 0].sum()
        assert kept == pytest.approx(0.4, abs=0.01)


def test_half_a_batch_effect_on_a_third_of_the_cells():
    mdata = linked_multiome(900, n_batches=2, batch_effect=0.5, thinned_share=1 / 3)
    thinned, second = mdata["atac"].obs["thinned"].to_numpy(), codes(mdata, "batch") == 1
    assert not thinned[~second].any()
    assert thinned[second].mean() == pytest.approx(1 / 3, abs=0.06)
    assert (truth(mdata, "peak_effect")[0] == -1).sum() == round(0.05 * 0.5 * 500)


def test_counts_and_binary_come_from_the_same_draws():
    counts, binary = small(binary=False, mean_open=0.5), small(mean_open=0.5)
    assert counts["atac"].X.max() > 1
    np.testing.assert_array_equal(counts["atac"].X.toarray() > 0, binary["atac"].X.toarray())
    np.testing.assert_array_equal(counts["rna"].X.toarray(), binary["rna"].X.toarray())
    intensity = -np.log1p(-truth(counts, "open_probability")[0].astype(float))
    moderate = intensity < 10  # beyond, 1 - p is lost in float32
    assert counts["atac"].X.toarray()[moderate].mean() == pytest.approx(intensity[moderate].mean(), rel=0.05)


def test_same_seed_same_data_and_other_seeds_differ():
    first, again, other = (small(n_batches=2, batch_effect=1.0, seed=seed) for seed in (1, 1, 2))
    for key in ("atac", "rna"):
        np.testing.assert_array_equal(first[key].X.toarray(), again[key].X.toarray())
        assert (first[key].X != other[key].X).nnz > 0
        pd.testing.assert_frame_equal(first[key].obs, again[key].obs)
        pd.testing.assert_frame_equal(first[key].var, again[key].var)
        assert not first[key].var.equals(other[key].var)
    for a, b in zip(truth(first, "rate", "links"), truth(again, "rate", "links"), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("n_cells", [1, 2, 2500])
def test_any_number_of_cells_works(n_cells):
    mdata = small(n_cells, n_types=1)
    assert mdata.n_obs == n_cells
    assert truth(mdata, "open_probability")[0].mean() == pytest.approx(0.35, abs=0.01)


def test_unreachable_openness_is_refused():
    with pytest.raises(ConfigError, match=r"mean_open=0\.9 is out of reach: at most 0\.\d+ of these peaks"):
        small(within_sd=3.0, mean_open=0.9)


@pytest.mark.filterwarnings("ignore::pandas.errors.Pandas4Warning")
def test_result_can_be_written_and_read(tmp_path):
    mdata = small(30)
    mdata.write(tmp_path / "linked.h5mu")
    back = mudata.read_h5mu(tmp_path / "linked.h5mu")
    np.testing.assert_array_equal(truth(back, "rate")[0], truth(mdata, "rate")[0])
    np.testing.assert_array_equal(truth(back, "links")[0]["peak"], truth(mdata, "links")[0]["peak"])
    np.testing.assert_array_equal(back["atac"].X.toarray(), mdata["atac"].X.toarray())
