from __future__ import annotations

import numpy as np
import pytest

from epivi._errors import ConfigError
from epivi.simulate.regions import DEFAULT_CHROM_SIZES, HG38_AUTOSOMES, place_regions, resolve_chrom_sizes


def table(n_fg, n_bg, sizes=DEFAULT_CHROM_SIZES, seed=0):
    return place_regions(n_fg, n_bg, chrom_sizes=sizes, rng=np.random.default_rng(seed))


def test_default_has_four_chromosomes_in_the_stated_shares():
    counts = table(500, 500)["chrom"].value_counts(sort=False)
    assert counts.to_dict() == {"chr1": 400, "chr2": 300, "chr3": 200, "chr4": 100}


def test_hg38_has_22_autosomes_of_grch38():
    sizes = resolve_chrom_sizes("hg38")
    assert list(sizes) == [f"chr{i}" for i in range(1, 23)]
    # total of the autosomes of GRCh38 (assembly report)
    assert sum(sizes.values()) == 2_875_001_522
    counts = table(2000, 2000, HG38_AUTOSOMES)["chrom"].value_counts(sort=False)
    share = np.array(list(sizes.values())) / sum(sizes.values())
    assert np.abs(counts.to_numpy() - 4000 * share).max() < 1


def test_regions_are_sorted_disjoint_inside_their_chromosome_and_uniquely_named():
    sizes = {"chrB": 30_000, "chrA": 10_500}
    regions = table(13, 17, sizes)
    assert regions["chrom"].cat.categories.tolist() == ["chrB", "chrA"]
    for name, part in regions.groupby("chrom", observed=True):
        assert (part["start"].to_numpy()[1:] >= part["end"].to_numpy()[:-1]).all()
        assert part["start"].min() >= 0
        assert part["end"].max() <= sizes[name]
    width = (regions["end"] - regions["start"]).to_numpy()
    np.testing.assert_array_equal(width, np.where(regions["foreground"], 500, 1000))
    assert regions.index.is_unique
    assert regions["foreground"].sum() == 13


def test_both_kinds_occur_on_every_chromosome():
    shares = table(500, 500).groupby("chrom", observed=True)["foreground"].mean()
    assert ((shares > 0.3) & (shares < 0.7)).all()


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ("hg39", r"'hg39' is not a known table.*hg38"),
        ({}, "is not valid: give a mapping"),
        (5, "chrom_sizes=5 is not valid"),
        ({"chr1": 0}, r"chrom_sizes\['chr1'\]=0"),
        ({"chr1": 10.5}, r"chrom_sizes\['chr1'\]=10.5"),
    ],
)
def test_bad_chrom_sizes_are_named(sizes, words):
    with pytest.raises(ConfigError, match=words):
        resolve_chrom_sizes(sizes)


def test_a_chromosome_too_short_is_named():
    with pytest.raises(ConfigError, match="'chr1' of 5000 bp cannot hold 10 regions of 1000 bp"):
        table(5, 5, {"chr1": 5000})
