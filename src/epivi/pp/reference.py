"""Embeddings made before any training: the RNA reference (PCA) and the ATAC baseline (LSI)."""

from __future__ import annotations

import logging
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp

from epivi._errors import ConfigError, DataError
from epivi._keys import MOD_RNA, OBSM_LSI, OBSM_PCA
from epivi._validate import check_anndata, check_categorical, check_key, check_number
from epivi.pp.counts import _counts, _writable

if TYPE_CHECKING:
    from anndata import AnnData
    from mudata import MuData

logger = logging.getLogger(__name__)

_LSI_SCALE = 1e4


def rna_reference(  # noqa: PLR0913 - one choice of the pipeline each
    adata_or_mdata: AnnData | MuData,
    *,
    modality: str = MOD_RNA,
    layer: str | None = None,
    n_comps: int = 50,
    n_top_genes: int = 2000,
    batch_key: str | None = None,
    key_added: str = OBSM_PCA,
    seed: int = 0,
    copy: bool = False,
) -> AnnData | MuData | None:
    """Compute a PCA of RNA counts with scanpy, to be used as the reference of SAILERX.

    Counts are scaled to the median depth, log(1 + x)-transformed, reduced to highly variable genes (flavour "seurat",
    within `batch_key` if given) and projected on principal components. All this happens on a temporary copy: X and
    the layers stay as they are. Any other embedding in ``obsm`` serves as well, and where batches differ a corrected
    one serves better: PCA does not remove batch effects.

    Parameters
    ----------
    adata_or_mdata
        RNA counts, or a MuData with them.
    modality
        The RNA modality of a MuData.
    layer
        Layer with the counts instead of X.
    n_comps
        Components r; at most min(cells, genes used) - 1 are computed, a log message says if fewer.
    n_top_genes
        Highly variable genes; all expressed genes are used if there are not more.
    batch_key
        Column of the RNA ``obs``: variable genes are chosen within batches and merged.
    key_added
        The embedding (n cells, r), float32, goes to ``obsm[key_added]`` of the RNA AnnData. A cell without counts gets
        the finite position of an empty profile.
    seed
        Seed of the decomposition.
    copy
        Return a new object and leave the argument as it is.

    Raises
    ------
    ConfigError
        If a number is out of range.
    DataError
        If the modality, layer or batch column is missing, the matrix holds no counts, or fewer than two genes are
        expressed.

    Examples
    --------
    >>> import numpy as np
    >>> from anndata import AnnData
    >>> adata = AnnData(np.random.default_rng(0).poisson(1.0, (20, 8)).astype("float32"))
    >>> rna_reference(adata, n_comps=3)
    >>> adata.obsm["X_pca"].shape
    (20, 3)
    """
    check_number(n_comps, "n_comps", low=1, integer=True)
    check_number(n_top_genes, "n_top_genes", low=2, integer=True)
    check_number(seed, "seed", low=0, high=2**32 - 1, integer=True)
    target: Any = adata_or_mdata
    if hasattr(target, "mod"):
        check_key(target.mod, modality, where="mdata.mod")
        target = target.copy() if copy else target
        adata = target.mod[modality]
    else:
        check_anndata(target)
        target = adata = _writable(target, copy=True) if copy else target
    matrix, n_cells_g = _in_memory(adata, layer)
    genes = np.flatnonzero(n_cells_g)
    if genes.size < 2:
        message = f"{genes.size} gene is expressed in any cell, at least two are needed for a PCA."
        raise DataError(message)
    if batch_key is not None:
        check_categorical(adata.obs, batch_key, where="adata.obs")
    adata.obsm[key_added] = _pca(
        matrix[:, genes],
        batches=None if batch_key is None else adata.obs[batch_key].astype(str).to_numpy(),
        n_comps=n_comps,
        n_top_genes=n_top_genes,
        seed=seed,
    )
    return target if copy else None


