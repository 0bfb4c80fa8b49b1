"""A toy genome on which genes lie amid the peaks that drive them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import numpy as np
import pandas as pd

from epivi._keys import VAR_CHROM, VAR_END, VAR_START
from epivi.simulate._arguments import split_evenly
from epivi.simulate.linked._setting import LINK_BP

if TYPE_CHECKING:
    from collections.abc import Sequence

    from epivi.simulate.linked._setting import LinkedSetting

PEAK_BP: Final = 500
KINDS: Final[Sequence[str]] = ("linked", "type", "background")

_LINKED_SHARE = 0.9  # of the peaks, unless there are fewer links
_MARGIN_BP, _SPACING_BP, _CLOSEST_BP = 100_000, 10_000, 10
_SPAN_BP = 2 * LINK_BP - 10_000  # of the peaks of a gene, which leaves room for jitter
_CHROM_SHARES = np.array([4.0, 3.0, 2.0, 1.0])
_PLACES = 0


def lay_out(s: LinkedSetting) -> tuple[pd.DataFrame, pd.DataFrame, np.ndarray, dict[str, int]]:
    """Lay out peaks and genes on up to four chromosomes.

    Returns
    -------
    The peaks (chrom, start, end, kind), the genes (chrom, start, end, strand), the columns of the peaks of every gene,
    shape (genes, k), and the lengths of the chromosomes in bp.
    """
    k = s.peaks_per_gene
    n_linked = min(s.n_genes * k, max(k, round(_LINKED_SHARE * s.n_peaks)))
    n_chroms = min(len(_CHROM_SHARES), s.n_genes, n_linked // k)
    shares = _CHROM_SHARES[:n_chroms]
    genes_c = 1 + split_evenly(s.n_genes - n_chroms, shares)
    # at least k and at most k a gene; neighbouring genes share the peaks that are missing
    linked_c = k + split_evenly(n_linked - k * n_chroms, np.maximum(genes_c - 1, 1e-9))
    other_c = split_evenly(s.n_peaks - n_linked, shares)
    peaks, genes, links, sizes, n_before = [], [], [], {}, 0
    for c in range(n_chroms):
        name = f"chr{c + 1}"
        peak_c, gene_c, link_gk = _chromosome(s.rng(_PLACES, c), int(genes_c[c]), int(linked_c[c]), int(other_c[c]), k)
        peaks.append(peak_c.assign(chrom=name))
        genes.append(gene_c.assign(chrom=name))
        links.append(link_gk + n_before)
        sizes[name] = int(max(peak_c[VAR_END].max(), gene_c[VAR_END].max())) + _MARGIN_BP
        n_before += len(peak_c)
    peak, gene = (
        pd.concat(part, ignore_index=True).assign(chrom=lambda t: pd.Categorical(t[VAR_CHROM], list(sizes)))
        for part in (peaks, genes)
    )
    peak.index = pd.Index(region_names(peak))
    gene.index = pd.Index([f"gene_{g}" for g in range(s.n_genes)])
    columns = [VAR_CHROM, VAR_START, VAR_END]
    return peak[[*columns, "kind"]], gene[[*columns, "strand"]], np.concatenate(links), sizes


def _chromosome(
    rng: np.random.Generator, n_genes: int, n_linked: int, n_other: int, k: int
) -> tuple[pd.DataFrame, pd.DataFrame, np.ndarray]:
    """Lay out one chromosome: linked peaks on a loose grid, other peaks between them, genes amid their peaks."""
    spacing = min(_SPACING_BP, _SPAN_BP // max(k - 1, 1))
    jitter = spacing // 10
    n_slots = max(n_linked, n_other)
    slot_start = _MARGIN_BP + spacing * np.arange(n_slots) + rng.integers(-jitter, jitter + 1, n_slots)
    # gaps are log-uniform, so that many peaks lie close together; up to 0.8 spacing they cannot meet the next slot
    gap = np.exp(rng.uniform(np.log(_CLOSEST_BP), np.log(0.8 * spacing - 2 * PEAK_BP - 1), n_other)).astype(np.int64)
    other_start = slot_start[rng.permutation(n_slots)[:n_other]] + PEAK_BP + gap
    start = np.concatenate([slot_start[:n_linked], other_start])
    kind = np.concatenate([np.zeros(n_linked, dtype=int), 1 + rng.permutation(n_other) % 2])
    order = np.argsort(start)
    column = np.argsort(order)[:n_linked]
    first_g = np.arange(n_genes) * (n_linked - k) // max(n_genes - 1, 1)
    link_gk = first_g[:, None] + np.arange(k)
    centre_g = slot_start[link_gk[:, [0, -1]]].mean(axis=1).astype(np.int64) + PEAK_BP // 2
    origin_g = centre_g + rng.integers(-jitter, jitter + 1, n_genes)
    length_g = np.clip(np.exp(rng.normal(np.log(8000), 0.7, n_genes)), 500, 50_000).astype(np.int64)
    forward_g = rng.random(n_genes) < 0.5
    gene_start = np.where(forward_g, origin_g, origin_g - length_g)
    peaks = pd.DataFrame(
        {
            VAR_START: start[order],
            VAR_END: start[order] + PEAK_BP,
            "kind": pd.Categorical.from_codes(kind[order], categories=pd.Index(KINDS)),
        }
    )
    genes = pd.DataFrame(
        {VAR_START: gene_start, VAR_END: gene_start + length_g, "strand": np.where(forward_g, "+", "-")}
    )
    return peaks, genes, column[link_gk]


def link_table(peaks: pd.DataFrame, genes: pd.DataFrame, link_gk: np.ndarray) -> pd.DataFrame:
    """Return one row a link, gene by gene."""
    gene_l, peak_l = np.repeat(np.arange(len(genes)), link_gk.shape[1]), link_gk.ravel()
    origin_g = np.where(genes["strand"] == "+", genes[VAR_START], genes[VAR_END])
    centre_p = peaks[VAR_START].to_numpy() + PEAK_BP // 2
    return pd.DataFrame(
        {
            "gene": genes.index[gene_l].to_numpy(),
            "peak": peaks.index[peak_l].to_numpy(),
            "gene_index": gene_l,
            "peak_index": peak_l,
            "distance": np.abs(centre_p[peak_l] - origin_g[gene_l]),
        },
        index=[f"link_{rank}" for rank in range(len(gene_l))],
    )


def region_names(regions: pd.DataFrame) -> list[str]:
    """Return ``chrom:start-end`` of every region."""
    return [f"{c}:{s}-{e}" for c, s, e in zip(regions[VAR_CHROM], regions[VAR_START], regions[VAR_END], strict=True)]
