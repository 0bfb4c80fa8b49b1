"""Saving and loading a model: safetensors and JSON, checked byte by byte, features matched by name."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from anndata import AnnData
from mudata import MuData
from scvi.model._utils import parse_device_args
from scvi.model.base import BaseModelClass

from epivi._errors import CheckpointError, ConfigError
from epivi.train.checkpoint import read_checkpoint, write_checkpoint

if TYPE_CHECKING:
    from collections.abc import Mapping

logger = logging.getLogger(__name__)

KIND = "model"
DATA_NAMES = {AnnData: "adata.h5ad", MuData: "mdata.h5mu"}


class SavingMixin(BaseModelClass):
    """Saves and loads models without pickle."""

    module: Any
    adata: Any
    registry_: Any
    init_arguments: dict[str, Any]
    feature_names: np.ndarray
    is_trained_: bool
    history_: Any
    to_device: Any

    def save(self, dir_path: str | Path, *, overwrite: bool = False, save_anndata: bool = False) -> None:
        """Save the model to a folder.

        Parameters
        ----------
        dir_path
            Folder; it holds ``weights.safetensors``, ``metadata.json`` and ``manifest.json``.
        overwrite
            Replace a model saved there before; the old one stays whole until the new one is.
        save_anndata
            Also write the data, beside the folder, as ``<dir_path>.data/adata.h5ad`` or ``mdata.h5mu``.

        Raises
        ------
        CheckpointError
            If the folder exists and ``overwrite`` is false, or is not a saved model.
        """
        metadata = {
            "class": type(self).__name__,
            "init": self.init_arguments,
            "registry": plain(self.registry_),
            "features": self.feature_names,
            "is_trained": self.is_trained_,
            "trainable_columns": plain(self.module.trainable_columns),
            "history": dict(self.history_ or {}),
            "indices": {name: getattr(self, f"{name}_indices") for name in ("train", "validation", "test")},
        }
        path = write_checkpoint(
            dir_path, tensors=self.module.state_dict(), metadata=metadata, kind=KIND, overwrite=overwrite
        )
        if save_anndata:
            if self.adata is None:
                message = "The model holds no data: save it with save_anndata=False."
                raise CheckpointError(message)
            folder = data_folder(path)
            folder.mkdir(exist_ok=True)
            self.adata.write(folder / DATA_NAMES[type(self.adata)])

    @classmethod
    def load(
        cls,
        dir_path: str | Path,
        adata: AnnData | MuData | bool | None = None,  # noqa: FBT001
        *,
        accelerator: str = "auto",
        device: int | str = "auto",
    ) -> Self:
        """Load a model from a folder.

        Parameters
        ----------
        dir_path
            Folder written by :meth:`save`.
        adata
            Data to attach; features are matched by name, so that another order does no harm. ``None`` takes the data
            saved with the model if there are any; ``False`` loads without data.
        accelerator, device
            As in scvi-tools.

        Raises
        ------
        CheckpointError
            If a file is missing, damaged or unexpected, or holds another model.
        DataError
            If features of the model are missing in ``adata``.
        """
        saved = read_checkpoint(dir_path, kind=KIND)
        metadata = saved.metadata
        if metadata["class"] != cls.__name__:
            message = f"{dir_path} holds a {metadata['class']}, not a {cls.__name__}: use {metadata['class']}.load()."
            raise CheckpointError(message)
        if adata is None:
            adata = _read_saved_data(Path(dir_path))
        registry = metadata["registry"]
        model = cls._from_registry(registry, metadata["init"], adata if isinstance(adata, AnnData | MuData) else None)
        model.module.load_state_dict(saved.tensors)
        if metadata["trainable_columns"] is not None:
            columns = {name: torch.as_tensor(mask) for name, mask in metadata["trainable_columns"].items()}
            model.module.freeze_but(columns)
        model.is_trained_ = metadata["is_trained"]
        model.history_ = metadata["history"]
        for name, rows in metadata["indices"].items():
            setattr(model, f"{name}_indices", rows)
        *_, torch_device = parse_device_args(
            accelerator=accelerator, devices=device, return_device="torch", validate_single_device=True
        )
        model.to_device(torch_device)
        model.module.eval()
        return model

    @classmethod
    def _reference(cls, reference_model: Any) -> Self:
        """Return a reference model, loaded if a folder is given."""
        if isinstance(reference_model, str | Path):
            return cls.load(reference_model, adata=False)
        if not isinstance(reference_model, cls):
            message = f"reference_model must be a {cls.__name__} or its folder, found {type(reference_model).__name__}."
            raise ConfigError(message)
        return reference_model

    @classmethod
    def _from_registry(
        cls,
        registry: dict[str, Any],
        init_arguments: Mapping[str, Any],
        adata: AnnData | MuData | None,
        **transfer: Any,
    ) -> Self:
        """Build a model from a registry, with data set up as those of the registry were."""
        if adata is None:
            return cls(registry=registry, **init_arguments)
        setup = getattr(cls, registry["setup_method_name"])
        setup(adata, source_registry=registry, **registry["setup_args"], **transfer)
        return cls(adata, **init_arguments)


def data_folder(dir_path: Path) -> Path:
    """Return the folder beside a saved model that holds its data.

    Examples
    --------
    >>> data_folder(Path("runs/model")).name
    'model.data'
    """
    return dir_path.with_name(dir_path.name + ".data")


def _read_saved_data(dir_path: Path) -> AnnData | MuData | None:
    folder = data_folder(dir_path)
    if (path := folder / DATA_NAMES[AnnData]).is_file():
        import anndata

        return anndata.read_h5ad(path)
    if (path := folder / DATA_NAMES[MuData]).is_file():
        import mudata

        return mudata.read_h5mu(path)
    return None


def plain(value: Any) -> Any:
    """Return nested mappings and sequences as plain dicts and lists; arrays of objects become arrays of strings.

    Examples
    --------
    >>> from collections import defaultdict
    >>> plain(defaultdict(dict, a=(1, 2)))
    {'a': [1, 2]}
    """
    if isinstance(value, torch.Tensor):
        return value.cpu().numpy()
    if isinstance(value, np.ndarray):
        return value.astype(str) if value.dtype == object else value
    if hasattr(value, "items"):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return value
