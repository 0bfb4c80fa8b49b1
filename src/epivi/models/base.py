"""What every model can do: loaders, training, inference over batches, and the setup of data that were never set up."""

from __future__ import annotations

import inspect
import logging
from hashlib import sha256
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from mudata import MuData
from scvi import REGISTRY_KEYS, settings
from torch.utils.data import DataLoader

from epivi import _validate
from epivi._errors import ConfigError, DataError
from epivi.data.splits import EpochSampler, split_cells
from epivi.models.base_arguments import check_run_arguments
from epivi.models.base_saving import SavingMixin
from epivi.models.base_training import TrainingData, cut_rows, run_training
from epivi.train.config import TrainingConfig
from epivi.train.tuning import takes_flag

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from anndata import AnnData
    from torch import Tensor

logger = logging.getLogger(__name__)

# a pass over all cells reads so many at once: a few million non-zeros
ROWS_AT_ONCE = 512


class EpiModel(SavingMixin):
    """Base of all models of epivi: a :class:`scvi.model.base.BaseModelClass` that trains, saves and resumes exactly.

    Subclasses build ``self.module`` and ``self.config``, and implement ``setup_*``.
    """

    seed: int
    module: Any
    config: Any
    trainer: Any
    init_arguments: dict[str, Any]
    is_interrupted_: bool = False

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls):
            cls.__init__ = takes_flag(cls.__init__)  # type: ignore[method-assign]

    def __init__(self, adata: AnnData | MuData | None = None, registry: dict | None = None) -> None:
        if adata is None and registry is None:
            message = f"{type(self).__name__} needs data: pass an AnnData or MuData that was set up."
            raise ConfigError(message)
        if adata is not None and self._get_most_recent_anndata_manager(adata) is None:
            self._set_up_with_defaults(adata)
        super().__init__(adata, registry)

    @classmethod
    def _set_up_with_defaults(cls, adata: AnnData | MuData) -> None:
        """Set up data that were never set up, with the defaults, and say so."""
        method = "setup_mudata" if isinstance(adata, MuData) else "setup_anndata"
        if not hasattr(cls, method):
            message = f"{cls.__name__} takes an AnnData, found a MuData. Pass one modality, for example mdata['atac']."
            raise DataError(message)
        logger.warning("The data were not set up: %s.%s is called with its defaults.", cls.__name__, method)
        getattr(cls, method)(adata)

    @property
    def n_train_candidates(self) -> int:
        """Number of observations that can be trained on."""
        return self.adata.n_obs

    def make_sampler(
        self, indices: np.ndarray, config: TrainingConfig, *, rank: int = 0, world_size: int = 1
    ) -> EpochSampler:
        """Return the sampler of the training cells; models with other needs override it."""
        return EpochSampler(indices, config.batch_size, config.seed, rank=rank, world_size=world_size)

    def training_data(self, config: TrainingConfig, world_size: int) -> TrainingData:
        """Return what the model trains on: by default cells, split at random."""
        splits = split_cells(self.n_train_candidates, config.train_size, config.validation_size, config.seed)
        return TrainingData(
            self.adata_manager.create_torch_dataset(),
            lambda rank, world: self.make_sampler(splits["train"], config, rank=rank, world_size=world),
            cut_rows(splits["validation"], config.batch_size, world_size),
            splits,
        )

    def train(  # noqa: PLR0913
        self,
        max_epochs: int | None = None,
        *,
        lr: float | None = None,
        batch_size: int | None = None,
        train_size: float | None = None,
        validation_size: float | None = None,
        early_stopping: bool | None = None,
        early_stopping_patience: int | None = None,
        seed: int | None = None,
        plan_kwargs: Mapping[str, Any] | None = None,
        accelerator: str = "auto",
        devices: int | list[int] | str = "auto",
        run_dir: Path | str | None = None,
        save_every_n_steps: int | None = None,
        num_workers: int = 0,
        **trainer_kwargs: Any,
    ) -> None:
        """Train the model.

        Parameters
        ----------
        max_epochs
            Passes over the training cells.
        lr, batch_size, train_size, validation_size
            As in scvi-tools; the defaults are those of the model.
        early_stopping, early_stopping_patience
            Stop after so many epochs at full KL weight without a better validation reconstruction; the best weights
            are kept.
        seed
            Seed of split, order and noise; by default that of the model.
        plan_kwargs
            Further arguments of :class:`epivi.train.config.TrainingConfig`, such as ``weight_decay`` or
            ``n_epochs_kl_cycle``. Arguments given directly win over them, and both over the model's defaults.
        accelerator, devices
            As in Lightning. ``strategy="ddp_find_unused_parameters_true"`` trains on several processes under torchrun;
            pairs of cells in the loss are then those of one process.
        run_dir
            Folder for the state of the run. If it holds an unfinished run of the same data and arguments, training
            goes on where it was, bitwise as if it had not stopped.
        save_every_n_steps
            Save the state inside epochs too.
        num_workers
            Processes that read batches; the result does not depend on it.
        trainer_kwargs
            Further arguments of :class:`scvi.train.Trainer`.

        Raises
        ------
        ConfigError
            If an argument is unknown or outside its range, a folder or device cannot be used, or a strategy spawns or
            forks processes.
        TrainingError
            If the loss is not finite or the GPU runs out of memory.
        CheckpointError
            If the unfinished run in ``run_dir`` does not fit, or a saved state is damaged.
        """
        if self.adata is None:
            message = "The model was loaded without data: load it with adata=... to train it further."
            raise ConfigError(message)
        if not any(parameter.requires_grad for parameter in self.module.parameters()):
            message = "All weights are frozen: the query has no new batch to fit. Latents need no training."
            raise ConfigError(message)
        direct = {
            "max_epochs": max_epochs,
            "lr": lr,
            "batch_size": batch_size,
            "train_size": train_size,
            "validation_size": validation_size,
            "early_stopping": early_stopping,
            "early_stopping_patience": early_stopping_patience,
            "seed": seed,
        }
        known = {**inspect.signature(EpiModel.train).parameters, **inspect.signature(self.train).parameters}
        check_run_arguments(run_dir, save_every_n_steps, num_workers, trainer_kwargs, known)
        defaults = self.config.training_defaults(self.adata.n_obs)
        config = TrainingConfig.merged({"seed": self.seed}, defaults, plan_kwargs, direct)
        self._validate_anndata(self.adata)
        run_training(
            self,
            config,
            accelerator=accelerator,
            devices=devices,
            run_dir=run_dir,
            save_every_n_steps=save_every_n_steps,
            num_workers=num_workers,
            **trainer_kwargs,
        )

    def fingerprint(self, config: TrainingConfig) -> dict[str, Any]:
        """Return what must agree for a run to be resumed: model, data and training arguments."""
        arguments = {key: getattr(config, key) for key in config.__dataclass_fields__}
        model = {"model": type(self).__name__, "model_seed": self.seed, "config": self.config.summary()}
        return model | {"data": self._data_fingerprint()} | arguments

    def _data_fingerprint(self) -> str:
        """Return a SHA-256 of names and values of the data."""
        names = np.concatenate([np.asarray(self.adata.obs_names, dtype=str), np.asarray(self.feature_names, dtype=str)])
        digest = sha256("\n".join(names).encode())
        dataset = self.adata_manager.create_torch_dataset()
        for start in range(0, self.adata.n_obs, ROWS_AT_ONCE):
            rows = dataset[np.arange(start, min(start + ROWS_AT_ONCE, self.adata.n_obs))]
            for key in sorted(rows):
                digest.update(rows[key].numpy().data)
        return digest.hexdigest()

    @property
    def feature_names(self) -> np.ndarray:  # type: ignore[override]
        """Names of the features that the model reads, in the trained order."""
        return np.asarray(self._field_state(REGISTRY_KEYS.X_KEY)["column_names"])

    def _described(self, **parts: Any) -> str:
        """Return the name of the model, what is told of it, and the number of its parameters."""
        parts["parameters"] = f"{sum(p.numel() for p in self.module.parameters()):,}"
        return f"{type(self).__name__} with " + ", ".join(f"{key}: {value}" for key, value in parts.items())

    def _field_state(self, key: str) -> Mapping[str, Any]:
        """Return what a field registered about the trained data."""
        return self.registry["field_registries"][key]["state_registry"]

    def _covariate_sizes(self) -> dict[str, Any]:
        """Return the arguments of :class:`epivi.nn.covariates.Covariates`."""
        categorical = self._field_state(REGISTRY_KEYS.CAT_COVS_KEY) or {}
        return {
            "n_batch": self.summary_stats.n_batch,
            "n_cats_per_cov": list(categorical.get("n_cats_per_key", [])),
            "n_continuous": self.summary_stats.get("n_extra_continuous_covs", 0),
        }

    def _registered(self, key: str, adata: AnnData | MuData | None = None) -> np.ndarray:
        """Return a registered column of the data, one value an observation in their order, shape (n,)."""
        manager = self.adata_manager if adata is None else self.get_anndata_manager(adata, required=True)
        dataset = manager.create_torch_dataset(data_and_attributes=[key])
        return dataset[np.arange(manager.adata.n_obs)][key].numpy()[:, 0]

    def _batches(
        self, adata: AnnData | MuData | None, indices: Sequence[int] | np.ndarray | None, batch_size: int | None
    ) -> tuple[AnnData | MuData, np.ndarray, Iterator[dict[str, Tensor]]]:
        """Return data, row numbers and batches for inference, in the order of the rows, on the model's device."""
        if adata is None and self.adata is None:
            message = "The model was loaded without data: pass adata=..."
            raise ConfigError(message)
        adata = self._validate_anndata(adata)
        rows = check_indices(indices, adata.n_obs)
        size = settings.batch_size if batch_size is None else batch_size
        _validate.check_number(size, "batch_size", low=1, integer=True)
        dataset = self.get_anndata_manager(adata, required=True).create_torch_dataset()
        parts = [rows[start : start + size].tolist() for start in range(0, max(rows.size, 1), size)]
        # a generator of its own: the loader would draw from the global one
        loader = DataLoader(dataset, sampler=parts, batch_size=None, generator=torch.Generator().manual_seed(0))
        return adata, rows, ({k: v.to(self.device) for k, v in batch.items()} for batch in loader)