def _pca(counts_ng: Any, *, batches: np.ndarray | None, n_comps: int, n_top_genes: int, seed: int) -> np.ndarray:
    """Normalise, select genes and project, all with scanpy on its own AnnData."""
    import pandas as pd
    import scanpy as sc
    from anndata import AnnData

    work = AnnData(counts_ng.astype(np.float32))
    if batches is not None:
        work.obs["batch"] = pd.Categorical(batches)
    with warnings.catch_warnings():
        # cells without counts are valid here; the warning would only repeat what set-up reports
        warnings.filterwarnings("ignore", message="Some cells have zero counts")
        sc.pp.normalize_total(work)
    sc.pp.log1p(work)
    if work.n_vars > n_top_genes:
        sc.pp.highly_variable_genes(
            work, n_top_genes=n_top_genes, flavor="seurat", batch_key=None if batches is None else "batch"
        )
        work = work[:, work.var["highly_variable"].to_numpy()].copy()
    n_used = _cap(n_comps, work.shape, "n_comps")
    sc.pp.pca(work, n_comps=n_used, random_state=seed, mask_var=None)
    return np.asarray(work.obsm["X_pca"], dtype=np.float32)


def lsi(
    adata: AnnData,
    *,
    layer: str | None = None,
    n_comps: int = 10,
    drop_first: bool = False,
    key_added: str = OBSM_LSI,
    seed: int = 0,
    binarize: bool = True,
    copy: bool = False,
) -> AnnData | None:
    """Compute latent semantic indexing of accessibility: TF-IDF, then a truncated singular value decomposition.

    With n cells, t_ig the share of peak g in the counts of cell i, and d_g the sum of peak g over cells (the number
    of cells where it is open, if binarised), the matrix log(1 + 1e4 t_ig n / d_g) = U S V^T is decomposed and the
    embedding is U S. This is the baseline of the SAILER comparison. Its first component mostly follows read depth.

    Parameters
    ----------
    adata
        Counts, cells by peaks.
    layer
        Layer with the counts instead of X.
    n_comps
        Components kept; at most min(cells, peaks) - 1 are computed, a log message says if fewer.
    drop_first
        Leave out the first component; `n_comps` components from the second on are kept.
    key_added
        The embedding (n cells, n_comps), float32, goes to ``adata.obsm[key_added]``. A cell without open peaks has
        a row of zeros.
    seed
        Seed of the start vector of the decomposition; the sign of a component is fixed by its largest loading.
    binarize
        Use open or closed instead of the counts.
    copy
        Return a new object and leave `adata` as it is.

    Raises
    ------
    ConfigError
        If a number is out of range.
    DataError
        If the layer is missing, the matrix holds no counts, or it is too small for the components asked for.

    Notes
    -----
    TF-IDF is done by ``muon.atac.pp.tfidf`` on a temporary copy without stored zeros and with the divisions by zero
    of empty cells and peaks silenced: they produce no entry. ``muon.atac.tl.lsi`` is not used for the decomposition:
    it takes no seed, keeps no singular values in the embedding (it returns U, standardised by default), fails when
    as many components as cells or peaks are asked for, and writes to fixed keys. ``sklearn.decomposition.TruncatedSVD``
    does it instead; where both apply, the tests hold them equal.

    Examples
    --------
    >>> import numpy as np
    >>> from anndata import AnnData
    >>> adata = AnnData(np.random.default_rng(0).poisson(0.5, (30, 20)))
    >>> lsi(adata, n_comps=5)
    >>> adata.obsm["X_lsi"].shape
    (30, 5)
    """
    check_number(n_comps, "n_comps", low=1, integer=True)
    check_number(seed, "seed", low=0, high=2**32 - 1, integer=True)
    if not isinstance(drop_first, bool) or not isinstance(binarize, bool):
        message = f"drop_first={drop_first!r} and binarize={binarize!r} must be True or False."
        raise ConfigError(message)
    check_anndata(adata)
    target = _writable(adata, copy=True) if copy else adata
    matrix, _ = _in_memory(target, layer)
    tfidf_np = _tfidf(matrix, binarize=binarize)
    n_skip = int(drop_first)
    n_used = _cap(n_comps + n_skip, tfidf_np.shape, "n_comps")
    if n_used <= n_skip:
        message = f"A matrix of shape {tfidf_np.shape} has one component only; nothing is left with drop_first=True."
        raise DataError(message)
    target.obsm[key_added] = _svd(tfidf_np, n_used, seed)[:, n_skip:]
    return target if copy else None


