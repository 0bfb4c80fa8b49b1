from __future__ import annotations

import numpy as np
import pytest

import epivi
from epivi._errors import ConfigError, DataError
from epivi.models.candi.outputs import export

pytest.importorskip("pyBigWig")
SIZES = {"chr1": 480 * 25, "chr2": 320 * 25, "chr3": 240 * 25}


def read(path, sizes=None):
    return epivi.pp.bulk.read_bigwig(path, sizes or SIZES, 25, transform="none", uncovered="nan").signal_l


def test_files_hold_the_arrays_bit_by_bit(trained, tmp_path):
    what = ["mean", "upper", "signal_mean", "signal_lower"]
    paths = trained.export_bigwig(
        tmp_path / "out", what=what, biosamples=["biosample_1", "biosample_4"], progress=False
    )
    assert len(paths) == 2 * 4 * 4
    assert sorted(tmp_path.joinpath("out").iterdir()) == sorted(paths)
    asked = {"biosamples": ["biosample_1", "biosample_4"], "original_scale": True}
    arrays = [trained.denoise(**asked), trained.impute(**asked)]
    for found in arrays:
        for at, name in enumerate(found.obs_names):
            for layer in what:
                path = tmp_path / "out" / f"{name.replace('|', '.')}.{layer}.bw"
                values = read(path)
                assert values.dtype == np.float32
                np.testing.assert_allclose(values, found.layers[layer][at], rtol=2e-4, atol=2e-5)
    # the same requests give the same bits
    again = trained.export_bigwig(tmp_path / "again", what=what, biosamples="biosample_4", progress=False)
    for path in again:
        np.testing.assert_array_equal(read(path), read(tmp_path / "out" / path.name))


def test_one_request_is_written_bit_by_bit(trained, tmp_path):
    asked = {"assays": ["H3K4me3"], "biosamples": "biosample_1", "leave_one_out": True, "original_scale": False}
    (path,) = trained.export_bigwig(tmp_path, what="mean", progress=False, **asked)
    assert path.name == "biosample_1.H3K4me3.mean.bw"
    np.testing.assert_array_equal(read(path), trained.impute(**asked).layers["mean"][0])


def test_a_region_leaves_the_rest_uncovered(trained, tmp_path):
    region = ["chr1:3000-7000", "chr3:100-600"]
    asked = {"assays": "ATAC", "biosamples": "biosample_2", "region": region}
    (path,) = trained.export_bigwig(tmp_path, what="mean", covariates={"depth": 1e7}, progress=False, **asked)
    values = read(path)
    expected = trained.impute(**asked, covariates={"depth": 1e7}).layers["mean"][0]
    covered = ~np.isnan(values)
    assert np.flatnonzero(covered).tolist() == [*range(120, 280), *range(804, 824)]
    np.testing.assert_array_equal(values[covered], expected)


def test_gaps_stay_gaps(make, learn, tmp_path):
    data = epivi.simulate.bulk(2, 4, chrom_sizes=[200, 180], gap=40, seed=3, missing=0.0)
    model = learn(make(data, setup={"validation_chroms": ["chr2"], "test_chroms": None}), 1)
    (path,) = model.export_bigwig(tmp_path, what="median", assays="ATAC", biosamples="biosample_0", progress=False)
    sizes = {name: int(size) for name, size in data.uns["genome"]["chrom_sizes"].items()}
    values = read(path, sizes)
    assert np.isnan(values).sum() == 80
    expected = model.denoise(assays="ATAC", biosamples="biosample_0").layers["median"][0]
    np.testing.assert_array_equal(values[~np.isnan(values)], expected)


def test_files_that_are_there_are_kept_unless_told_otherwise(trained, tmp_path):
    asked = {"what": "mean", "assays": "DNase", "region": "chr3", "progress": False}
    paths = trained.export_bigwig(tmp_path, biosamples="biosample_1", **asked)
    before = paths[0].read_bytes()
    with pytest.raises(ConfigError, match=r"biosample_1\.DNase\.mean\.bw is there already, as are 0 more"):
        trained.export_bigwig(tmp_path, **asked)
    assert list(tmp_path.iterdir()) == paths
    assert paths[0].read_bytes() == before
    trained.export_bigwig(tmp_path, biosamples="biosample_1", covariates={"depth": 3e7}, overwrite=True, **asked)
    assert paths[0].read_bytes() != before


def test_a_failure_leaves_nothing_half_written(own, tmp_path, monkeypatch):
    calls = []
    summaries = type(own)._summaries

    def fail(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 6:
            message = "full"
            raise OSError(message)
        return summaries(self, *args, **kwargs)

    monkeypatch.setattr(type(own), "_summaries", fail)
    with pytest.raises(OSError, match="full"):
        own.export_bigwig(tmp_path, what=["mean", "lower"], assays=["DNase", "ATAC"], batch_size=3, progress=False)
    # four stretches a biosample: the first one is whole, of the second nothing is there
    assert {path.name.split(".")[0] for path in tmp_path.iterdir()} == {"biosample_0"}
    for path in tmp_path.iterdir():
        assert np.isfinite(read(path)).all()
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize(
    ("asked", "match"),
    [
        ({"what": "means"}, "'mean'"),
        ({"what": "exceeds"}, "what"),
        ({"interval": 1.5}, "interval=1.5 is out of range"),
        ({"interval": None}, "interval=None"),
        ({"batch_size": -1}, "batch_size=-1"),
        ({"assays": "DNAse"}, "Did you mean 'DNase'?"),
        ({"covariates": {"depths": 1}}, "Did you mean 'depth'?"),
    ],
)
def test_unfit_arguments_write_nothing(trained, tmp_path, asked, match):
    with pytest.raises(ConfigError, match=match):
        trained.export_bigwig(tmp_path / "out", progress=False, **asked)
    assert not (tmp_path / "out").exists()


def test_a_region_without_bins_is_refused(trained, tmp_path):
    with pytest.raises(DataError, match="No bin overlaps chr3:90000-100000"):
        trained.export_bigwig(tmp_path / "out", region="chr3:90000-100000", progress=False)


def test_the_folder_is_a_folder_and_names_are_distinct(trained, simulated, tmp_path):
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(ConfigError, match="file is a file; the name of a folder is needed"):
        trained.export_bigwig(tmp_path / "file", progress=False)
    data = simulated[:2].copy()
    data.obs_names = ["a/b", "a_b"]
    with pytest.raises(ConfigError, match="Two tracks would be written to one file"):
        trained.export_bigwig(tmp_path / "out", adata=data, progress=False)
    assert not (tmp_path / "out").exists()


def test_sizes_of_chromosomes_are_those_of_the_genome_or_end_with_the_bins(trained, adata):
    runs = trained.runs
    assert export._chrom_sizes(adata, runs) == SIZES
    adata.uns["genome"] = {"chrom_sizes": {"chr1": 50_000}}
    assert export._chrom_sizes(adata, runs) == SIZES | {"chr1": 50_000}
    adata.uns["genome"] = "hg38"
    assert export._chrom_sizes(adata, runs) == SIZES
