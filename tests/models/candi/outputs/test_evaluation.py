from __future__ import annotations

import logging

import numpy as np
import pytest
from scipy import stats

import epivi
from epivi._errors import ConfigError, DataError
from epivi.metrics import imputation_scores

ALL = ["chr1", "chr2", "chr3"]


def test_scores_are_those_of_direct_predictions(trained, simulated):
    table = trained.evaluate(biosamples=["biosample_1", "biosample_2"])
    found = trained.impute("chr3", biosamples=["biosample_1", "biosample_2"], leave_one_out=True)
    assert len(table) == 10
    for at, (biosample, assay) in enumerate(found.obs[["biosample", "assay"]].to_numpy()):
        row, number = list(simulated.obs_names).index(biosample), list(simulated.var_names).index(assay)
        for kind, prefix in (("counts", ""), ("signal", "signal_")):
            chosen = (table["biosample"] == biosample) & (table["assay"] == assay) & (table["kind"] == kind)
            scores = table[chosen].iloc[0]
            observed = simulated.obsm[kind][row, number, 800:].astype(np.float64)
            mean, var = (found.layers[prefix + name][at].astype(np.float64) for name in ("mean", "var"))
            for name, value in imputation_scores(observed, mean).items():
                if name in ("mse", "pearson", "spearman"):
                    assert scores[name] == pytest.approx(value, rel=1e-3, abs=1e-4)
            if kind == "counts":
                theta = mean**2 / (var - mean)
                nll = -stats.nbinom.logpmf(observed, theta, theta / (theta + mean))
            else:
                nll = -stats.norm.logpdf(observed, mean, np.sqrt(var))
                covered = np.abs(observed - mean) <= stats.norm.ppf(0.95) * np.sqrt(var)
                assert scores["coverage_0.9"] == pytest.approx(covered.mean(), abs=1e-6)
            assert scores["nll"] == pytest.approx(nll.mean(), rel=1e-3)


def test_the_table_says_what_was_trained_on(adata, make, learn, caplog):
    adata.obs["split"] = ["train", "train", "test", "train", "train"]
    model = learn(make(adata, setup={"split_key": "split"}), 1)
    with caplog.at_level(logging.WARNING, logger="epivi"):
        table = model.evaluate()
        assert "trained the model" not in caplog.text
        both = model.evaluate(["chr1", "chr3"], biosamples=["biosample_1", "biosample_2"])
    assert set(table["biosample"]) == {"biosample_2"}
    assert (table["trained_bins"] == 0).all()
    assert not table["trained_biosample"].any()
    assert "67 % of the bins and 1 of the 2 biosamples that are scored trained the model" in caplog.text
    assert both["trained_bins"].to_numpy() == pytest.approx(480 / 720)
    assert both.groupby("biosample")["trained_biosample"].first().tolist() == [True, False]


def test_the_held_out_end_of_a_single_chromosome_is_what_is_scored(make, learn):
    data = epivi.simulate.bulk(3, 4, chrom_sizes=[800], seed=2)
    model = learn(make(data, setup={"validation_chroms": None, "test_chroms": None}), 1)
    held = model.genome_split.validation
    assert (held.chromosomes, held.total) == (["chr1"], 160)
    table = model.evaluate()
    assert (table["trained_bins"] == 0).all()
    expected = model.evaluate("chr1:16000-20000")
    assert table["mse"].equals(expected["mse"])
    whole = model.evaluate("chr1")
    assert whole["trained_bins"].to_numpy() == pytest.approx(640 / 800)
    model.calibrate()
    before = model.module.recalibration.clone()
    model.calibrate("chr1:16000-20000")
    assert (before == model.module.recalibration).all()


def test_with_other_bins_all_are_scored(trained, adata, on_bins):
    query = on_bins(adata, np.r_[400:560])
    table = trained.evaluate(adata=query)
    assert table["trained_bins"].to_numpy() == pytest.approx(80 / 160)
    with pytest.raises(ConfigError, match="say where to learn the correction, region="):
        trained.calibrate(adata=query)
    gains = trained.rank_assays("H3K4me3", ["DNase"], adata=query)
    assert gains.loc["H3K27ac", "n_biosamples"] == 2


def test_evaluation_is_the_same_for_the_same_seed(trained):
    first, second = (trained.evaluate(biosamples="biosample_0", seed=3) for _ in range(2))
    assert first.equals(second)
    other = trained.evaluate(biosamples="biosample_0", seed=4)
    assert other["mse"].equals(first["mse"])
    assert not other["pit_distance"].equals(first["pit_distance"])


def laws(model, kind, row, assay, region):
    """The leave-one-out law of one experiment."""
    found = model.impute(region, [model.assay_names[assay]], [f"biosample_{row}"], leave_one_out=True)
    mean, var = (
        found.layers[("" if kind == "counts" else "signal_") + name][0].astype(float) for name in ("mean", "var")
    )
    return mean, var


def test_intervals_cover_what_is_drawn_from_the_model(own, simulated):
    """The law of an experiment does not depend on its own values: they can be replaced by draws of it."""
    rng = np.random.default_rng(5)
    data = simulated.copy()
    data.obsm["counts"] = data.obsm["counts"].astype(np.int32)
    n = 0
    for row, assay in ((1, 3), (2, 2), (4, 0)):
        for kind in ("counts", "signal"):
            mean, var = laws(own, kind, row, assay, ALL)
            if kind == "counts":
                theta = mean**2 / (var - mean)
                data.obsm[kind][row, assay] = rng.negative_binomial(theta, theta / (theta + mean))
            else:
                data.obsm[kind][row, assay] = rng.normal(mean, np.sqrt(var))
    for row, assay in ((1, 3), (2, 2), (4, 0)):
        table = own.evaluate(ALL, own.assay_names[assay], f"biosample_{row}", adata=data)
        for level in (0.5, 0.8, 0.9, 0.95):
            error = np.sqrt(level * (1 - level) / 1040)
            assert (np.abs(table[f"coverage_{level:g}"] - level) < 4 * error).all()
        # Kolmogorov: a distance of 1.95 / sqrt(n) has a probability of 0.1 %
        assert (table["pit_distance"] < 1.95 / np.sqrt(1040)).all()
        n += len(table)
    assert n == 6


