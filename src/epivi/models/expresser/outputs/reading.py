"""How cells are read for all that a model tells: every expressed gene, cells of similar length together."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np
from scvi import REGISTRY_KEYS, settings

from epivi import _validate
from epivi._errors import ConfigError, DataError, nearest
from epivi._keys import OBS_DATASET, OBS_N_EXPRESSED
from epivi.data.buckets import fixed_batches
from epivi.data.sparse import SparseReader
from epivi.models.base import EpiModel, check_indices
from epivi.models.expresser.encoding import CellEncoding, Cells, column_map
from epivi.models.expresser.fields import DATASETS, KIND, KNOWN, LOGNORM, MEASURED, ROWS

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import torch
    from anndata import AnnData
    from torch import Tensor

    from epivi.models.expresser.config import ExpresserConfig
    from epivi.models.expresser.module import ExpresserModule

logger = logging.getLogger(__name__)

# padded tokens of a minibatch at inference: some 100 MB of activations at the width of the thesis
TOKEN_BUDGET = 1 << 15
# rows that are held at once where the data are on disk, as epivi.data.disk.DiskRows
ROWS_HELD = 8192


class Reading:
    """Minibatches of the cells asked for.

    Parameters
    ----------
    adata
        The data.
    rows
        Their rows, in the order in which results are wanted.
    encoding
        Turns rows into tokens.
    batches
        Positions among ``rows`` and the expressed genes of each minibatch.
    """

    def __init__(
        self, adata: AnnData, rows: np.ndarray, encoding: CellEncoding, batches: Iterator[tuple[np.ndarray, Cells]]
    ) -> None:
        self.adata = adata
        self.rows = rows
        self.encoding = encoding
        self.batches = batches


class CellsMixin(EpiModel):
    """Reading of cells."""

    module: ExpresserModule
    config: ExpresserConfig

    def _data_state(self, adata: AnnData) -> Mapping[str, Any]:
        """Return what the setup registered about some data."""
        manager = self.get_anndata_manager(adata, required=True)
        return manager.registry["field_registries"][REGISTRY_KEYS.X_KEY]["state_registry"]

    def _encoding(self, adata: AnnData, *, seed: int = 0) -> CellEncoding:
        """Return the encoding of data that were set up."""
        state = self._data_state(adata)
        sets = np.asarray(state[DATASETS], dtype=str)
        code_n = np.zeros(adata.n_obs, dtype=np.int64)
        if sets.size:
            manager = self.get_anndata_manager(adata, required=True)
            key = manager.registry["setup_args"].get("dataset_key") or OBS_DATASET
            code_n = np.searchsorted(np.sort(sets), adata.obs[key].astype(str).to_numpy())
            code_n = np.argsort(sets)[code_n]
        has_baseline = self.config.baseline == "additive"
        return CellEncoding(
            adata.obs_names,
            column_map(adata.n_vars, state[KNOWN], state[ROWS]),
            self.config,
            seed=seed,
            is_lognorm=str(state[KIND]) == LOGNORM,
            gene_mean=self.module.gene_mean.cpu().double().numpy() if has_baseline else None,
            measured=(np.asarray(state[MEASURED], dtype=bool), code_n),
        )

    def _read(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | np.ndarray | None = None,
        batch_size: int | None = None,
        *,
        token_budget: int = TOKEN_BUDGET,
    ) -> Reading:
        """Return minibatches of all expressed genes of the cells asked for."""
        if adata is None and self.adata is None:
            message = "The model was loaded without data: pass adata=..."
            raise ConfigError(message)
        adata = self._validate_anndata(adata)
        rows = check_indices(indices, adata.n_obs)
        size = settings.batch_size if batch_size is None else batch_size
        _validate.check_number(size, "batch_size", low=1, integer=True)
        encoding = self._encoding(adata)
        dataset = self.get_anndata_manager(adata, required=True).create_torch_dataset()
        lengths = adata.obs[OBS_N_EXPRESSED].to_numpy()[rows]

        def batches() -> Iterator[tuple[np.ndarray, Cells]]:
            for block in _blocks(dataset, rows):
                for drawn in fixed_batches(block, lengths, size, token_budget):
                    yield drawn.rows, encoding.read(dataset[rows[drawn.rows]])

        return Reading(adata, rows, encoding, batches())

    def _to_device(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {key: value.to(self.device) for key, value in batch.items()}

    def _context(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the genes of cells in context, shape (b, t, d)."""
        return self.module.inference(**self.module._get_inference_input(batch))["context"]

    def _generated(self, batch: dict[str, Tensor], context_btd: Tensor) -> dict[str, Any]:
        """Return what is told of the hidden genes of a minibatch."""
        return self.module.generative(**self.module._get_generative_input(batch, {"context": context_btd}))

    def _folds(
        self, encoding: CellEncoding, cells: Cells
    ) -> Iterator[tuple[np.ndarray, dict[str, Tensor], torch.Tensor]]:
        """Yield what each fold hides, boolean (o,), the minibatch, and its genes in context.

        The identities are those of all genes in every fold, so that the encoder runs once, unless it reads values.
        """
        fold_o = encoding.folds(cells)
        context_btd = None
        for fold in range(self.config.n_folds):
            hidden_o = fold_o == fold
            if not hidden_o.any():
                return
            batch = self._to_device(encoding.encoded(cells, hidden_o))
            if context_btd is None or self.config.decoder == "encoder":
                context_btd = self._context(batch)
            yield hidden_o, batch, context_btd

    def _gene_rows(self, genes: Sequence[str] | str | None) -> np.ndarray:
        """Return the position of genes in the vocabulary, all by default.

        Raises
        ------
        ConfigError
            If one is unknown, or there is none.
        """
        names = self.feature_names
        if genes is None:
            return np.arange(len(names))
        wanted = [genes] if isinstance(genes, str) else list(genes)
        position = {str(name): row for row, name in enumerate(names)}
        if not wanted:
            message = "genes is empty: name one gene or more, or leave it out for all."
            raise ConfigError(message)
        if unknown := [gene for gene in wanted if str(gene) not in position]:
            message = (
                f"{len(unknown)} of {len(wanted)} genes are not in the vocabulary of {len(names)} (first: "
                f"{unknown[:3]}). {nearest(str(unknown[0]), position)}"
            )
            raise ConfigError(message)
        return np.array([position[str(gene)] for gene in wanted])

    def _groups(self, adata: AnnData, rows: np.ndarray, groupby: str | None) -> tuple[np.ndarray, list[str]]:
        """Return the group of each row and the names of the groups, by a column of obs.

        Raises
        ------
        DataError
            If the column is missing.
        """
        if groupby is None:
            return np.zeros(rows.size, dtype=np.int64), [""]
        if groupby not in adata.obs:
            message = f"adata.obs has no column '{groupby}'. {nearest(groupby, adata.obs.columns)}"
            raise DataError(message)
        names, codes = np.unique(adata.obs[groupby].astype(str).to_numpy()[rows], return_inverse=True)
        return codes, names.tolist()


def _blocks(dataset: Any, rows: np.ndarray) -> Iterator[np.ndarray]:
    """Yield positions among rows: all at once, or of blocks that are held one after the other if data are on disk."""
    matrix = next(reader.matrix for reader in dataset.readers if isinstance(reader, SparseReader))
    if not hasattr(matrix, "hold"):
        yield np.arange(rows.size)
        return
    order = np.argsort(rows, kind="stable")
    for start in range(0, rows.size, ROWS_HELD):
        block = order[start : start + ROWS_HELD]
        matrix.hold(np.unique(rows[block]))
        yield block
