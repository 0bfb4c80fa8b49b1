"""Count matrices of an AnnData: reads to fragments, genes that occur twice, and the access shared by this room."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp

from epivi._errors import ConfigError, DataError
from epivi._validate import check_anndata, check_counts, check_key

if TYPE_CHECKING:
    from anndata import AnnData

    from epivi._validate import CountSummary

logger = logging.getLogger(__name__)

# ENSG00000141510.18 and its like in other species; names such as RP11-34L1.2 end in digits that belong to them
_ENSEMBL_VERSION = r"^(ENS[A-Z]{0,6}[GT][0-9]{11})\.[0-9]+"


def reads_to_fragments(
    adata: AnnData,
    *,
    layer: str | None = None,
    key_added: str = "fragments",
    force: bool = False,
    copy: bool = False,
) -> AnnData | None:
    """Estimate fragment counts from read counts and store them as a layer: fragments = (reads + 1) // 2.

    A paired-end fragment has two ends, each counted as a read, so that even counts are in excess (Martens et al.,
    Modeling fragment counts improves single-cell ATAC-seq analysis, Nature Methods 2023, PoissonVI). Counts that
    have no such excess already are fragments, binary, or come from another rule of counting: if ones are more
    frequent than twos the matrix is refused, unless `force` is set.

    Parameters
    ----------
    adata
        Read counts, cells by peaks.
    layer
        Layer with the reads instead of X.
    key_added
        Layer for the result; same sparsity, container and dtype as the reads.
    force
        Convert even if the matrix does not look like reads.
    copy
        Return a new object and leave `adata` as it is.

    Raises
    ------
    ConfigError
        If `key_added` is the layer with the reads.
    DataError
        If the matrix holds no counts or has more ones than twos; if `adata` is on disk and `copy` is not set.

    Examples
    --------
    >>> import numpy as np
    >>> from anndata import AnnData
    >>> adata = AnnData(np.array([[2, 0, 4], [2, 3, 0]]))
    >>> reads_to_fragments(adata)
    >>> adata.layers["fragments"].tolist()
    [[1, 0, 2], [1, 2, 0]]
    """
    if key_added == layer:
        message = f"key_added and layer are both '{layer}': the reads would be lost. Choose another key_added."
        raise ConfigError(message)
    _counts(adata, layer)
    target = _writable(adata, copy=copy)
    reads: Any = target.X if layer is None else target.layers[layer]
    if sp.issparse(reads):
        reads = reads.copy()
        reads.sum_duplicates()
        values: Any = reads.data
    else:
        values = np.asarray(reads)
    n_ones, n_twos = int((values == 1).sum()), int((values == 2).sum())
    if n_ones > n_twos and not force:
        message = (
            f"{_name(layer)} does not look like reads: {n_ones} counts are 1 and {n_twos} are 2, while reads come in "
            "pairs. If these are fragments, use them as they are; to convert all the same, set force=True."
        )
        raise DataError(message)
    # (x + 1) // 2, written so that the largest value of a narrow integer dtype does not overflow
    half = values.copy() if values.dtype.kind == "b" else (values // 2 + values % 2).astype(values.dtype)
    if sp.issparse(reads):
        reads.data = half
    target.layers[key_added] = reads if sp.issparse(reads) else half
    return target if copy else None


def collapse_genes(
    adata: AnnData, gene_key: str | None = None, *, layer: str | None = None, strip_versions: bool = True
) -> AnnData:
    """Add up the counts of genes that occur more than once, so that every name stands for one column.

    Parameters
    ----------
    adata
        Counts, cells by genes; names may occur twice.
    gene_key
        Column of ``adata.var`` with the names, instead of ``adata.var_names``.
    layer
        Layer with the counts instead of X.
    strip_versions
        Take Ensembl names without their version: ENSG00000141510.18 is ENSG00000141510.

    Returns
    -------
    A new AnnData, cells by different names, in the order in which these first occur. ``var`` and ``varm`` are those of
    the first gene of each name; the names, without versions, are ``var_names`` or, with `gene_key`, that column. X and
    the layers are CSR; where genes were added up, those which hold no counts are left out, since sums of logarithms
    mean nothing.

    Raises
    ------
    DataError
        If X or the layer holds no counts, the column or the layer is missing, a gene has no name, or var_names occur
        twice although `gene_key` tells their genes apart.

    Examples
    --------
    >>> import numpy as np, pandas as pd
    >>> from anndata import AnnData
    >>> names = ["ENSG00000141510.17", "ENSG00000012048.2", "ENSG00000141510.18"]
    >>> genes = collapse_genes(AnnData(np.array([[1, 2, 4], [0, 5, 3]]), var=pd.DataFrame(index=names)))
    >>> genes.var_names.tolist(), genes.X.toarray().tolist()
    (['ENSG00000141510', 'ENSG00000012048'], [[5, 2], [3, 5]])
    """
    import pandas as pd
    from anndata import AnnData

    if not isinstance(adata, AnnData):
        check_anndata(adata)  # says what it is instead
    _counts(adata, layer, unique_names=False)
    names_g = _gene_names(adata, gene_key, strip_versions=strip_versions)
    code_g, found = pd.factorize(names_g)
    is_first_g = ~pd.Index(names_g).duplicated()
    index = pd.Index(found if gene_key is None else adata.var_names[is_first_g])
    if not index.is_unique:
        message = (
            f"adata.var_names are not unique, '{index[index.duplicated()][0]}' is the name of several genes of "
            f"adata.var['{gene_key}']. Call adata.var_names_make_unique(), or leave gene_key out."
        )
        raise DataError(message)
    n_added = len(names_g) - len(found)
    var = adata.var.loc[is_first_g].set_axis(index.astype(str), axis=0)
    if gene_key is not None:
        var[gene_key] = np.asarray(found, dtype=object)
    matrices: dict[str | None, Any] = {None: adata.X} if adata.X is not None else {}
    matrices |= {key: value for key, value in adata.layers.items() if isinstance(key, str)}
    done: dict[str | None, sp.csr_matrix] = {}
    for key, matrix in matrices.items():
        if n_added and key != layer and not _holds_counts(matrix):
            logger.warning("%s holds no counts and is left out: it cannot be added up.", _name(key))
            continue
        done[key] = _sum_columns(_csr(matrix), np.arange(len(names_g)), code_g, len(found))
    varm = {key: value[is_first_g] for key, value in adata.varm.items()}
    logger.info("%d columns of %d genes became %d.", len(names_g), len(found), len(found))
    layers = {key: value for key, value in done.items() if key is not None}
    return AnnData(done.get(None), var=var, varm=varm, layers=layers, uns=dict(adata.uns), **_cells(adata))


def _gene_names(adata: AnnData, gene_key: str | None, *, strip_versions: bool) -> np.ndarray:
    """Return the name of each column, none of them missing."""
    import pandas as pd

    if gene_key is not None:
        check_key(adata.var, gene_key, where="adata.var")
    where = "adata.var_names" if gene_key is None else f"adata.var['{gene_key}']"
    column = adata.var_names.to_series() if gene_key is None else adata.var[gene_key]
    names = pd.Series(column.to_numpy(dtype=object))
    missing = names.isna() | (names.astype(str).str.strip() == "")
    if missing.any():
        at = int(np.flatnonzero(missing)[0])
        message = (
            f"{where}: {int(missing.sum())} genes have no name, the first is column {at} ('{adata.var_names[at]}'). "
            "Name or remove them."
        )
        raise DataError(message)
    names = names.astype(str)
    if strip_versions:
        names = names.str.replace(_ENSEMBL_VERSION, r"\1", regex=True)
    return names.to_numpy(dtype=object)


def _name(layer: str | None) -> str:
    return "adata.X" if layer is None else f"adata.layers['{layer}']"


def _counts(adata: AnnData, layer: str | None, *, unique_names: bool = True) -> tuple[Any, CountSummary]:
    """Check the counts; return the matrix as it is stored, and its summary."""
    if unique_names:
        check_anndata(adata)
    layers: Any = adata.layers
    if layer is not None:
        check_key(layers, layer, where="adata.layers")
    others = {key: value for key, value in layers.items() if isinstance(key, str) and key != layer}
    matrix = adata.X if layer is None else layers[layer]
    return matrix, check_counts(matrix, where=_name(layer), obs_names=adata.obs_names, alternatives=others)


def _writable(adata: AnnData, *, copy: bool) -> AnnData:
    """Return the object to change: itself, or a copy in memory."""
    if copy:
        return adata.to_memory() if adata.isbacked else adata.copy()
    if adata.isbacked:
        message = "adata is on disk (backed) and cannot be changed in place. Set copy=True, or call adata.to_memory()."
        raise DataError(message)
    return adata


def _subset(adata: AnnData, index: Any, *, axis: int, copy: bool) -> AnnData | None:
    """Keep or reorder cells (axis 0) or features (axis 1) by mask or position, in place or as a copy in memory."""
    if copy:
        part = adata[index] if axis == 0 else adata[:, index]
        return part.to_memory() if adata.isbacked else part.copy()
    _writable(adata, copy=False)
    if axis == 0:
        adata._inplace_subset_obs(index)
    else:
        adata._inplace_subset_var(index)
    return None


def _holds_counts(matrix: Any) -> bool:
    """Tell whether a matrix passes `check_counts`."""
    try:
        check_counts(matrix, where="matrix")
    except DataError:
        return False
    return True


def _csr(matrix: Any) -> sp.csr_matrix:
    """Return a matrix in memory as CSR with sorted indices, without duplicates and stored zeros; the input stays."""
    if hasattr(matrix, "to_memory"):  # sparse, on disk
        matrix = matrix.to_memory()
    if not sp.issparse(matrix):
        matrix = np.asarray(matrix)
        if matrix.dtype == np.float16:  # which scipy does not know
            matrix = matrix.astype(np.float32)
    csr = sp.csr_matrix(matrix)
    if not csr.has_canonical_format or not csr.data.all():
        csr = csr.copy()
        csr.sum_duplicates()
        csr.eliminate_zeros()
    return csr


def _sum_columns(x_np: sp.csr_matrix, from_m: np.ndarray, to_m: np.ndarray, n_columns: int) -> sp.csr_matrix:
    """Add column from_m[j] to column to_m[j] of the result (n, n_columns), for each of the m different pairs."""
    # a Boolean or a narrow integer cannot hold the sum
    dtype = x_np.dtype if x_np.dtype.kind == "f" else np.promote_types(x_np.dtype, np.int32)
    ones_m = np.ones(len(from_m), dtype=dtype)
    target_pq = sp.csr_matrix((ones_m, (from_m, to_m)), shape=(x_np.shape[1], n_columns))
    result = sp.csr_matrix(x_np.astype(dtype) @ target_pq)
    result.sort_indices()
    return result


def _cells(adata: AnnData) -> dict[str, Any]:
    """Return copies of what belongs to the cells alone, as arguments of a new AnnData."""
    obsm = {key: value.copy() for key, value in adata.obsm.items()}
    obsp = {key: value.copy() for key, value in adata.obsp.items()}
    return {"obs": adata.obs.copy(), "obsm": obsm, "obsp": obsp}
