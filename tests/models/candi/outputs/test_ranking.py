from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from epivi._errors import ConfigError
from epivi.data.windows import validation_windows
from epivi.models.candi.outputs.laws import CountLaw, SignalLaw


@pytest.mark.parametrize("kind", ["counts", "signal"])
def test_the_gain_of_an_assay_is_a_difference_of_log_likelihoods(trained, simulated, kind):
    table = trained.rank_assays("H3K4me3", ["DNase"], kind=kind)
    assert list(table.index)[-1] == "ATAC"
    assert np.isnan(table.loc["ATAC", "gain"])
    assert table.loc["ATAC", "n_biosamples"] == 0
    rows = np.flatnonzero(simulated.obsm["availability"][:, [0, 2, 3]].all(1))
    assert rows.tolist() == [1, 3]
    dataset = trained.windows(trained.adata)
    gains = []
    for row, start in validation_windows(trained.genome_split.validation, rows, 160):
        batch = dataset[[[row, start]]]
        nll = []
        for shown in ([1, 0, 0, 0], [1, 0, 0, 1]):
            mask = batch["available_counts"] * batch["available_counts"].new_tensor([shown])
            encoded = trained.module.inference(
                batch["counts"], mask, batch["continuous"], batch["categorical"], batch["bin_mask"]
            )
            asked = trained.module._get_generative_input(batch, encoded)
            asked["continuous"] = asked["continuous"].clone()
            # the coverage of a track would give away a part of it
            asked["continuous"][:, :, list(trained.state["continuous"]).index("coverage")] = torch.nan
            out = trained.module.generative(**asked)["outputs"]
            a, b = (x.detach().numpy()[0, :, 2] for x in (out[:2] if kind == "counts" else out[2:]))
            law = CountLaw(a, b) if kind == "counts" else SignalLaw(a, b)
            nll.append(law.nll(batch[kind][0, :, 2].numpy()).mean())
        gains.append(nll[0] - nll[1])
    assert table.loc["H3K27ac", "gain"] == pytest.approx(np.mean(gains), rel=1e-3, abs=1e-6)
    assert table.loc["H3K27ac", "sem"] == pytest.approx(np.std(gains, ddof=1) / 2, rel=1e-2)
    assert table.loc["H3K27ac", "n_biosamples"] == 2


def test_ranks_do_not_depend_on_batch_size_and_are_sorted(trained):
    table = trained.rank_assays("H3K4me3")
    gains = table["gain"].dropna().to_numpy()
    assert (np.diff(gains) <= 0).all()
    other = trained.rank_assays("H3K4me3", batch_size=1)
    np.testing.assert_allclose(other["gain"], table.loc[other.index, "gain"], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    ("asked", "match"),
    [
        ({"target": "H3K4me2"}, "'H3K4me3'"),
        ({"available": ["Dnase"]}, "'DNase'"),
        ({"candidates": ["ATAK"]}, "'ATAC'"),
        ({"available": ["H3K4me3"]}, "must name different assays"),
        ({"available": ["DNase"], "candidates": ["DNase"]}, "must name different assays"),
        ({"kind": "count"}, "'counts'"),
        ({"n_windows": 0}, "n_windows=0"),
        ({"n_draws": 1}, "n_draws=1"),
        ({"how": "both"}, "'retrospective'"),
        ({"batch_size": 0}, "batch_size=0"),
    ],
)
def test_unfit_arguments_of_rankings_are_refused(trained, asked, match):
    with pytest.raises(ConfigError, match=match):
        trained.rank_assays(**({"target": "H3K4me3"} | asked))


def test_importance_is_the_gain_of_each_assay_alone(trained):
    table = trained.get_assay_importance()
    assert list(table.index) == list(table.columns) == trained.assay_names
    assert np.isnan(np.diag(table)).all()
    alone = trained.rank_assays("H3K4me3")["gain"]
    pd.testing.assert_series_equal(table["H3K4me3"].dropna(), alone.dropna(), check_names=False, check_like=True)


@pytest.mark.parametrize("kind", ["counts", "signal"])
def test_nothing_is_expected_of_laws_that_depend_on_nothing(own, flatten, simulated, kind):
    flatten(own)
    # laws that do not depend on what is shown: nothing can be gained
    table = own.rank_assays("H3K4me3", ["DNase"], how="prospective", kind=kind)
    np.testing.assert_allclose(table["gain"].dropna(), 0.0, atol=1e-6)
    # candidates need not have been measured with the target, only what is shown
    n = simulated.obsm["availability"][:, trained_column(own, "DNase")].sum()
    assert (table["n_biosamples"] == n).all()


def trained_column(model, name):
    return model.assay_names.index(name)


def test_expected_gains_depend_on_the_seed_alone(trained):
    a, b, c = (
        trained.rank_assays("H3K4me3", how="prospective", n_windows=4, n_draws=2, seed=seed)["gain"]
        for seed in (0, 0, 1)
    )
    pd.testing.assert_series_equal(a, b)
    assert not np.allclose(a.sort_index(), c.sort_index(), rtol=1e-9)
