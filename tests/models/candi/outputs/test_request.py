from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from epivi._errors import ConfigError, DataError
from epivi.data.windows import runs
from epivi.models.candi.outputs.request import bins_table, places, region_runs, run_of
from epivi.pp import peak_names


@pytest.fixture
def found():
    """chr1 with a gap after 100 bins, and chr2."""
    start = np.concatenate([np.arange(100), np.arange(150, 200), np.arange(40)]) * 10
    return runs(pd.DataFrame({"chrom": ["chr1"] * 150 + ["chr2"] * 40, "start": start, "end": start + 10}))


def spans(found):
    return [(run.chrom, run.first, run.n_bins, run.start_bp) for run in found]


def test_regions_are_bins(found):
    assert spans(region_runs(found, None)) == [("chr1", 0, 100, 0), ("chr1", 100, 50, 1500), ("chr2", 150, 40, 0)]
    assert spans(region_runs(found, "chr2")) == [("chr2", 150, 40, 0)]
    assert spans(region_runs(found, "chr1:995-1,511")) == [("chr1", 99, 1, 990), ("chr1", 100, 2, 1500)]
    assert spans(region_runs(found, ["chr2", "chr1:0-20"])) == [("chr1", 0, 2, 0), ("chr2", 150, 40, 0)]
    assert spans(region_runs(found, ["chr1", 5, 20])) == [("chr1", 0, 2, 0)]
    part = found.of_chromosomes(["chr2"])
    assert region_runs(found, part) is part


@pytest.mark.parametrize(
    ("region", "error", "match"),
    [
        (["chr1:0-100", "chr1:50-200"], ConfigError, "Regions overlap: ask for each bin once"),
        ([], ConfigError, "The list of regions is empty"),
        ("chr1:1000-1500", DataError, "No bin overlaps chr1:1000-1500"),
        ("chr9", (ConfigError, DataError), "chr9"),
    ],
)
def test_regions_that_cannot_be_predicted_are_refused(found, region, error, match):
    with pytest.raises(error, match=match):
        region_runs(found, region)


def test_the_run_of_a_bin(found):
    assert [run_of(found, at).first for at in (0, 99, 100, 149, 150)] == [0, 0, 100, 100, 150]


def test_names_are_places():
    assert places(None, ["a", "b"], what="assay") == [0, 1]
    assert places(["b", "a"], ["a", "b"], what="assay") == [1, 0]
    with pytest.raises(ConfigError, match=r"There is no assay 'H3K4me2'\. Did you mean 'H3K4me3'\?"):
        places("H3K4me2", ["H3K4me3", "ATAC"], what="assay")
    with pytest.raises(ConfigError, match=r"The biosample 'a' is named 2 times\. Name it once\."):
        places(["a", "a"], ["a"], what="biosample")


def test_bins_have_names(found):
    table = bins_table(found)
    assert len(table) == 190
    assert table.index[[0, 99, 100, 150]].tolist() == ["chr1:0-10", "chr1:990-1000", "chr1:1500-1510", "chr2:0-10"]
    assert (table["end"] - table["start"] == 10).all()
    assert peak_names(table).equals(table.index)


def asked(model, kind, **named):
    request = model._request(model._opened(None), "chr3", named.get("assays"), named.get("biosamples"), kind=kind)
    return request, [(target.row, target.assay) for target in request.targets]


def test_each_method_picks_its_assays(trained, simulated):
    available = simulated.obsm["availability"]
    assert asked(trained, "missing")[1] == [tuple(at) for at in np.argwhere(~available)]
    assert asked(trained, "measured")[1] == [tuple(at) for at in np.argwhere(available)]
    assert asked(trained, "left out")[1] == [tuple(at) for at in np.argwhere(available)]
    assert asked(trained, "all")[1] == [(b, a) for b in range(5) for a in range(4)]
    some = asked(trained, "measured", assays=["H3K27ac", "DNase"], biosamples=["biosample_3", "biosample_0"])[1]
    assert some == [(3, 3), (3, 0), (0, 0)]


def test_what_is_left_out_is_hidden_alone(trained, simulated):
    request, targets = asked(trained, "left out")
    assert [job.assays for job in request.jobs] == [(assay,) for _, assay in targets]
    for job in request.jobs:
        assert job.shown_a[list(job.assays)] == 0
        assert job.shown_a.sum() == 3
    request, _ = asked(trained, "measured")
    assert [job.row for job in request.jobs] == [0, 1, 2, 3, 4]
    assert np.array_equal(np.stack([job.shown_a for job in request.jobs]) > 0, simulated.obsm["availability"])


def test_requests_are_cut_by_biosample(trained):
    request, targets = asked(trained, "left out")
    parts = request.by_biosample()
    assert [(t.row, t.assay) for part in parts for t in part.targets] == targets
    assert [{job.row for job in part.jobs} for part in parts] == [{0}, {1}, {2}, {3}, {4}]


def test_nothing_to_predict_is_refused_with_the_other_method(trained):
    with pytest.raises(ConfigError, match=r"No assay .* is missing. denoise\(\) predicts assays that were measured"):
        trained.impute("chr3", ["DNase"], ["biosample_0"])
    with pytest.raises(ConfigError, match=r"No assay .* is measured. impute\(\) predicts assays that were not"):
        trained.denoise("chr3", ["ATAC"], ["biosample_0"])


def test_unknown_names_are_refused_with_the_nearest(trained):
    with pytest.raises(ConfigError, match=r"There is no biosample 'biosample_9'\. Did you mean 'biosample_"):
        trained.denoise("chr3", biosamples="biosample_9")
    with pytest.raises(ConfigError, match=r"There is no assay 'H3K4me'\. Did you mean 'H3K4me3'\?"):
        trained.denoise("chr3", assays=["H3K4me"])
