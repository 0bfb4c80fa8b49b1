"""The RNA half of a simulated multiome: centres of types, embeddings, depths and counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
from scipy import sparse

from epivi.simulate._arguments import stream

if TYPE_CHECKING:
    from collections.abc import Sequence

# Correlation of the logarithms of RNA and ATAC depth within a batch.
DEPTH_CORRELATION: Final = 0.5

_STREAM = 2
_CENTRES, _EMBEDDINGS, _DEPTHS, _COUNTS, _SHUFFLE, _LOADINGS = range(6)
_ROWS = 1024  # rows of counts drawn at once, to bound the dense block


@dataclass(frozen=True)
class RnaSimulator:
    """Draw the RNA of multiome cells; every part and batch has a random stream of its own.

    Examples
    --------
    >>> rna = RnaSimulator(
    ...     dims=3, noise=0.5, subtype_sd=0.5, median=100, log_sd=0.5, n_genes=4, sees_subtypes=True, seed=0
    ... )
    >>> rna.centres([2, 1]).shape
    (3, 3)
    """

    dims: int
    noise: float
    subtype_sd: float
    median: float
    log_sd: float
    n_genes: int
    sees_subtypes: bool
    seed: int

    def centres(self, subtypes: Sequence[int]) -> np.ndarray:
        """Return the centre of every sub-type, type by type, shape (sub-types, dims)."""
        centres = []
        for rank, n in enumerate(subtypes):
            centre_d = self._stream(_CENTRES, rank).normal(size=self.dims)
            for k in range(n):
                shift_d = self._stream(_CENTRES, rank, k).normal(0.0, self.subtype_sd, self.dims)
                centres.append(centre_d + shift_d if self.sees_subtypes else centre_d)
        return np.array(centres)

    def loadings(self) -> np.ndarray:
        """Return B, shape (dims, genes), scaled so that the logit of a gene has a variance of about one."""
        return self._stream(_LOADINGS).normal(0.0, 1.0 / np.sqrt(self.dims), (self.dims, self.n_genes))

    def embeddings(self, centre_nd: np.ndarray, batch_n: np.ndarray, *, shuffle: bool) -> np.ndarray:
        """Draw embeddings about the centres of the cells, shape (cells, dims), and permute them if asked to."""
        r_nd = np.empty_like(centre_nd)
        for batch in np.unique(batch_n):
            rows = batch_n == batch
            noise_bd = self._stream(_EMBEDDINGS, int(batch)).normal(0.0, self.noise, (int(rows.sum()), self.dims))
            r_nd[rows] = centre_nd[rows] + noise_bd
        return r_nd[self._stream(_SHUFFLE).permutation(len(r_nd))] if shuffle else r_nd

    def depths(self, atac_depth_n: np.ndarray, batch_n: np.ndarray) -> np.ndarray:
        """Draw RNA depths, log-normal, with correlation 0.5 to the log of the ATAC depth within a batch."""
        log_n = np.empty(len(batch_n))
        for batch in np.unique(batch_n):
            rows = batch_n == batch
            atac_b = np.log1p(atac_depth_n[rows])
            spread = atac_b.std()
            # in a batch of one cell, or of equal depths, there is nothing to correlate with
            standard_b = (atac_b - atac_b.mean()) / (spread if spread > 0 else 1.0)
            own_b = self._stream(_DEPTHS, int(batch)).normal(size=len(atac_b))
            log_n[rows] = DEPTH_CORRELATION * standard_b + np.sqrt(1 - DEPTH_CORRELATION**2) * own_b
        return np.maximum(np.rint(self.median * np.exp(self.log_sd * log_n)), 1).astype(np.int64)

    def counts(self, r_nd: np.ndarray, depth_n: np.ndarray, batch_n: np.ndarray) -> sparse.csr_matrix:
        """Draw Poisson(depth softmax(r B)); the cells of a batch lie together."""
        from scipy.special import softmax

        loadings_dg = self.loadings()
        blocks = []
        for batch in np.unique(batch_n):
            rng = self._stream(_COUNTS, int(batch))
            rows = np.flatnonzero(batch_n == batch)
            for at in (rows[first : first + _ROWS] for first in range(0, len(rows), _ROWS)):
                mean_bg = depth_n[at, None] * softmax(r_nd[at] @ loadings_dg, axis=1)
                blocks.append(sparse.csr_matrix(rng.poisson(mean_bg).astype(np.int32)))
        return sparse.csr_matrix(sparse.vstack(blocks))

    def _stream(self, *key: int) -> np.random.Generator:
        return stream(self.seed, _STREAM, *key)