def check_indices(indices: Sequence[int] | np.ndarray | None, n_obs: int) -> np.ndarray:
    """Return row numbers from ``None`` (all), a boolean mask or integers.

    Raises
    ------
    ConfigError
        If a mask has the wrong length, or a number lies outside the data.

    Examples
    --------
    >>> check_indices([True, False, True], 3).tolist()
    [0, 2]
    """
    if indices is None:
        return np.arange(n_obs)
    rows = np.asarray(indices)
    if rows.dtype == bool:
        if rows.shape != (n_obs,):
            message = f"The mask in indices has shape {rows.shape}; the data have {n_obs} cells."
            raise ConfigError(message)
        return np.flatnonzero(rows)
    if rows.size and not np.issubdtype(rows.dtype, np.integer):
        message = f"indices must be row numbers or a boolean mask, found {rows.dtype}."
        raise ConfigError(message)
    rows = rows.astype(np.int64).ravel()
    bad = rows[(rows < -n_obs) | (rows >= n_obs)]
    if bad.size:
        message = f"indices holds {bad[0]}; the data have {n_obs} cells (0 to {n_obs - 1})."
        raise ConfigError(message)
    return np.where(rows < 0, rows + n_obs, rows)


def model_seed(seed: int | None) -> int:
    """Return the seed of a model: as given, else that of scvi-tools, else 0.

    Examples
    --------
    >>> model_seed(3)
    3
    """
    if seed is None:
        seed = settings.seed if settings.seed is not None else 0
    _validate.check_number(seed, "seed", low=0, integer=True)
    return int(seed)


def seeded_module(seed: int, build: Any) -> torch.nn.Module:
    """Build a module with weights that depend on the seed alone, leaving the global generator untouched.

    Examples
    --------
    >>> a, b = (seeded_module(1, lambda: torch.nn.Linear(1, 1)) for _ in range(2))
    >>> bool(a.weight == b.weight)
    True
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()
