"""The latent of windows, for clusters and pictures of the genome."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from epivi._errors import ConfigError
from epivi._keys import VAR_CHROM, VAR_END, VAR_START
from epivi.models.candi.outputs.prediction import Predictor
from epivi.models.candi.outputs.request import RequestMixin
from epivi.pp import peak_names

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
            Return every latent position, of 2^n bins, with its middle in the region; otherwise their mean over the
            part of each window that is kept, see :meth:`impute`.
        region, biosamples, adata, batch_size
            As in :meth:`impute`.

        Returns
        -------
        AnnData, obs = (biosample, chrom, start, end) of each window or position, X the latent, for neighbours, Leiden
        clusters and UMAP of the genome.

        Raises
        ------
        ConfigError
            If a name or an argument is not valid, or no position has its middle in the region.
        DataError
            If no bin overlaps the region.
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
                    if positions:
                        keep = (crop_from, crop_to, whole.stop)
                        found, low, high = _positions(z_btd, starts, keep, self.config.scale)
                    else:
                        found, low, high = _pooled(z_btd, starts, crop_from, crop_to, self.config.scale)
                    values.append(found)
                    at = whole.start_bp + (np.stack([low, high], axis=1) - whole.first) * width
                    frame = pd.DataFrame(
                        {"biosample": adata.obs_names[row], VAR_CHROM: whole.chrom}, index=range(len(at))
                    )
                    frames.append(frame.assign(**{VAR_START: at[:, 0], VAR_END: at[:, 1]}))
        obs = pd.concat(frames, ignore_index=True)
        if obs.empty:
            message = f"No latent position of {self.config.scale} bins has its middle in the region. Ask for more bins."
            raise ConfigError(message)
        obs.index = obs["biosample"] + "|" + peak_names(obs)
        return anndata.AnnData(np.concatenate(values), obs=obs)


def _positions(
    z_btd: np.ndarray, starts: np.ndarray, keep: tuple[np.ndarray, np.ndarray, int], scale: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the latent positions that are kept, (positions, d), their first bins and the bins after their last.

    What is kept is given by the first bins, the bins after the last ones, and the bin at which the run stops.
    """
    low_bt = starts[:, None] + scale * np.arange(z_btd.shape[1])
    high_bt = np.minimum(low_bt + scale, keep[2])
    middle_bt = (low_bt + high_bt) // 2
    keep_bt = (low_bt < high_bt) & (middle_bt >= keep[0][:, None]) & (middle_bt < keep[1][:, None])
    return z_btd[keep_bt], low_bt[keep_bt], high_bt[keep_bt]


def _pooled(
    z_btd: np.ndarray, starts: np.ndarray, crop_from: np.ndarray, crop_to: np.ndarray, scale: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the mean over the latent positions that share bins with what is kept of each window, (b, d), and where."""
    first, stop = (crop_from - starts) // scale, -(-(crop_to - starts) // scale)
    mean = [z_td[a:b].mean(axis=0) for z_td, a, b in zip(z_btd, first, stop, strict=True)]
    return np.stack(mean), crop_from, crop_to
