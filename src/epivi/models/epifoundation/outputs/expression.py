"""Expression of genes, predicted from open peaks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from scvi import REGISTRY_KEYS

from epivi import _validate
from epivi._errors import ConfigError, nearest
from epivi._keys import BATCH_ABSENT_PEAKS, BATCH_TOKENS
from epivi.models.epifoundation.config import EXPRESSION, PRETRAINING
from epivi.models.epifoundation.outputs.latent import LatentMixin

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from mudata import MuData

GENES_AT_ONCE = 4096
PROBABILITY = "prob"
# how to get a model that predicts each kind
KINDS = {
    PROBABILITY: "the pretrained model gives it.",
    "lognorm": "model.finetune('expression') gives one that does.",
    "level": "model.finetune('expression', model_kwargs={'expression_target': 'level'}) gives one that does.",
}


class ExpressionMixin(LatentMixin):
    """Predicted expression."""

    gene_names: np.ndarray

    @torch.inference_mode()
    def get_normalized_expression(
        self,
        adata: AnnData | MuData | None = None,
        indices: Sequence[int] | None = None,
        gene_list: Sequence[str] | None = None,
        batch_size: int | None = None,
        *,
        transform_batch: str | None = None,
        return_numpy: bool = False,
    ) -> pd.DataFrame | np.ndarray:
        """Return the expression of genes that the open peaks of each cell tell; no RNA is read.

        A model fine-tuned for expression returns log-normalised values (or mean levels, if it was trained on levels).
        A pretrained one returns the probability that the gene is expressed, where as many genes of a cell are expressed
        as are silent: 0.5 does not stand for a rate.

        Parameters
        ----------
        adata, indices, batch_size
            As in :meth:`get_latent_representation`.
        gene_list
            Genes; all by default.
        transform_batch
            Batch that the decoder of a pretrained model is told; the mean of all by default.
        return_numpy
            Return the values alone.

        Returns
        -------
        Cells × genes, float32.

        Raises
        ------
        ConfigError
            If the model predicts no expression, or a gene or a batch is unknown.
        """
        if self.config.task not in (PRETRAINING, EXPRESSION) or not self.gene_names.size:
            reason = "was set up without expression" if not self.gene_names.size else f"is for {self.config.task}"
            message = f"The model {reason} and predicts none: model.finetune('expression', mdata) gives one that does."
            raise ConfigError(message)
        data, rows = self._opened(adata, indices)
        genes = self._gene_rows(gene_list)
        code = self._batch_code(transform_batch)
        values_ng = np.empty((rows.size, genes.size), dtype=np.float32)
        for at, batch in self._read(data, rows, batch_size):
            z_bd = self._cells(batch)
            batch_b1 = None if code is None else torch.full((z_bd.shape[0], 1), code, device=z_bd.device)
            for start in range(0, genes.size, GENES_AT_ONCE):
                part = genes[start : start + GENES_AT_ONCE]
                index_bg = torch.as_tensor(part, device=z_bd.device).expand(z_bd.shape[0], -1)
                peaks = (batch[BATCH_TOKENS], batch.get(BATCH_ABSENT_PEAKS))
                outputs_bgo = self.module.generative(z_bd, index_bg, batch_b1, *peaks)["genes"].float()
                found = outputs_bgo[:, :, 0] if self.config.task == EXPRESSION else outputs_bgo.softmax(2)[:, :, 1]
                values_ng[np.ix_(at, np.arange(start, start + part.size))] = found.cpu().numpy()
        if return_numpy:
            return values_ng
        return pd.DataFrame(values_ng, index=np.asarray(data.obs_names)[rows], columns=self.gene_names[genes])

    def predict_expression(
        self,
        adata: AnnData | MuData | None = None,
        indices: Sequence[int] | None = None,
        gene_list: Sequence[str] | None = None,
        batch_size: int | None = None,
        *,
        kind: str | None = None,
        **kwargs: Any,
    ) -> pd.DataFrame | np.ndarray:
        """Return :meth:`get_normalized_expression`, having checked that it is of the kind asked for.

        Parameters
        ----------
        adata, indices, gene_list, batch_size, kwargs
            As there.
        kind
            ``"prob"``: the probability that a gene is expressed, of pretrained models; ``"lognorm"`` or ``"level"``:
            log-normalised values, or the expected level, of models fine-tuned for expression, whichever they were
            trained on. By default what the model predicts.

        Raises
        ------
        ConfigError
            If the model predicts another kind, or as in :meth:`get_normalized_expression`.
        """
        if kind is not None:
            _validate.check_choice(kind, "kind", KINDS)
            own = PROBABILITY if self.config.task == PRETRAINING else self.config.expression_target
            if self.config.task in (PRETRAINING, EXPRESSION) and kind != own:
                message = f"kind='{kind}' is not what this model predicts, which is '{own}': {KINDS[kind]}"
                raise ConfigError(message)
        return self.get_normalized_expression(adata, indices, gene_list, batch_size, **kwargs)

    def _gene_rows(self, names: Sequence[str] | None) -> np.ndarray:
        """Return the rows of genes."""
        if names is None:
            return np.arange(self.gene_names.size)
        asked = np.asarray([names] if isinstance(names, str) else names, dtype=object)
        rows = pd.Index(self.gene_names).get_indexer(pd.Index(asked))
        if (rows < 0).any():
            unknown = asked[rows < 0].tolist()
            message = f"{len(unknown)} genes are not the model's, first '{unknown[0]}'. " + nearest(
                str(unknown[0]), [str(name) for name in self.gene_names]
            )
            raise ConfigError(message)
        return rows

    def _batch_code(self, name: str | None) -> int | None:
        """Return the code of a batch."""
        if name is None:
            return None
        known = [str(c) for c in self._field_state(REGISTRY_KEYS.BATCH_KEY)["categorical_mapping"]]
        if str(name) not in known:
            message = f"transform_batch='{name}' is no batch of the model. {nearest(str(name), known)}"
            raise ConfigError(message)
        return known.index(str(name))
