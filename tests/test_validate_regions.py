from __future__ import annotations

import pytest

from epivi._errors import ConfigError
from epivi._validate_regions import Region, parse_region


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("chr1:100-200", ("chr1", 100, 200)),
        ("chr1-100-200", ("chr1", 100, 200)),
        (" chrX:1,000,000-2_000_000 ", ("chrX", 1_000_000, 2_000_000)),
        ("HLA-A:0-1", ("HLA-A", 0, 1)),
        (("chr2", 5, 6), ("chr2", 5, 6)),
        (Region("chr2", 5, 6), ("chr2", 5, 6)),
    ],
)
def test_regions_are_read(text, expected):
    assert parse_region(text) == expected


@pytest.mark.parametrize("text", ["chr1", "chr1:5", "chr1:a-b", "", None, 3, ("chr1", 5), "chr1:-5-7"])
def test_what_is_no_region_is_refused(text):
    with pytest.raises(ConfigError, match="cannot be read"):
        parse_region(text)


@pytest.mark.parametrize("text", ["chr1:5-5", "chr1:6-5"])
def test_empty_regions_are_refused(text):
    with pytest.raises(ConfigError, match="does not end after its start"):
        parse_region(text)
