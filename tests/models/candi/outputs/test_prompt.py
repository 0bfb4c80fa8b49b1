from __future__ import annotations

import numpy as np
import pytest

from epivi._errors import ConfigError


@pytest.mark.parametrize(
    ("covariates", "match"),
    [
        ({"dept": 1e7}, "The model has no covariate 'dept'. Did you mean 'depth'?"),
        ({"depth": {"DNAse": 1e7}}, r"covariates\['depth'\] names the assay 'DNAse'. Did you mean 'DNase'?"),
        ({"depth": 0}, r"covariates\['depth'\]=0 is out of range"),
        ({"depth": "deep"}, r"covariates\['depth'\]='deep' \(str\) is not valid"),
        ({"read_length": np.nan}, r"covariates\['read_length'\]=nan is not valid"),
        ({"run_type": "pair"}, r"covariates\['run_type'\]: there is no level 'pair'. Did you mean 'paired'?"),
    ],
)
def test_what_cannot_be_asked_for_is_refused_with_the_nearest(trained, covariates, match):
    with pytest.raises(ConfigError, match=match):
        trained.impute("chr3", covariates=covariates)


def test_a_model_without_covariates_says_so(adata, make):
    model = make(adata, setup={"covariates_key": [], "counts_key": None})
    with pytest.raises(ConfigError, match=r"no covariate 'depth'\. It has none\."):
        model._prompt({"depth": 1e7})


def test_asking_for_another_depth_makes_coverage_unknown(trained):
    prompt = trained._prompt({"depth": 1e7})
    at = list(trained.state["continuous"]).index("coverage")
    assert prompt.continuous[at].is_asked_a.all()
    assert np.isnan(prompt.continuous[at].values_a).all()
    one = trained._prompt({"depth": {"ATAC": 1e7}})
    assert one.continuous[at].is_asked_a.tolist() == [False, True, False, False]
    given = trained._prompt({"depth": 1e7, "coverage": 0.4})
    np.testing.assert_allclose(given.continuous[at].values_a, 0.4)
    assert at not in trained._prompt({"read_length": 50}).continuous


def test_depths_become_logarithms_and_ratios(trained):
    prompt = trained._prompt({"depth": {"DNase": 2.0**24, "H3K27ac": None}})
    at = list(trained.state["continuous"]).index("depth")
    assert prompt.continuous[at].values_a[0] == 24
    assert np.isnan(prompt.continuous[at].values_a[3])
    reference = np.asarray(trained.state["depth_ref"])
    assert prompt.log_depth_ratio.values_a[0] == pytest.approx(np.log(2.0**24 / reference[0]))
    assert prompt.log_depth_ratio.values_a[3] == 0
    assert prompt.log_depth_ratio.is_asked_a.tolist() == [True, False, False, True]


def test_a_prompt_replaces_what_was_asked_for_alone(trained):
    batch = trained.windows(trained.adata)[[[0, 0], [1, 0]]]
    asked = {"depth": {"DNase": 1e7}, "run_type": {"H3K4me3": "paired", "DNase": None}}
    found = trained._prompt(asked).apply(batch)
    assert found["continuous"][:, 0, 0].tolist() == pytest.approx([np.log2(1e7)] * 2)
    np.testing.assert_array_equal(found["continuous"][:, 1:], batch["continuous"][:, 1:])
    assert found["categorical"][:, 2, 0].tolist() == [1, 1]
    assert found["categorical"][:, 0, 0].tolist() == [-1, -1]
    np.testing.assert_array_equal(found["categorical"][:, [1, 3]], batch["categorical"][:, [1, 3]])
    np.testing.assert_array_equal(found["log_depth_ratio"][:, 1:], batch["log_depth_ratio"][:, 1:])
    same = trained._prompt(None).apply(batch)
    np.testing.assert_array_equal(same["continuous"], batch["continuous"])


def test_typical_covariates_are_those_of_the_training_experiments(trained, simulated):
    typical = trained._typical_covariates(None)
    available = simulated.obsm["availability"]
    assert typical["depth"] == pytest.approx(np.exp(np.log(simulated.obsm["depth"][available]).mean()), rel=1e-5)
    assert typical["read_length"] == pytest.approx(simulated.obsm["read_length"][available].mean(), rel=1e-5)
    share = simulated.obsm["run_type"][available].mean()
    assert typical["run_type"] == ("paired" if share > 0.5 else "single")
    asked = trained._typical_covariates({"depth": {"ATAC": 1e7}, "read_length": None})
    assert asked["depth"]["ATAC"] == 1e7
    assert asked["depth"]["DNase"] == typical["depth"]
    assert asked["coverage"]["ATAC"] is None
    assert asked["coverage"]["DNase"] == typical["coverage"]
    assert asked["read_length"] is None
    assert trained._typical_covariates({"depth": 1e7})["coverage"] is None


def test_typical_of_a_model_that_does_not_read_the_depth_is_the_reference_depth(offset_only):
    prompt = offset_only._prompt(offset_only._typical_covariates(None))
    assert prompt.log_depth_ratio.is_asked_a.all()
    np.testing.assert_allclose(prompt.log_depth_ratio.values_a, 0, atol=1e-12)


def test_a_category_that_no_experiment_has_is_typically_unknown(adata, make):
    adata.obsm["run_type"][:] = -1
    model = make(adata)
    assert model._typical_covariates(None)["run_type"] is None


def test_probabilities_are_corrected_once_the_model_is_calibrated(own):
    assert own._recalibration("counts", 0) is None
    own.module.is_recalibrated.fill_(value=True)
    np.testing.assert_allclose(own._recalibration("signal", 2).apply([0.1, 0.7]), [0.1, 0.7])
