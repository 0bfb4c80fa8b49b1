"""Places of simulated regions on chromosomes."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Final

import numpy as np
import pandas as pd

from epivi._errors import ConfigError, nearest
from epivi._keys import VAR_CHROM, VAR_END, VAR_START
from epivi.simulate._arguments import check_integer, split_evenly

if TYPE_CHECKING:
    from collections.abc import Mapping

FOREGROUND_BP: Final = 500
BACKGROUND_BP: Final = 1000

DEFAULT_CHROM_SIZES: Final = MappingProxyType(
    {"chr1": 400_000_000, "chr2": 300_000_000, "chr3": 200_000_000, "chr4": 100_000_000}
)

# Lengths of the 22 autosomes of GRCh38 in base pairs.
HG38_AUTOSOMES: Final = MappingProxyType(
    {
        "chr1": 248_956_422,
        "chr2": 242_193_529,
        "chr3": 198_295_559,
        "chr4": 190_214_555,
        "chr5": 181_538_259,
        "chr6": 170_805_979,
        "chr7": 159_345_973,
        "chr8": 145_138_636,
        "chr9": 138_394_717,
        "chr10": 133_797_422,
        "chr11": 135_086_622,
        "chr12": 133_275_309,
        "chr13": 114_364_328,
        "chr14": 107_043_718,
        "chr15": 101_991_189,
        "chr16": 90_338_345,
        "chr17": 83_257_441,
        "chr18": 80_373_285,
        "chr19": 58_617_616,
        "chr20": 64_444_167,
        "chr21": 46_709_983,
        "chr22": 50_818_468,
    }
)


def resolve_chrom_sizes(chrom_sizes: Mapping[str, int] | str | None) -> dict[str, int]:
    """Return chromosome lengths in base pairs from a mapping, the name of a table, or None for the default.

    Raises
    ------
    ConfigError
        If a name is not ``"hg38"``, the mapping is empty or a length is no positive whole number.

    Examples
    --------
    >>> len(resolve_chrom_sizes("hg38"))
    22
    """
    if chrom_sizes is None:
        return dict(DEFAULT_CHROM_SIZES)
    if isinstance(chrom_sizes, str):
        if chrom_sizes != "hg38":
            message = f"chrom_sizes='{chrom_sizes}' is not a known table. {nearest(chrom_sizes, ['hg38'])}"
            raise ConfigError(message)
        return dict(HG38_AUTOSOMES)
    if not hasattr(chrom_sizes, "items") or not chrom_sizes:
        message = f"chrom_sizes={chrom_sizes!r} is not valid: give a mapping from names to lengths in bp, or 'hg38'."
        raise ConfigError(message)
    return {str(k): check_integer(f"chrom_sizes['{k}']", v, low=1) for k, v in chrom_sizes.items()}


def place_regions(n_fg: int, n_bg: int, *, chrom_sizes: Mapping[str, int], rng: np.random.Generator) -> pd.DataFrame:
    """Spread foreground and background regions over chromosomes, in proportion to their lengths.

    Regions are evenly spaced, never overlap and come sorted. Which of them are foreground is drawn at random, so that
    both kinds occur along every chromosome. Foreground regions are 500 bp wide, background regions 1,000 bp.

    Parameters
    ----------
    n_fg, n_bg
        Numbers of regions.
    chrom_sizes
        Lengths in base pairs.
    rng
        Source of the order of the two kinds.

    Returns
    -------
    Table with the columns chrom (categorical), start, end (0-based, half-open) and foreground, indexed by
    ``chrom:start-end``.

    Raises
    ------
    ConfigError
        If a chromosome is too short for its share of the regions.

    Examples
    --------
    >>> table = place_regions(3, 1, chrom_sizes={"chr1": 30_000, "chr2": 10_000}, rng=np.random.default_rng(0))
    >>> table["chrom"].tolist()
    ['chr1', 'chr1', 'chr1', 'chr2']
    """
    names = list(chrom_sizes)
    sizes = np.array([chrom_sizes[name] for name in names])
    counts = split_evenly(n_fg + n_bg, sizes.astype(float))
    step = sizes // np.maximum(counts, 1)
    if (short := np.flatnonzero((step < BACKGROUND_BP) & (counts > 0))).size:
        at = short[0]
        message = (
            f"Chromosome '{names[at]}' of {sizes[at]} bp cannot hold {counts[at]} regions of {BACKGROUND_BP} bp: "
            "give longer chrom_sizes or fewer regions."
        )
        raise ConfigError(message)
    foreground = np.zeros(n_fg + n_bg, dtype=bool)
    foreground[rng.permutation(n_fg + n_bg)[:n_fg]] = True
    width = np.where(foreground, FOREGROUND_BP, BACKGROUND_BP)
    chrom = np.repeat(np.arange(len(names)), counts)
    rank = np.concatenate([np.arange(count) for count in counts])
    start = rank * step[chrom] + (step[chrom] - width) // 2
    end = start + width
    return pd.DataFrame(
        {
            VAR_CHROM: pd.Categorical([names[c] for c in chrom], categories=names),
            VAR_START: start,
            VAR_END: end,
            "foreground": foreground,
        },
        index=[f"{names[c]}:{s}-{e}" for c, s, e in zip(chrom, start, end, strict=True)],
    )
