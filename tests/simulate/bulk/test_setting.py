"""Arguments of the simulated bulk experiments."""

import inspect

import numpy as np
import pytest

from epivi._errors import ConfigError
from epivi.simulate import bulk
from epivi.simulate.bulk._setting import bulk_setting

DEFAULTS = {name: entry.default for name, entry in inspect.signature(bulk).parameters.items()}


def setting(**options):
    return bulk_setting(DEFAULTS | options)


def test_defaults_are_filled_in():
    found = setting(seed=7)
    assert (found.profile_seed, found.bins_of_chrom, found.n_bins) == (7, {"chr1": 3200, "chr2": 1600}, 4800)
    assert found.runs == [("chr1", 0, 3200), ("chr2", 0, 1600)]
    assert found.level.tolist() == [1.5] * 6
    assert set(found.unknown.values()) == {0.0}
    assert setting(n_assays=10).assays[:2] + setting(n_assays=10).assays[-2:] == ("DNase", "ATAC", "assay_8", "assay_9")


def test_gaps_split_chromosomes_in_the_middle():
    found = setting(chrom_sizes={"chrA": 5, "chrB": 1}, gap=3)
    assert found.runs == [("chrA", 0, 3), ("chrA", 6, 2), ("chrB", 0, 1)]
    assert sum(size for _, _, size in found.runs) == found.n_bins == 6


def test_unknown_may_be_given_by_name():
    shares = {"depth": 0.0, "coverage": 0.0, "read_length": 0.5, "run_type": 0.0}
    assert setting(unknown={"read_length": 0.5}).unknown == shares
    assert set(setting(unknown=0.3).unknown.values()) == {0.3}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_biosamples": 0}, "n_biosamples=0 is not valid: give a whole number of at least 1"),
        ({"n_assays": 2}, "n_assays=2 is not valid: give a whole number of at least 3"),
        ({"n_factors": 2}, "n_factors=2 is not valid"),
        ({"chrom_sizes": []}, r"chrom_sizes=\[\] is not valid: give the bins of each chromosome"),
        ({"chrom_sizes": "chr1"}, "chrom_sizes='chr1' is not valid"),
        ({"chrom_sizes": [10, 0]}, r"chrom_sizes\['chr2'\]=0 is not valid"),
        ({"gap": -1}, "gap=-1 is not valid"),
        ({"domain": 0.5}, "domain=0.5 is not valid: give a finite number of at least 1"),
        ({"own": 1.5}, "own=1.5 is not valid: give a finite number between 0 and 1"),
        ({"motif_share": -1}, "motif_share=-1 is not valid"),
        ({"gain": np.nan}, "gain=nan is not valid"),
        ({"noise": -0.1}, "noise=-0.1 is not valid"),
        ({"level": [1.0, 2.0]}, "level has 2 entries for 6 assays: give one number, or one an assay"),
        ({"level": 0}, "level=0 is not valid"),
        ({"dispersion": [1, 1, 1, 1, 1, 0]}, r"dispersion\[5\]=0 is not valid"),
        ({"depth": 0}, "depth=0 is not valid"),
        ({"depth_fold": 0.5}, "depth_fold=0.5 is not valid"),
        ({"missing": 2}, "missing=2 is not valid"),
        ({"unknown": {"dept": 0.1}}, "unknown names 'dept', which is no covariate. Did you mean 'depth'"),
        ({"unknown": {"depth": 2}}, r"unknown\['depth'\]=2 is not valid"),
        ({"unknown": -1}, "unknown=-1 is not valid"),
        ({"signal": 1}, "signal=1 is not valid: give True or False"),
        ({"dna": True, "bin_size_bp": 20}, "bin_size_bp=20 is too narrow for the motifs of 3 factors, 8 bp each"),
        ({"bin_size_bp": 0}, "bin_size_bp=0 is not valid"),
        ({"seed": 1.5}, "seed=1.5 is not valid"),
        ({"profile_seed": -1}, "profile_seed=-1 is not valid"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        setting(**options)