def peak_centroids(
    adata: AnnData,
    *,
    layer: str | None = None,
    n_comps: int = 32,
    batch_n: np.ndarray | None = None,
    seed: int = 0,
) -> np.ndarray:
    """Return where each peak lies among the cells: the mean LSI coordinates of the cells in which it is open.

    Coordinates are standardised over the cells first, and the first component, which follows depth, is left out. With
    batches they are centred within each: a peak that is open in one batch alone then lies near the origin.

    Parameters
    ----------
    adata
        Counts, cells by peaks.
    layer
        Layer with the counts instead of X.
    n_comps
        Most components.
    batch_n
        Batch of each cell; ``None`` for one batch.
    seed
        Seed of the start vector of the decomposition.

    Returns
    -------
    Shape (peaks, components), float32, scaled to a standard deviation of 1 over all; zeros for peaks never open.

    Raises
    ------
    DataError
        As :func:`lsi`.

    Examples
    --------
    >>> import numpy as np
    >>> from anndata import AnnData
    >>> adata = AnnData(np.random.default_rng(0).poisson(0.5, (30, 20)))
    >>> peak_centroids(adata, n_comps=4).shape
    (20, 4)
    """
    matrix, _ = _in_memory(adata, layer)
    open_np = sp.csr_array(matrix, copy=True)
    open_np.sum_duplicates()
    open_np.data = (open_np.data > 0).astype(np.float32)
    n_used = _cap(n_comps + 1, open_np.shape, "n_comps")
    z_nd = _svd(_tfidf(open_np, binarize=True), n_used, seed)[:, 1:]
    for batch in [None] if batch_n is None else np.unique(batch_n):
        rows = slice(None) if batch is None else batch_n == batch
        z_nd[rows] -= z_nd[rows].mean(0)
    z_nd /= np.maximum(z_nd.std(0), np.finfo(np.float32).tiny)
    n_open_p = np.asarray(open_np.sum(axis=0)).ravel()
    centroid_pd = (open_np.T @ z_nd) / np.maximum(n_open_p, 1.0)[:, None]
    return (centroid_pd / max(float(centroid_pd.std()), 1e-12)).astype(np.float32)


def _tfidf(counts_np: Any, *, binarize: bool) -> sp.csr_array:
    """Return log(1 + 1e4 tf idf) by muon, which needs a matrix without stored zeros to stay finite."""
    from anndata import AnnData

    with warnings.catch_warnings():
        # importing muon imports umap, which warns that an optional package is missing
        warnings.simplefilter("ignore", ImportWarning)
        from muon.atac.pp import tfidf

    work_np = sp.csr_matrix(counts_np, dtype=np.float32, copy=True)
    work_np.sum_duplicates()
    work_np.eliminate_zeros()
    if binarize:
        work_np.data[:] = 1.0
    with np.errstate(divide="ignore", invalid="ignore"):
        result = tfidf(
            AnnData(work_np), log_tf=False, log_idf=False, log_tfidf=True, scale_factor=_LSI_SCALE, inplace=False
        )
    return sp.csr_array(result)


def _svd(matrix_np: sp.csr_array, n_comps: int, seed: int) -> np.ndarray:
    """Return U S of the largest singular values, float32."""
    from sklearn.decomposition import TruncatedSVD

    # the randomised solver is only approximate; in float64 ARPACK converges to the same digits from any start
    solver = TruncatedSVD(n_comps, algorithm="arpack", random_state=seed)
    return np.asarray(solver.fit_transform(matrix_np.astype(np.float64)), dtype=np.float32)


def _in_memory(adata: AnnData, layer: str | None) -> tuple[Any, np.ndarray]:
    """Check the counts; return them in memory and the number of cells in which each feature is open."""
    matrix, summary = _counts(adata, layer)
    if not isinstance(matrix, np.ndarray) and not sp.issparse(matrix):  # on disk
        matrix = matrix.to_memory() if hasattr(matrix, "to_memory") else np.asarray(matrix[:])
    # one sparse type for all: scanpy compiles its kernels once for each
    return (sp.csr_matrix(matrix) if sp.issparse(matrix) else np.asarray(matrix)), summary.col_open


def _cap(n_comps: int, shape: tuple[int, int], name: str) -> int:
    """Return the number of components that a matrix allows."""
    most = min(shape) - 1
    if most < 1:
        message = f"A matrix of shape {tuple(shape)} has no component to compute. At least two features are needed."
        raise DataError(message)
    if n_comps > most:
        logger.warning("%s: %d components were asked for, a matrix of shape %s allows %d.", name, n_comps, shape, most)
    return min(n_comps, most)
