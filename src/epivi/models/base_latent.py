"""The latent representation, and how a batch is named to the decoder."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from scvi import REGISTRY_KEYS

from epivi._errors import ConfigError, nearest
from epivi._keys import BATCH_ROWS
from epivi.models.base import EpiModel

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from anndata import AnnData
    from mudata import MuData

OBSERVED = "observed"


class LatentMixin(EpiModel):
    """Latent representation of models with a Gaussian posterior of each cell."""

    @torch.inference_mode()
    def get_latent_representation(
        self,
        adata: AnnData | MuData | None = None,
        indices: Sequence[int] | None = None,
        batch_size: int | None = None,
        *,
        return_dist: bool = False,
    ) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        """Return the posterior means, one row a cell in the order of the data (or of ``indices``).

        Parameters
        ----------
        adata
            Data to embed; the trained data by default. Features are matched by name.
        indices
            Row numbers or a mask.
        batch_size
            Cells read at once; the result does not depend on it.
        return_dist
            Return means and variances.

        Returns
        -------
        Shape (n, d), float32; with ``return_dist`` a pair of such arrays.
        """
        return self._latents(self._trained_batches(adata, indices, batch_size)[2], return_dist=return_dist)

    def _trained_batches(
        self, adata: AnnData | MuData | None, indices: Sequence[int] | np.ndarray | None, batch_size: int | None
    ) -> tuple[AnnData | MuData, np.ndarray, Iterator[dict[str, torch.Tensor]]]:
        """Return data, row numbers and batches for what a trained model tells; warn if it was not trained."""
        self._check_if_trained(warn=True)
        return self._batches(adata, indices, batch_size)

    def _latents(
        self, batches: Iterable[dict[str, torch.Tensor]], *, return_dist: bool
    ) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        """Return means, or means and variances, of the posterior over batches, of shape (n, d)."""
        means, variances = [], []
        for batch in batches:
            qz = self.module.inference(**self.module._get_inference_input(batch), deterministic=True)["qz"]
            means.append(qz.loc.cpu())
            variances.append(qz.scale.square().cpu())
        mean_nd, variance_nd = torch.cat(means).numpy(), torch.cat(variances).numpy()
        return (mean_nd, variance_nd) if return_dist else mean_nd

    @property
    def batch_categories(self) -> list[str]:
        """Names of the batches, in the order of their codes."""
        return [str(c) for c in self._field_state(REGISTRY_KEYS.BATCH_KEY)["categorical_mapping"]]

    def _named_batch(self, transform_batch: str | None) -> int | None:
        """Return the code of a batch; ``None`` for each cell's own."""
        categories = self.batch_categories
        if transform_batch is None or transform_batch == OBSERVED:
            return None
        if str(transform_batch) not in categories:
            message = (
                f"transform_batch='{transform_batch}' is no batch of the model. {nearest(transform_batch, categories)}"
            )
            raise ConfigError(message)
        return categories.index(str(transform_batch))

    def _noise(self, batch: Mapping[str, torch.Tensor]) -> RowNoise:
        """Return the source of noise of the cells of a minibatch, seeded by the model."""
        return RowNoise(self.seed, batch[BATCH_ROWS].reshape(-1).tolist())

    def _sample(self, batch: Mapping[str, torch.Tensor], qz: torch.distributions.Normal) -> torch.Tensor:
        """Draw from the posterior of each cell of a minibatch, shape (b, d)."""
        return qz.loc + qz.scale * self._noise(batch).draw(qz.loc.shape[1]).to(qz.loc)


class RowNoise:
    """Standard normal noise of cells, each with a generator of its own that depends on (seed, row) alone.

    So neither the order of the cells, nor which others are read, nor the size of minibatches changes what a cell gets;
    it is drawn on the CPU, so that devices agree.

    Parameters
    ----------
    seed
        Seed of all rows.
    rows
        Row numbers of the cells in their data.

    Examples
    --------
    >>> pair = RowNoise(0, [5, 3]).draw(2)
    >>> bool((RowNoise(0, [3]).draw(2) == pair[1:]).all())
    True
    """

    def __init__(self, seed: int, rows: Sequence[int]) -> None:
        # two words of 64 bits: no two pairs of seed and row share a stream
        self.generators = [np.random.Generator(np.random.Philox(key=[seed % 2**64, row])) for row in rows]

    def draw(self, n_latent: int) -> torch.Tensor:
        """Return the next noise of each cell, shape (b, d), float32."""
        noise_bd = np.empty((len(self.generators), n_latent), dtype=np.float32)
        for generator, noise_d in zip(self.generators, noise_bd, strict=True):
            generator.standard_normal(dtype=np.float32, out=noise_d)
        return torch.from_numpy(noise_bd)
