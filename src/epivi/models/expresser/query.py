"""New cells and new genes for a trained Expresser."""

from __future__ import annotations

import copy
import logging
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from scipy import sparse
from scvi import REGISTRY_KEYS

from epivi._errors import ConfigError
from epivi.data.sparse import SparseReader
from epivi.models.base_saving import plain
from epivi.models.expresser.encoding import SCALE
from epivi.models.expresser.fields import ALIASES, MEASURED, NAMES, gene_names, matched
from epivi.models.expresser.outputs.reading import CellsMixin

if TYPE_CHECKING:
    from pathlib import Path

    from anndata import AnnData

logger = logging.getLogger(__name__)

N_CORRELATES = 10
N_CELLS = 5000
TABLE = "network.genes.table.weight"


class QueryMixin(CellsMixin):
    """Projection of new data onto the vocabulary, its extension, and training that goes on."""

    @classmethod
    def load_query_data(
        cls,
        adata: AnnData,
        reference_model: Self | str | Path,
        *,
        new_genes: str = "drop",
        freeze: bool = False,
    ) -> Self:
        """Return a model on new data with the weights of a trained one; ``train`` goes on from them.

        Genes are matched by name. Those of the model that the data lack are read as not expressed.

        Parameters
        ----------
        adata
            New data, with the layer and columns of the setup.
        reference_model
            A trained model, or the folder of a saved one; it stays as it is.
        new_genes
            ``"drop"`` leaves genes out that the model does not know; ``"extend"`` gives each a vector, which starts at
            the mean of those of the known genes that correlate best with it in the new data.
        freeze
            With ``"extend"``: train the vectors of the new genes alone.

        Returns
        -------
        A model on the new data.

        Raises
        ------
        DataError
            If less than half of the counts lie on known genes.
        ConfigError
            If ``reference_model`` is no model of this class, or ``freeze`` is set without new genes.
        """
        reference = cls._reference(reference_model)
        if new_genes not in ("drop", "extend"):
            message = f"new_genes='{new_genes}' is not valid. Valid are: 'drop', 'extend'."
            raise ConfigError(message)
        if freeze and new_genes == "drop":
            message = "freeze=True trains the vectors of new genes alone: take new_genes='extend' with it."
            raise ConfigError(message)
        registry = copy.deepcopy(plain(reference.registry))
        # the data are checked, and set up as they are, before anything is extended
        model = cls._from_registry(registry, reference.init_arguments, adata)
        state = {key: value.clone() for key, value in reference.module.state_dict().items()}
        if new_genes == "extend":
            added, starts = _starts(reference, adata, registry["setup_args"])
            if not added:
                message = "The data have no gene that the model does not know: take new_genes='drop'."
                raise ConfigError(message)
            held = registry["field_registries"][REGISTRY_KEYS.X_KEY]["state_registry"]
            held[NAMES] = np.concatenate([np.asarray(held[NAMES], dtype=str), added])
            held[ALIASES] = np.array([], dtype=np.str_)
            held[MEASURED] = np.ones((1, len(held[NAMES])), dtype=bool)
            held["n_vars"] = len(held[NAMES])
            model = cls._from_registry(registry, reference.init_arguments, adata)
            state[TABLE] = torch.cat([state[TABLE], starts.to(state[TABLE])])
            mean_g = state["gene_mean"]
            state["gene_mean"] = torch.cat([mean_g, mean_g[1:].mean().expand(len(added))])
            logger.info("%d new genes were added to %d.", len(added), len(held[NAMES]) - len(added))
        model.module.load_state_dict(state)
        if freeze:
            is_new_g1 = torch.zeros(state[TABLE].shape[0], 1, dtype=torch.bool)
            is_new_g1[-len(added) :] = True
            model.module.freeze_but({TABLE: is_new_g1})
        model.is_trained_ = True
        model.module.eval()
        return model


def _starts(reference: Any, adata: AnnData, setup_args: dict[str, Any]) -> tuple[list[str], torch.Tensor]:
    """Return names and first vectors of genes that a model does not know."""
    state = reference._field_state(REGISTRY_KEYS.X_KEY)
    key = setup_args.get("gene_key") if setup_args.get("gene_key") in adata.var else None
    found = matched(np.asarray(state[NAMES]), np.asarray(state[ALIASES]), adata, setup_args.get("gene_key"))
    new = np.setdiff1d(np.arange(adata.n_vars), found.known)
    names = gene_names(adata, key)[new].tolist()
    layer = setup_args.get("layer")
    counts = SparseReader(adata.X if layer is None else adata.layers[layer]).rows(
        np.unique(np.linspace(0, adata.n_obs - 1, min(adata.n_obs, N_CELLS)).astype(int))
    )
    scaled = _standardised(counts)
    table_gd = reference.module.network.genes.table.weight.detach().cpu()
    starts = torch.empty(len(names), table_gd.shape[1])
    for row, column in enumerate(new.tolist()):
        correlation = np.asarray((scaled[:, found.known].T @ scaled[:, [column]]).todense()).ravel()
        best = np.argsort(-correlation, kind="stable")[:N_CORRELATES]
        starts[row] = table_gd[torch.from_numpy(found.rows[best].astype(np.int64))].mean(0)
    return names, starts


def _standardised(counts: sparse.csr_matrix) -> sparse.csc_matrix:
    """Return log-normalised values divided by each gene's norm: products of columns rank genes by cosine."""
    total_n = np.maximum(np.asarray(counts.sum(1)).ravel(), 1.0)
    x = counts.astype(np.float64)
    x.data = np.log1p(SCALE * x.data / np.repeat(total_n, np.diff(x.indptr)))
    length_g = np.sqrt(np.asarray(x.multiply(x).sum(0)).ravel())
    return sparse.csc_matrix(x @ sparse.diags(1.0 / np.where(length_g > 0, length_g, 1.0)))
