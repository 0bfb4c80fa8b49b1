"""The vector of each cell, and how cells of any data are read."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from anndata import AnnData
from mudata import MuData
from scvi import REGISTRY_KEYS, settings
from scvi.data._constants import _SCVI_UUID_KEY
from scvi.data._utils import _assign_adata_uuid

from epivi import _validate
from epivi._errors import ConfigError
from epivi._keys import OBS_N_OPEN
from epivi.data.buckets import fixed_batches
from epivi.data.sparse import modality_rows
from epivi.models.base import EpiModel, check_indices

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


logger = logging.getLogger(__name__)


class LatentMixin(EpiModel):
    """Reads cells, and returns their vectors."""

    _token_budget: int
    _encoding: Any

    def _mod_key(self, adata: AnnData | MuData) -> str:
        """Return the modality of the peaks."""
        manager = self.get_anndata_manager(adata, required=True)
        return manager.data_registry[REGISTRY_KEYS.X_KEY].mod_key

    def _n_open(self, adata: AnnData | MuData) -> np.ndarray:
        """Return the open peaks of every cell, shape (n,)."""
        if not isinstance(adata, MuData):
            return adata.obs[OBS_N_OPEN].to_numpy().astype(np.int64)
        atac = self._mod_key(adata)
        open_n = adata.mod[atac].obs[OBS_N_OPEN].to_numpy()
        rows = modality_rows(adata, atac)
        return (open_n if rows is None else open_n[rows]).astype(np.int64)

    def _lengths(self, adata: AnnData | MuData) -> np.ndarray:
        """Return the tokens of every cell, [CLS] included, shape (n,)."""
        return np.minimum(self._n_open(adata), self.config.max_peaks) + 1

    def _validate_anndata(self, adata: AnnData | MuData | None = None, copy_if_view: bool = True) -> Any:  # noqa: FBT001, FBT002
        """Return data that are set up as those of training were; AnnData and MuData may take each other's place."""
        if adata is not None and self._set_up_as(adata) is not adata:
            self.prepare_query(adata)
        return super()._validate_anndata(adata, copy_if_view)

    def _set_up_as(self, adata: AnnData | MuData) -> AnnData | MuData | None:
        """Return what was set up for this model under the mark of the data; copies bear that of their original."""
        mark = getattr(adata, "uns", {}).get(_SCVI_UUID_KEY)
        manager = type(self)._per_instance_manager_store.get(self.id, {}).get(mark)
        return None if manager is None else manager.adata

    def prepare_query(
        self, adata: AnnData | MuData, *, new_peaks: str = "raise", empty_cells: str | None = None
    ) -> None:
        """Set up data to be read by this model; all methods do so by themselves with the defaults.

        Parameters
        ----------
        adata
            AnnData of peaks, or MuData. Batch, labels and expression may be missing.
        new_peaks
            ``"raise"`` refuses data that lack peaks of the model; ``"position"`` reads any peaks, those that the model
            does not know by name by their position alone (models with ``positions="genome"``).
        empty_cells
            As in :meth:`setup_anndata`; as at setup by default.

        Raises
        ------
        DataError
            If the data cannot be used.

        Examples
        --------
        >>> import epivi
        >>> mdata = epivi.simulate.linked_multiome(60, n_peaks=80, n_genes=20, seed=0)
        >>> epivi.EpiFoundation.setup_mudata(mdata)
        >>> model = epivi.EpiFoundation(mdata, size="test", positions="genome")
        >>> query = epivi.simulate.shifted_peaks(mdata["atac"].copy(), shift=50)
        >>> model.train(max_epochs=1, enable_progress_bar=False)
        >>> model.prepare_query(query, new_peaks="position")
        >>> model.get_latent_representation(query).shape
        (60, 32)
        """
        original = self._set_up_as(adata)
        if original is not None and original is not adata and not adata.is_view:
            _assign_adata_uuid(adata, overwrite=True)
        more = {"new_peaks": new_peaks} | ({} if empty_cells is None else {"empty_cells": empty_cells})
        self._set_up_like(self.registry, adata, **more)
        self._register_manager_for_instance(self._get_most_recent_anndata_manager(adata, required=True))

    @classmethod
    def _set_up_like(cls, registry: dict[str, Any], adata: AnnData | MuData, **more: Any) -> None:
        """Set data up with the vocabulary of a registry, whichever of the two kinds they are."""
        given = dict(registry["setup_args"])
        method = "setup_anndata" if isinstance(adata, AnnData) else "setup_mudata"
        if method != registry["setup_method_name"]:
            shared = ("batch_key", "labels_key", "unlabeled_category", "empty_cells", "new_peaks")
            layer = given.get("atac_layer") if method == "setup_anndata" else given.get("layer")
            name = "layer" if method == "setup_anndata" else "atac_layer"
            given = {key: given.get(key) for key in shared} | {name: layer}
        getattr(cls, method)(adata, source_registry=registry, **given | more)

    @classmethod
    def _from_registry(
        cls, registry: dict[str, Any], init_arguments: Any, adata: AnnData | MuData | None, **transfer: Any
    ) -> Any:
        if adata is None:
            return cls(registry=registry, **init_arguments)
        # the weights of a saved model have rows for its own categories alone
        cls._set_up_like(registry, adata, **{"extend_categories": False} | transfer)
        # nor do its peaks need a start
        model = cls(adata, **dict(init_arguments) | {"peak_init": "random"})
        model.init_arguments["peak_init"] = init_arguments["peak_init"]
        model.config = model.module.config = cls(registry=registry, **init_arguments).config
        return model

    def _read(
        self,
        adata: AnnData | MuData,
        rows: np.ndarray,
        batch_size: int | None,
        *,
        draw: int = 0,
    ) -> Iterator[tuple[np.ndarray, dict[str, torch.Tensor]]]:
        """Yield positions within ``rows`` and tokens on the model's device, cells of like length together."""
        size = settings.batch_size if batch_size is None else batch_size
        _validate.check_number(size, "batch_size", low=1, integer=True)
        lengths = self._lengths(adata)[rows]
        encode = self._encoding(adata, targets=False)
        dataset = self.get_anndata_manager(adata, required=True).create_torch_dataset()
        if not rows.size:
            return
        for drawn in fixed_batches(np.arange(rows.size), lengths, size, self._token_budget, draw=draw):
            batch = encode(dataset[rows[drawn.rows]], drawn.draw)
            yield drawn.rows, {key: value.to(self.device) for key, value in batch.items()}

    def _opened(
        self,
        adata: AnnData | MuData | None,
        indices: Sequence[int] | np.ndarray | None,
        *,
        is_trained: bool = True,
    ) -> tuple[AnnData | MuData, np.ndarray]:
        """Return data, set up, and row numbers; warn if the model was not trained, where that matters."""
        if is_trained:
            self._check_if_trained(warn=True)
        if adata is None and self.adata is None:
            message = "The model was loaded without data: pass adata=..."
            raise ConfigError(message)
        adata = self._validate_anndata(adata)
        return adata, check_indices(indices, adata.n_obs)

    @torch.inference_mode()
    def get_latent_representation(
        self,
        adata: AnnData | MuData | None = None,
        indices: Sequence[int] | None = None,
        batch_size: int | None = None,
        *,
        n_subsamples: int = 1,
        l2_normalize: bool = False,
    ) -> np.ndarray:
        """Return the vector z of each cell (equation 6), in the order of the data (or of ``indices``).

        Of a pretrained model it is label-free; of one fine-tuned for annotation or batch correction it is label-tuned,
        and must not be compared with methods that saw no labels.

        Parameters
        ----------
        adata
            Data to embed; the trained data by default. Peaks are matched by name.
        indices
            Row numbers or a mask.
        batch_size
            Cells read at once; the result does not depend on it.
        n_subsamples
            Hashed samples of peaks over which the vectors of cells above ``max_peaks`` are averaged.
        l2_normalize
            Scale vectors to length 1.

        Returns
        -------
        Shape (n, d), float32.

        Raises
        ------
        DataError
            If the data lack peaks of the model.
        """
        _validate.check_number(n_subsamples, "n_subsamples", low=1, integer=True)
        adata, rows = self._opened(adata, indices)
        z_nd = np.zeros((rows.size, self.config.width), dtype=np.float32)
        long_n = self._n_open(adata)[rows] > self.config.max_peaks
        if long_n.any():
            logger.info(
                "%d of %d cells have more than %d open peaks; of these so many are read (see describe_cells).",
                int(long_n.sum()),
                rows.size,
                self.config.max_peaks,
            )
        for draw in range(n_subsamples):
            # cells below the limit read all their peaks in every draw
            drawn = np.arange(rows.size) if draw == 0 else np.flatnonzero(long_n)
            for at, batch in self._read(adata, rows[drawn], batch_size, draw=draw):
                z_nd[drawn[at]] += self._cells(batch).float().cpu().numpy()
        z_nd[long_n] /= n_subsamples
        if l2_normalize:
            z_nd /= np.maximum(np.linalg.norm(z_nd, axis=1, keepdims=True), np.finfo(np.float32).tiny)
        return z_nd

    def _cells(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return the vectors of the cells of a minibatch, shape (b, d)."""
        return self.module.inference(**self.module._get_inference_input(batch))["z"]
