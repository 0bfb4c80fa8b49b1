"""The latent of windows, for clusters and pictures of the genome."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from epivi._keys import VAR_CHROM, VAR_END, VAR_START
from epivi.models.candi.outputs.prediction import Predictor
from epivi.models.candi.outputs.request import RequestMixin, bin_names

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData


class LatentMixin(RequestMixin):
    """Latent representation."""

    def get_latent_representation(
        self,
        region: Any = None,
        biosamples: Sequence[str] | str | None = None,
        *,
        positions: bool = False,
        adata: AnnData | None = None,
        batch_size: int = 32,
    ) -> AnnData:
        """Return the latent of windows, from all assays that were measured.

        Parameters
        ----------
        positions
            Return every latent position, of 2^n bins; otherwise its mean over the window.
        region, biosamples, adata, batch_size
            As in :meth:`impute`.

        Returns
        -------
        AnnData, obs = (biosample, chrom, start, end) of each window or position, X the latent, for neighbours, Leiden
        clusters and UMAP of the genome.
        """
        import anndata

        self._check_if_trained(warn=True)
        adata, dataset = self._opened(adata)
        rows = self._rows(adata, biosamples)
        predictor = Predictor(self.module, dataset, batch_size=batch_size)
        shown_a = np.ones(len(self.assay_names), dtype=np.float32)
        values, frames = [], []
        width = dataset.experiments.runs.bin_size_bp
        for row in rows:
            for part, whole in self._parts(dataset, region):
                for starts, crop_from, crop_to in predictor.windows(whole, part.first, part.stop):
                    batch = predictor.read(row, starts)
                    z_btd = predictor.encode(batch, shown_a)["z"].float().cpu().numpy()
                    low, high = self._positions(starts, crop_from, crop_to, z_btd.shape[1], positions=positions)
                    values.append(_pooled(z_btd, starts, low, high, self.config.scale))
                    at = whole.start_bp + (np.stack([low, high], axis=1) - whole.first) * width
                    frame = pd.DataFrame(
                        {"biosample": adata.obs_names[row], VAR_CHROM: whole.chrom}, index=range(len(at))
                    )
                    frames.append(frame.assign(**{VAR_START: at[:, 0], VAR_END: at[:, 1]}))
        obs = pd.concat(frames, ignore_index=True)
        obs.index = obs["biosample"] + "|" + bin_names(obs)
        return anndata.AnnData(np.concatenate(values), obs=obs)

    def _positions(
        self, starts: np.ndarray, crop_from: np.ndarray, crop_to: np.ndarray, n_positions: int, *, positions: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the first bin and the bin after the last of each result."""
        if not positions:
            return crop_from, crop_to
        scale = self.config.scale
        low_wt = starts[:, None] + scale * np.arange(n_positions)
        middle_wt = low_wt + scale // 2
        keep = (middle_wt >= crop_from[:, None]) & (middle_wt < crop_to[:, None])
        return low_wt[keep], low_wt[keep] + scale


def _pooled(z_btd: np.ndarray, starts: np.ndarray, low: np.ndarray, high: np.ndarray, scale: int) -> np.ndarray:
    """Return the mean of the latent positions of each result, shape (results, d)."""
    window = np.searchsorted(starts, low, side="right") - 1
    first = np.minimum((low - starts[window]) // scale, z_btd.shape[1] - 1)
    stop = np.clip(-((starts[window] - high) // scale), first + 1, z_btd.shape[1])
    return np.stack([z_btd[w, a:b].mean(axis=0) for w, a, b in zip(window, first, stop, strict=True)])
