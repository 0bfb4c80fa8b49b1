"""Regions of the genome as users write them."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from epivi._errors import ConfigError

_REGION = re.compile(r"^\s*([^\s:]+)[:-](\d[\d,_]*)-(\d[\d,_]*)\s*$")


class Region(NamedTuple):
    """An interval, 0-based and half-open, in bp."""

    chrom: str
    start: int
    end: int


def parse_region(region: Any) -> Region:
    """Read a region such as ``chr1:1,000,000-2,000,000`` or ``chr1-1000000-2000000``; a Region is returned as it is.

    Parameters
    ----------
    region
        Text, or a triple of chromosome, start and end.

    Raises
    ------
    ConfigError
        If it cannot be read, or does not end after its start.

    Examples
    --------
    >>> parse_region("chr1:1,000-2,000")
    Region(chrom='chr1', start=1000, end=2000)
    """
    if isinstance(region, tuple | list) and len(region) == 3:
        region = "{}:{}-{}".format(*region)
    found = _REGION.match(region) if isinstance(region, str) else None
    if found is None:
        message = f"The region {region!r} cannot be read: write it as 'chr1:1,000,000-2,000,000'."
        raise ConfigError(message)
    chrom, *positions = found.groups()
    start, end = (int(re.sub(r"[,_]", "", text)) for text in positions)
    if end <= start:
        message = f"The region {region!r} does not end after its start."
        raise ConfigError(message)
    return Region(chrom, start, end)
