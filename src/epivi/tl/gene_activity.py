"""Accessibility of genes: the counts of the peaks that belong to a gene.

Legend of shapes: n cells, p peaks, g genes, m pairs of a peak and a gene.
"""

from __future__ import annotations

import logging
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np

from epivi._errors import ConfigError, DataError
from epivi._keys import MOD_ATAC, VAR_CHROM, VAR_END, VAR_N_PEAKS, VAR_START
from epivi._validate import _some, check_key, check_number
from epivi.pp.counts import _cells, _counts, _csr, _sum_columns
from epivi.pp.features import _needed_coordinates, _needed_of_table
from epivi.pp.genome.pairs import overlap_pairs

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData
    from mudata import MuData

logger = logging.getLogger(__name__)

_NAME, _STRAND = "name", "strand"
_TARGET_SUM = 1e4


def gene_activity(
    adata: AnnData | MuData,
    genes: pd.DataFrame | None = None,
    *,
    linked_key: str | None = None,
    upstream: int = 2000,
    downstream: int = 0,
    layer: str | None = None,
    normalize: bool = True,
    modality: str = MOD_ATAC,
) -> AnnData:
    """Add up, for every gene, the counts of the peaks that overlap its body and promoter or are linked to it.

    With x the counts and m_pg one where peak p belongs to gene g and else zero, the activity is x m, so that a peak
    counts once a gene, and for every gene that it belongs to.

    Parameters
    ----------
    adata
        Counts or open and closed, cells by peaks; or a MuData with them.
    genes
        Table as of `epivi.pp.read_genes`: name, chrom, start, end (bp, 0-based, half-open) and strand. Rows of one
        name are taken together. A gene without strand counts as one on "+".
    linked_key
        Column of ``adata.var`` that names the gene of each peak, if any; then positions are not used, and `genes`, if
        given, only says which genes, in which order.
    upstream, downstream
        The gene is extended by so many bp before its start of transcription, which on the strand "-" is its end, and
        behind its other end.
    layer
        Layer with the counts instead of X.
    normalize
        Scale every cell to a sum of 10,000 and take log(1 + x), as scanpy does. Otherwise the sums are returned.
    modality
        The ATAC modality of a MuData.

    Returns
    -------
    Cells by genes, X in CSR, float32 if normalised; ``obs``, ``obsm`` and ``obsp`` of the cells; ``var`` with n_peaks
    and, for a table, its other columns (of the first row of a name). Genes are in the order of the table, or sorted by
    name without one. Genes without a peak hold zeros; the log counts them.

    Raises
    ------
    ConfigError
        If neither `genes` nor `linked_key` is given, or an extension is negative.
    DataError
        If the matrix holds no counts; if peaks or genes have no valid positions, no chromosome in common, or a gene
        has no name; if the column is missing or names no gene, or none of the table.

    Examples
    --------
    >>> import numpy as np, pandas as pd
    >>> from anndata import AnnData
    >>> names = ["chr1:0-9", "chr1:70-80", "chr1:115-120"]
    >>> peaks = AnnData(np.array([[1, 0, 2], [0, 3, 0]]), var=pd.DataFrame(index=names))
    >>> genes = pd.DataFrame({"chrom": "chr1", "start": [50], "end": [100], "name": ["A"], "strand": ["-"]})
    >>> gene_activity(peaks, genes, upstream=20, normalize=False).X.toarray().tolist()
    [[2], [3]]
    """
    if genes is None and linked_key is None:
        message = "gene_activity needs to know the genes: give genes (see epivi.pp.read_genes) or linked_key."
        raise ConfigError(message)
    check_number(upstream, "upstream", low=0, integer=True)
    check_number(downstream, "downstream", low=0, integer=True)
    if type(adata).__name__ == "MuData":
        check_key(adata.mod, modality, where="mdata.mod")
        adata = adata.mod[modality]
    matrix, _ = _counts(adata, layer)
    if linked_key is not None:
        peak_m, gene_m, var = _linked(adata, linked_key, genes)
    else:
        peak_m, gene_m, var = _overlapping(adata, genes, upstream, downstream)
    return _result(adata, _sum_columns(_csr(matrix), peak_m, gene_m, len(var)), var, gene_m, normalize=normalize)


def _gene_table(genes: Any, *, positions: bool) -> pd.DataFrame:
    """Check the table of genes and return it as it is, with text for names."""
    import pandas as pd

    if not isinstance(genes, pd.DataFrame):
        message = f"genes is a {type(genes).__name__}, a pandas DataFrame as of epivi.pp.read_genes is needed."
        raise DataError(message)
    for key in (_NAME, *((VAR_CHROM, VAR_START, VAR_END) if positions else ())):
        check_key(genes, key, where="genes")
    if genes.empty:
        message = "genes has no rows. Give at least one gene."
        raise DataError(message)
    missing = genes[_NAME].isna() | (genes[_NAME].astype(str).str.strip() == "")
    if missing.any():
        message = f"genes['{_NAME}'] is empty in {int(missing.sum())} rows, first in {genes.index[missing][0]!r}. "
        message += "Name or remove these genes."
        raise DataError(message)
    return genes.assign(**{_NAME: genes[_NAME].astype(str)})


