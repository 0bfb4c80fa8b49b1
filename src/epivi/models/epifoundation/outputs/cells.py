"""What is read of each cell."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from epivi._errors import ConfigError
from epivi._keys import BATCH_RNA
from epivi.models.base import ROWS_AT_ONCE
from epivi.models.epifoundation.outputs.latent import LatentMixin

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from mudata import MuData


class CellsMixin(LatentMixin):
    """Which cells are read in part, or not at all."""

    def describe_cells(
        self, adata: AnnData | MuData | None = None, indices: Sequence[int] | None = None, *, write: bool = False
    ) -> pd.DataFrame:
        """Return what is read of each cell: how many peaks are open, how many of them are read, whether it has RNA.

        Parameters
        ----------
        adata, indices
            As in :meth:`get_latent_representation`.
        write
            Write the columns to ``adata.obs`` too.

        Returns
        -------
        A table by cell: ``n_open``, ``n_read``; ``truncated``, whether some are left out, ``empty``, whether none is
        open, ``has_rna``, whether the cell counts in what is learnt of genes.

        Raises
        ------
        ConfigError
            If columns of some cells alone are to be written.
        DataError
            If the data lack peaks of the model.

        Examples
        --------
        >>> import epivi
        >>> mdata = epivi.simulate.linked_multiome(60, n_peaks=80, n_genes=20, seed=0)
        >>> epivi.EpiFoundation.setup_mudata(mdata)
        >>> model = epivi.EpiFoundation(mdata, size="test", max_peaks=10)
        >>> table = model.describe_cells(write=True)
        >>> bool(mdata.obs["truncated"].any()), int(table["n_read"].max())
        (True, 10)
        """
        if write and indices is not None:
            message = "write=True writes columns of all cells: leave indices out, or write=False."
            raise ConfigError(message)
        data, rows = self._opened(adata, indices, is_trained=False)
        open_n = self._n_open(data)[rows]
        table = pd.DataFrame(
            {
                "n_open": open_n,
                "n_read": np.minimum(open_n, self.config.max_peaks),
                "truncated": open_n > self.config.max_peaks,
                "empty": open_n == 0,
                "has_rna": self._has_rna(data)[rows],
            },
            index=pd.Index(np.asarray(data.obs_names)[rows]),
        )
        if write:
            for name in table:
                data.obs[name] = table[name].to_numpy()
        return table

    def _has_rna(self, adata: AnnData | MuData) -> np.ndarray:
        """Return which cells have expression, shape (n,)."""
        manager = self.get_anndata_manager(adata, required=True)
        if BATCH_RNA not in manager.data_registry:
            return np.zeros(adata.n_obs, dtype=bool)
        dataset = manager.create_torch_dataset(data_and_attributes=[BATCH_RNA])
        parts = [
            np.diff(dataset[np.arange(start, min(start + ROWS_AT_ONCE, adata.n_obs))][f"{BATCH_RNA}_indptr"].numpy())
            for start in range(0, adata.n_obs, ROWS_AT_ONCE)
        ]
        return np.concatenate(parts) > 0
