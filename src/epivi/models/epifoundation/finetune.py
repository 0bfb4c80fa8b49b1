"""Fine-tuning for a task, and mapping a pretrained model onto other data."""

from __future__ import annotations

import copy
import logging
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pandas as pd
import torch
from anndata import AnnData
from scvi import REGISTRY_KEYS

from epivi import _validate
from epivi._errors import ConfigError
from epivi._keys import BATCH_RNA
from epivi.models.base_saving import plain
from epivi.models.epifoundation.config import LABEL_TASKS, PRETRAINING, TASKS
from epivi.models.epifoundation.fields import NAMES
from epivi.models.epifoundation.outputs.latent import LatentMixin
from epivi.models.epifoundation.setup import VOCABULARY

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from mudata import MuData
    from torch import Tensor

logger = logging.getLogger(__name__)

FREEZES = ("nothing", "peaks", "encoder")
GENE_ROWS = "genes.genes.table.weight"
BATCH_ROWS = "batches.table.weight"
DECODER_INPUTS = "decoder.hidden.weight"
ADVERSARY_OUT = ("adversary.network.2.weight", "adversary.network.2.bias")


class FinetuneMixin(LatentMixin):
    """Fine-tuning and query mapping; the model itself stays as it is."""

    transfer_report_: pd.DataFrame

    def finetune(  # noqa: PLR0913
        self,
        task: str,
        adata: AnnData | MuData | None = None,
        *,
        labels_key: str | None = None,
        batch_key: str | None = None,
        unlabeled_category: str | None = None,
        freeze: str = "nothing",
        setup_kwargs: Mapping[str, Any] | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        seed: int | None = None,
        **train_kwargs: Any,
    ) -> Self:
        """Return a new model for a task, that starts from the encoder of this one, trained.

        Parameters
        ----------
        task
            ``"annotation"``: cell types; ``"batch_correction"``: cell types, with batches of equal weight;
            ``"expression"``: the expression of genes, from peaks alone.
        adata
            Data to train on, with this model's peaks (:meth:`project_peaks`); its own by default.
        labels_key, batch_key, unlabeled_category
            Columns of obs, and the label of cells without type; by default those of the setup of this model.
        freeze
            What is not trained: ``"nothing"``, the table of ``"peaks"``, or the whole ``"encoder"``.
        setup_kwargs
            Further arguments of :meth:`setup_anndata` or :meth:`setup_mudata`.
        model_kwargs
            Choices of the new model that differ, such as ``dropout_rate``, ``batch_adversary`` or
            ``expression_target``.
        seed
            Seed of the new heads and of the training; that of this model by default.
        train_kwargs
            Arguments of :meth:`train`; ``train=False`` returns the new model untrained. With few labels, see there,
            all cells train and none validate.

        Returns
        -------
        The new model; ``transfer_report_`` says which weights were taken over.

        Raises
        ------
        ConfigError
            If task or freeze are unknown, labels or expression are missing, or weights would not fit.
        DataError
            If the data lack peaks of this model.

        Examples
        --------
        >>> import epivi
        >>> mdata = epivi.simulate.linked_multiome(60, n_peaks=80, n_genes=20, seed=0)
        >>> epivi.EpiFoundation.setup_mudata(mdata)
        >>> model = epivi.EpiFoundation(mdata, size="test")
        >>> model.train(max_epochs=1, enable_progress_bar=False)
        >>> tuned = model.finetune("annotation", labels_key="cell_type", max_epochs=1, enable_progress_bar=False)
        >>> tuned.predict_labels().shape
        (60,)
        """
        _validate.check_choice(task, "task", [name for name in TASKS if name != PRETRAINING])
        _validate.check_choice(freeze, "freeze", FREEZES)
        data = self.adata if adata is None else adata
        if data is None:
            message = "The model was loaded without data: pass adata=..."
            raise ConfigError(message)
        given = {"labels_key": labels_key, "batch_key": batch_key, "unlabeled_category": unlabeled_category}
        self._set_up_for(data, given | dict(setup_kwargs or {}), own=adata is None)
        arguments = self.init_arguments | {"task": task, "masked_peak_weight": 0.0, "peak_init": "random"}
        arguments |= {"seed": self.seed if seed is None else seed} | dict(model_kwargs or {})
        model = type(self)(data, **arguments)
        model.transfer_report_ = model._take_weights(self, heads=False)
        _freeze(model.module, freeze)
        if train_kwargs.pop("train", True):
            model.train(**train_kwargs)
        return model

    def _set_up_for(self, data: AnnData | MuData, given: Mapping[str, Any], *, own: bool) -> None:
        """Set data up with the peaks of this model, and labels, batches and genes of their own."""
        setup = dict(self.registry["setup_args"]) if own else {}
        setup |= {key: value for key, value in given.items() if value is not None}
        registered = self.registry["field_registries"]

        vocabulary = {
            REGISTRY_KEYS.X_KEY: registered[REGISTRY_KEYS.X_KEY]["state_registry"],
            # without expression in the data nothing is matched; with it, they have genes of their own
            BATCH_RNA: registered[BATCH_RNA]["state_registry"] if isinstance(data, AnnData) else None,
        }
        method = self.setup_anndata if isinstance(data, AnnData) else self.setup_mudata
        method(data, **setup, **{VOCABULARY: vocabulary})

    @classmethod
    def load_query_data(
        cls, adata: AnnData | MuData, reference_model: Self | str | Path, *, new_peaks: str = "raise"
    ) -> Self:
        """Return a model of the same task on other data, with all weights; call ``train`` to go on with them.

        New batches get rows of their own in the table of batches, which start at the mean of the known ones, and in the
        last layer of the adversary, which start at zero.

        Parameters
        ----------
        adata
            Data with the peaks of the model, and its genes if it has any.
        reference_model
            A trained model, or the folder of a saved one; it stays as it is.
        new_peaks
            As in :meth:`prepare_query`.

        Raises
        ------
        ConfigError
            If ``reference_model`` is no model of this class, or the data have cell types that it cannot predict.
        DataError
            If the data lack peaks or genes of the model.
        """
        reference_model = cls._reference(reference_model)
        registry = copy.deepcopy(plain(reference_model.registry))
        model = cls._from_registry(
            registry, reference_model.init_arguments, adata, new_peaks=new_peaks, extend_categories=True
        )
        if model.config.task in LABEL_TASKS and model.classes != reference_model.classes:
            new = sorted(set(model.classes) - set(reference_model.classes))
            message = (
                f"The data have cell types {new[:5]} that the model does not know. Fine-tune it on labelled data: "
                "model.finetune('annotation', adata, labels_key=...)."
            )
            raise ConfigError(message)
        model.transfer_report_ = model._take_weights(reference_model, heads=True)
        model.is_trained_ = True
        return model

    def _take_weights(self, source: FinetuneMixin, *, heads: bool) -> pd.DataFrame:
        """Copy the weights of another model that fit, and return a table of them.

        Encoder and genes are taken; rows of genes by name; decoders and batches only with ``heads``.
        """
        own, other = self.module.state_dict(), source.module.state_dict()
        rows = []
        for name, value in other.items():
            wanted = heads or name.startswith(("encoder.", "genes."))
            fate = "dropped"
            if wanted and name in own:
                taken = self._fitting(name, own[name], value, source)
                if taken is None and name.startswith("encoder."):
                    message = (
                        f"The weight '{name}' has shape {tuple(value.shape)}, the new model needs "
                        f"{tuple(own[name].shape)}: leave out what changes the encoder from model_kwargs."
                    )
                    raise ConfigError(message)
                if taken is not None:
                    own[name] = taken
                    fate = "taken" if taken.shape == value.shape else "taken, rows matched by name"
            rows.append({"weight": name, "shape": tuple(value.shape), "fate": fate})
        rows += [{"weight": n, "shape": tuple(v.shape), "fate": "new"} for n, v in own.items() if n not in other]
        self.module.load_state_dict(own)
        report = pd.DataFrame(rows).set_index("weight")
        counts = report["fate"].value_counts()
        logger.info("Weights: %s.", ", ".join(f"{count} {fate}" for fate, count in counts.items()))
        return report

    def _fitting(self, name: str, own: Tensor, value: Tensor, source: FinetuneMixin) -> Tensor | None:
        """Return another model's weight in the shape of this one's, or ``None`` if it does not fit."""
        value = value.to(own.device)
        if name == GENE_ROWS:
            return _by_name(own, value, self._names(), source._names(), n_special=1)
        if name == BATCH_ROWS and own.shape[0] > value.shape[0]:
            return torch.cat([value, value.mean(0).expand(own.shape[0] - value.shape[0], -1)])
        if name in ADVERSARY_OUT and own.shape[0] > value.shape[0]:
            return torch.cat([value, value.new_zeros(own.shape[0] - value.shape[0], *value.shape[1:])])
        if name == DECODER_INPUTS and own.shape[1] > value.shape[1]:
            # a model of one batch has no vector of it: what is told of the batch starts without effect
            cell, gene = value.tensor_split([self.config.width], dim=1)
            return torch.cat([cell, value.new_zeros(len(value), own.shape[1] - value.shape[1]), gene], dim=1)
        return value.clone() if own.shape == value.shape else None

    def _names(self) -> np.ndarray:
        return np.asarray(self._field_state(BATCH_RNA)[NAMES], dtype=str)


def _by_name(own: Tensor, value: Tensor, names: np.ndarray, source_names: np.ndarray, *, n_special: int) -> Tensor:
    """Return rows with those of another table where the names agree."""
    at = pd.Index(source_names).get_indexer(names)
    taken = own.clone()
    taken[:n_special] = value[:n_special]
    known = np.flatnonzero(at >= 0)
    taken[torch.from_numpy(known + n_special)] = value[torch.from_numpy(at[known] + n_special)]
    return taken


def _freeze(module: torch.nn.Module, what: str) -> None:
    """Exclude weights from the training."""
    if what == "nothing":
        return
    prefix = "encoder." if what == "encoder" else "encoder.peaks."
    for name, parameter in module.named_parameters():
        if name.startswith(prefix):
            parameter.requires_grad = False