def _gene_var(genes: pd.DataFrame) -> pd.DataFrame:
    """Return one row a gene, the first of its name, with the names as index."""
    import pandas as pd

    first = genes.drop_duplicates(_NAME)
    return first.drop(columns=_NAME).set_axis(pd.Index(first[_NAME].to_numpy(dtype=object), dtype=str), axis=0)


def _overlapping(
    adata: AnnData, genes: Any, upstream: int, downstream: int
) -> tuple[np.ndarray, np.ndarray, pd.DataFrame]:
    """Return the pairs of peak and gene by position, each once, and the genes."""
    import pandas as pd

    genes = _gene_table(genes, positions=True)
    peaks = _needed_coordinates(adata)
    bodies = _extended(genes, upstream, downstream)
    ours, theirs = set(peaks[VAR_CHROM]), set(bodies[VAR_CHROM])
    if not ours & theirs:
        message = (
            f"No chromosome has the same name among the peaks ({_some(sorted(ours))}) and the genes "
            f"({_some(sorted(theirs))}). Check the assemblies, and the prefix 'chr' in both."
        )
        raise DataError(message)
    pairs = overlap_pairs(peaks, bodies)
    code_r, names = pd.factorize(genes[_NAME].to_numpy(dtype=object))
    # a peak in two rows of a gene belongs to it once
    both = np.unique(pairs.first_m * len(names) + code_r[pairs.second_m])
    return both // len(names), both % len(names), _gene_var(genes)


def _extended(genes: pd.DataFrame, upstream: int, downstream: int) -> pd.DataFrame:
    """Return the genes from `upstream` bp before their start of transcription to `downstream` bp behind their end."""
    try:
        bodies = _needed_of_table(genes.set_axis(genes[_NAME].to_numpy(dtype=object), axis=0), where="genes")
    except DataError as error:
        message = f"The table of genes cannot be used. {error}"
        raise DataError(message) from error
    strand = np.full(len(genes), ".", dtype=object)
    if _STRAND in genes:
        strand = genes[_STRAND].astype(object).fillna(".").to_numpy(dtype=object)
    unknown = ~np.isin(strand.astype(str), ["+", "-", "."])
    if unknown.any():
        at = int(np.flatnonzero(unknown)[0])
        message = f"genes['{_STRAND}'] of '{bodies.index[at]}' is {strand[at]!r}: + or - or . is needed. Correct it."
        raise DataError(message)
    if (n_without := int((strand == ".").sum())) and upstream != downstream:
        logger.warning("%d genes have no strand and are taken to lie on +.", n_without)
    backward = strand == "-"
    bodies[VAR_START] = np.maximum(bodies[VAR_START] - np.where(backward, downstream, upstream), 0)
    bodies[VAR_END] += np.where(backward, upstream, downstream)
    return bodies


def _linked(adata: AnnData, key: str, genes: pd.DataFrame | None) -> tuple[np.ndarray, np.ndarray, pd.DataFrame]:
    """Return the pairs of peak and gene that the column names, and the genes."""
    import pandas as pd

    check_key(adata.var, key, where="adata.var")
    column = adata.var[key].astype(object)
    named = (column.notna() & (column.astype(str).str.strip() != "")).to_numpy()
    if not named.any():
        message = f"adata.var['{key}'] names no gene for any peak. Choose another column, or give genes by position."
        raise DataError(message)
    peak_m = np.flatnonzero(named)
    name_m = column.to_numpy()[named].astype(str)
    if genes is None:
        var = pd.DataFrame(index=pd.Index(np.unique(name_m).astype(object), dtype=str))
    else:
        var = _gene_var(_gene_table(genes, positions=False))
    gene_m = var.index.get_indexer(name_m)
    found_m = gene_m >= 0
    if not found_m.any():
        message = (
            f"None of the genes that adata.var['{key}'] names ({_some(np.unique(name_m))}) is among the genes "
            f"({_some(var.index)}). Use one kind of names, symbols or ids, in both."
        )
        raise DataError(message)
    if not found_m.all():
        logger.info("%d peaks are linked to genes that are not asked for.", int((~found_m).sum()))
    return peak_m[found_m], gene_m[found_m], var


def _result(adata: AnnData, x_ng: Any, var: pd.DataFrame, gene_m: np.ndarray, *, normalize: bool) -> AnnData:
    """Put the sums into an AnnData and normalise them."""
    from anndata import AnnData

    n_peaks_g = np.bincount(gene_m, minlength=len(var))
    if n_without := int((n_peaks_g == 0).sum()):
        logger.info("%d of %d genes have no peak: their activity is zero in all cells.", n_without, len(var))
    result = AnnData(x_ng, var=var.assign(**{VAR_N_PEAKS: n_peaks_g}), **_cells(adata))
    if normalize:
        import scanpy as sc

        result.X = x_ng.astype(np.float32)
        with warnings.catch_warnings():
            # a cell may have no open peak at any gene; its row stays zero
            warnings.filterwarnings("ignore", message="Some cells have zero counts")
            sc.pp.normalize_total(result, target_sum=_TARGET_SUM)
        sc.pp.log1p(result)
    return result