def test_calibration_repairs_a_known_distortion(own, flatten, simulated, tmp_path):
    """Predicted N(1, 0.25) and NB(mean 2 x ratio); the data are wider and lower, or Poisson-like."""
    flatten(own)
    rng = np.random.default_rng(6)
    data = simulated.copy()
    shape = data.obsm["signal"].shape
    data.obsm["signal"] = rng.normal(0.5, 1.0, shape).astype(np.float32)
    data.obsm["counts"] = rng.poisson(1.0, shape).astype(np.uint16)
    data.obsm["depth"][:] = np.nan
    before = own.evaluate("chr3", adata=data)
    own.calibrate("chr2", adata=data)
    after = own.evaluate("chr3", adata=data)
    for kind in ("counts", "signal"):
        b, a = (t.loc[t["kind"] == kind] for t in (before, after))
        assert (b["pit_distance"] > 0.15).all()
        assert (a["pit_distance"].mean()) < 0.07
        assert np.abs(a["coverage_0.9"].mean() - 0.9) < 0.03
        assert a["nll"].equals(b["nll"])
    # the interval of the corrected law is that of the data
    found = own.denoise("chr3", ["DNase"], adata=data, threshold=0.5)
    expected = stats.norm(0.5, 1.0).ppf([0.05, 0.5, 0.95])
    for name, value in zip(("lower", "median", "upper"), expected, strict=True):
        assert found.layers[f"signal_{name}"].mean() == pytest.approx(value, abs=0.25)
    assert found.layers["signal_exceeds"].mean() == pytest.approx(0.5, abs=0.07)
    assert (found.layers["median"] == 1).all()
    own.save(tmp_path / "model")
    loaded = epivi.CANDI.load(tmp_path / "model", simulated.copy())
    assert loaded.evaluate("chr3", adata=data).equals(after)
    table = loaded.calibration("chr3", adata=data)
    assert np.abs(table["coverage"] - table["level"]).max() < 0.12


def test_a_calibration_replaces_the_one_before_or_leaves_it(own, simulated):
    identity = own.module.recalibration.clone()
    own.calibrate()
    learned = own.module.recalibration.clone()
    assert not (learned == identity).all()
    with pytest.raises(DataError, match="a map needs at least 20"):
        own.calibrate("chr2:0-100", biosamples="biosample_1")
    assert bool(own.module.is_recalibrated)
    assert (own.module.recalibration == learned).all()
    own.calibrate(biosamples="biosample_4")
    # H3K4me3 is not measured in biosample 4
    assert (own.module.recalibration[:, 2] == identity[:, 2]).all()
    own.calibrate()
    assert (own.module.recalibration == learned).all()
    assert own.assay_names[2] == simulated.var_names[2]


def test_calibration_needs_bins_that_are_held_out(adata, make, learn):
    model = learn(make(adata, setup={"validation_chroms": []}), 1)
    with pytest.raises(ConfigError, match="no bins held out for validation: say where"):
        model.calibrate()


def test_the_coverage_curve_is_that_of_the_scores(trained):
    curve = trained.calibration(levels=(0.5, 0.9), biosamples="biosample_4")
    scores = trained.evaluate(levels=(0.5, 0.9), biosamples="biosample_4")
    for kind in ("counts", "signal"):
        for assay in ("DNase", "ATAC"):
            a = curve[(curve["kind"] == kind) & (curve["assay"] == assay)].set_index("level")["coverage"]
            b = scores[(scores["kind"] == kind) & (scores["assay"] == assay)].iloc[0]
            assert a[0.5] == pytest.approx(b["coverage_0.5"], abs=0.05)
            assert a[0.9] == pytest.approx(b["coverage_0.9"], abs=0.05)


def test_unfit_arguments_of_scores_are_refused(trained):
    with pytest.raises((ConfigError, DataError), match="levels"):
        trained.evaluate(levels=[1.5])
    with pytest.raises(ConfigError, match="Did you mean 'biosample_"):
        trained.evaluate(biosamples="biosample_7")
    with pytest.raises(ConfigError, match="batch_size=0"):
        trained.calibration(batch_size=0)


def test_pit_values_are_those_of_the_coverage_curve(trained):
    pits = trained.get_pit()
    curve = trained.calibration(levels=[0.5, 0.9])
    assert set(pits) == {f"{a}, {k}" for k, a in zip(curve["kind"], curve["assay"], strict=True)}
    for row in curve.itertuples():
        pit = pits[f"{row.assay}, {row.kind}"]
        assert np.mean(np.abs(pit - 0.5) <= row.level / 2) == pytest.approx(row.coverage, abs=1e-12)


def test_what_is_scored_is_predicted_without_its_coverage(trained, adata):
    other = adata.copy()
    other.obsm["coverage"] = np.where(np.isnan(adata.obsm["coverage"]), np.nan, 0.5)
    # coverage of the tracks that are shown is an input: hide them all but for the one that is predicted
    for data in (adata, other):
        data.obsm["availability"] = np.array(data.obsm["availability"])
        data.obsm["availability"][1] = np.array([False, False, True, False])
    a, b = (trained.evaluate(biosamples="biosample_1", adata=data)["nll"] for data in (adata, other))
    np.testing.assert_allclose(a, b, rtol=1e-6)
