"""Imputed expression: values of hidden genes, of genes that were not seen, and of each gene from the others."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from scipy import sparse
from scipy.stats import norm
from scvi import REGISTRY_KEYS

from epivi import _keys as keys
from epivi import _validate
from epivi._errors import ConfigError, DataError
from epivi.models.expresser.encoding import SCALE, Cells
from epivi.models.expresser.fields import KIND, LOGNORM
from epivi.models.expresser.module import query_mask
from epivi.models.expresser.outputs.reading import TOKEN_BUDGET, CellsMixin

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from anndata import AnnData
    from torch import Tensor

    from epivi.models.expresser.encoding import CellEncoding
    from epivi.models.expresser.network import Prediction

logger = logging.getLogger(__name__)

MODES = ("dropped", "all")
SCALES = ("lognorm", "counts")
LOWER, UPPER, PROBABILITY = "lower", "upper", "probability"
# numbers held at once for genes asked for: hidden units and heads, or keys and values of observed genes
NUMBERS_AT_ONCE = 1 << 24


class Told(NamedTuple):
    """Entries of a minibatch: cell, token, and what is told of each, by the name of the layer."""

    cell_o: np.ndarray
    token_o: np.ndarray
    values: dict[str, np.ndarray]


class ImputationMixin(CellsMixin):
    """Imputed expression."""

    @torch.inference_mode()
    def impute(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        batch_size: int | None = None,
        *,
        genes: Sequence[str] | None = None,
        mask: Any = None,
        mode: str = "dropped",
        scale: str = "lognorm",
        interval: float | None = None,
    ) -> AnnData:
        """Return expression in which values that were not observed are predicted; observed ones are unchanged.

        Parameters
        ----------
        adata, indices
            Cells; those of the model by default.
        batch_size
            Most cells read at once; the result does not depend on it.
        genes
            Genes to return; all of the vocabulary by default.
        mask
            Boolean matrix of the shape of the data, dense or sparse: entries to take as not observed. Their counts are
            not read, for normalisation neither.
        mode
            ``"dropped"``: the entries of ``mask``, known to be expressed, as hidden genes are in training. ``"all"``:
            every entry that is not observed, zeros and genes that were not measured; each as if it alone were asked
            for. With a detection head the value is multiplied by the probability that the gene is expressed; without
            one it is the value that it has where it is expressed.
        scale
            ``"lognorm"``: log(1 + 1e4 x / s) with the sum s of the observed counts (or the size factor of the setup);
            ``"counts"``.
        interval
            Probability of an interval around each prediction, such as 0.9; needs ``likelihood="gaussian"``. Intervals
            are those of the value where the gene is expressed.

        Returns
        -------
        Cells × genes, CSR, float32, with ``layers["lower"]`` and ``["upper"]`` for intervals and
        ``layers["probability"]`` for a detection head in the mode ``"all"``. Predictions of cells without any observed
        gene are NaN.

        Raises
        ------
        ConfigError
            If a choice is not valid, a gene is unknown, the mode ``"dropped"`` has no mask, or intervals are asked of
            a model without variance.
        DataError
            If the mask has another shape than the data.
        """
        self._check_request(mode, scale, interval, mask)
        rows = self._gene_rows(genes)
        self._check_if_trained(warn=True)
        # keys and values of all layers are kept for the genes asked for
        budget = NUMBERS_AT_ONCE // (2 * self.config.n_layers * self.config.width) if mode == "all" else TOKEN_BUDGET
        reading = self._read(adata, indices, batch_size, token_budget=max(min(budget, TOKEN_BUDGET), 1))
        mask_csr = _mask(mask, reading.adata.shape)
        column = _columns(len(self.feature_names), rows)
        parts = []
        for positions, cells in reading.batches:
            given, hidden_o = _with_hidden(cells, mask_csr, reading)
            tell = self._dropped if mode == "dropped" else self._all
            told = tell(reading.encoding, given, hidden_o, rows, scale, interval)
            parts.append((positions, _as_rows(told, positions.size, column)))
        return _assembled(parts, reading.adata.obs_names[reading.rows], self.feature_names, rows)

    @torch.inference_mode()
    def get_normalized_expression(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        gene_list: Sequence[str] | None = None,
        batch_size: int | None = None,
        *,
        scale: str = "lognorm",
        interval: float | None = None,
    ) -> AnnData:
        """Return each expressed gene of each cell as predicted from other genes of the cell.

        The genes of a cell fall into folds of the size that training hides; each fold is predicted from the others,
        with size factor and maximum of the others alone.

        Parameters
        ----------
        adata, indices, batch_size
            Cells, as in :meth:`impute`.
        gene_list
            Genes to return; all of the vocabulary by default.
        scale, interval
            As in :meth:`impute`; values are on the scale of the whole cell.

        Returns
        -------
        Cells × genes, CSR with an entry for each gene that is expressed, with layers as in :meth:`impute`.

        Raises
        ------
        ConfigError
            As in :meth:`impute`.
        """
        self._check_request("all", scale, interval, None)
        rows = self._gene_rows(gene_list)
        self._check_if_trained(warn=True)
        reading = self._read(adata, indices, batch_size)
        column = _columns(len(self.feature_names), rows)
        parts = []
        for positions, cells in reading.batches:
            whole_b = reading.encoding.normalised(cells, np.zeros(cells.token_o.size, dtype=bool)).factor_b
            told = []
            for hidden_o, batch, context_btd in self._folds(reading.encoding, cells):
                prediction = self._generated(batch, context_btd)["prediction"]
                factor_b = reading.encoding.normalised(cells, hidden_o).factor_b
                cell_o = cells.cell_o[hidden_o]
                values = _on_counts(_laws(prediction, _mask_of(batch), interval), factor_b[cell_o])
                if scale == "lognorm":
                    values = {key: np.log1p(SCALE * value / whole_b[cell_o]) for key, value in values.items()}
                told.append(_of_genes(Told(cell_o, cells.token_o[hidden_o], values), rows))
            parts.append((positions, _as_rows(told, positions.size, column)))
        return _assembled(parts, reading.adata.obs_names[reading.rows], self.feature_names, rows)

    def _check_request(self, mode: str, scale: str, interval: float | None, mask: Any) -> None:
        _validate.check_choice(mode, "mode", MODES)
        _validate.check_choice(scale, "scale", SCALES)
        if scale == "counts" and self._is_lognorm:
            message = "scale='counts' needs a model of counts; this one was set up with log-normalised values."
            raise ConfigError(message)
        if mode == "dropped" and mask is None:
            message = (
                "mode='dropped' needs mask=, the entries to predict. mode='all' predicts all that is not observed."
            )
            raise ConfigError(message)
        if interval is not None:
            _validate.check_number(interval, "interval", low=0.0, high=1.0, low_inclusive=False, high_inclusive=False)
            if self.config.likelihood != "gaussian":
                message = "interval= needs a model with likelihood='gaussian'; this one has no variance."
                raise ConfigError(message)

    def _dropped(
        self,
        encoding: CellEncoding,
        cells: Cells,
        hidden_o: np.ndarray,
        rows: np.ndarray,
        scale: str,
        interval: float | None,
    ) -> Iterator[Told]:
        """Yield observed entries, and hidden ones predicted together."""
        scaled = encoding.normalised(cells, hidden_o)
        yield _of_genes(_observed(cells, hidden_o, scaled.value_o, scale, interval), rows)
        if not hidden_o.any():
            return
        batch = self._to_device(encoding.encoded(cells, hidden_o))
        prediction = self._generated(batch, self._context(batch))["prediction"]
        cell_o = cells.cell_o[hidden_o]
        values = _laws(prediction, _mask_of(batch), interval)
        if scale == "counts":
            values = _on_counts(values, scaled.factor_b[cell_o])
        is_blind_o = np.bincount(cells.cell_o[~hidden_o], minlength=cells.keys_b.size)[cell_o] == 0
        values = {key: np.where(is_blind_o, np.nan, value) for key, value in values.items()}
        yield _of_genes(Told(cell_o, cells.token_o[hidden_o], values), rows)

    def _all(
        self,
        encoding: CellEncoding,
        cells: Cells,
        hidden_o: np.ndarray,
        rows: np.ndarray,
        scale: str,
        interval: float | None,
    ) -> Iterator[Told]:
        """Yield observed entries, and all others predicted one by one from the observed ones."""
        cells, hidden_o = cells.restricted(~hidden_o), np.zeros(int((~hidden_o).sum()), dtype=bool)
        scaled = encoding.normalised(cells, hidden_o)
        yield _of_genes(_observed(cells, hidden_o, scaled.value_o, scale, interval), rows)
        batch = self._to_device(encoding.encoded(cells, hidden_o))
        asked_bu = _unseen(cells, rows)
        n_cells = batch[keys.BATCH_TOKENS].shape[0]
        step = max(NUMBERS_AT_ONCE // (n_cells * (self.config.n_hidden + 8 * self.config.width)), 1)
        inputs = {name: batch[key] for name, key in _ASK.items()}
        observed = self.module.network.observe(inputs["tokens"], inputs["length"], inputs["bin"])
        for start in range(0, asked_bu.shape[1], step):
            part_bu = torch.from_numpy(asked_bu[:, start : start + step]).to(self.device)
            prediction, logit_bu = self.module.ask(**inputs, asked=part_bu, observed=observed)
            is_asked_bu = part_bu > 0
            values = _laws(prediction, is_asked_bu, interval)
            cell_o = np.nonzero(is_asked_bu.cpu().numpy())[0]
            if scale == "counts":
                values = _on_counts(values, scaled.factor_b[cell_o])
            if logit_bu is not None:
                values[PROBABILITY] = self._probability(encoding, cells, logit_bu, is_asked_bu)
                values["X"] = values["X"] * values[PROBABILITY]
            is_blind_o = cells.n_b[cell_o] == 0
            values = {key: np.where(is_blind_o, np.nan, value) for key, value in values.items()}
            yield Told(cell_o, part_bu[is_asked_bu].cpu().numpy(), values)

    def _probability(self, encoding: CellEncoding, cells: Cells, logit_bu: Tensor, is_asked_bu: Tensor) -> np.ndarray:
        """Return the probability that a gene is expressed; training saw as many zeros as expressed genes."""
        n_genes = len(self.feature_names)
        n_measured_b = np.array([encoding.measured_of(row, n_genes).sum() for row in cells.row_b])
        odds_b = np.maximum(cells.n_b, 1) / np.maximum(n_measured_b - cells.n_b, 1)
        log_odds_b1 = torch.from_numpy(np.log(odds_b)).to(logit_bu)[:, None]
        return (logit_bu + log_odds_b1).sigmoid()[is_asked_bu].cpu().numpy()

    @property
    def _is_lognorm(self) -> bool:
        return str(self._field_state(REGISTRY_KEYS.X_KEY)[KIND]) == LOGNORM


_ASK = {
    "tokens": keys.BATCH_TOKENS,
    "length": keys.BATCH_LENGTH,
    "bin": keys.BATCH_BIN,
    "maximum": keys.BATCH_MAXIMUM,
    "shift": keys.BATCH_SHIFT,
}


def _mask_of(batch: dict[str, Tensor]) -> Tensor:
    return query_mask(batch[keys.BATCH_QUERY], batch[keys.BATCH_QUERY_LENGTH])


def _laws(prediction: Prediction, mask_bq: Tensor, interval: float | None) -> dict[str, np.ndarray]:
    """Return predictions and ends of intervals under a mask, (o,), log-normalised."""
    mean_o = prediction.mean[mask_bq].cpu().double().numpy()
    if interval is None or prediction.log_variance is None:
        return {"X": mean_o}
    reach_o = norm.ppf(0.5 + interval / 2) * np.exp(0.5 * prediction.log_variance[mask_bq].cpu().double().numpy())
    return {"X": mean_o, LOWER: np.maximum(mean_o - reach_o, 0.0), UPPER: mean_o + reach_o}


def _on_counts(values: dict[str, np.ndarray], factor_o: np.ndarray) -> dict[str, np.ndarray]:
    """Return log-normalised values on the scale of counts."""
    return {key: np.expm1(value) * factor_o / SCALE for key, value in values.items()}


def _observed(cells: Cells, hidden_o: np.ndarray, value_o: np.ndarray, scale: str, interval: float | None) -> Told:
    """Return the observed entries; an interval around them has no width."""
    seen_o = ~hidden_o
    x_o = (cells.count_o if scale == "counts" else value_o)[seen_o]
    names = ("X",) if interval is None else ("X", LOWER, UPPER)
    return Told(cells.cell_o[seen_o], cells.token_o[seen_o], dict.fromkeys(names, x_o))


def _of_genes(told: Told, rows: np.ndarray) -> Told:
    """Return the entries of some genes."""
    keep = np.isin(told.token_o, rows + 1)
    values = {key: value[keep] for key, value in told.values.items()}
    return Told(told.cell_o[keep], told.token_o[keep], values)


def _unseen(cells: Cells, rows: np.ndarray) -> np.ndarray:
    """Return the genes asked for that are not observed in each cell, as tokens, 0 for pads: (b, u)."""
    token_g = np.unique(rows) + 1
    place = np.full(max(int(token_g.max()), int(cells.token_o.max(initial=0))) + 1, -1)
    place[token_g] = np.arange(token_g.size)
    is_seen_bg = np.zeros((cells.keys_b.size, token_g.size), dtype=bool)
    at_o = place[cells.token_o]
    is_seen_bg[cells.cell_o[at_o >= 0], at_o[at_o >= 0]] = True
    # those not seen first, in the order of the genes
    order_bg = np.argsort(is_seen_bg, axis=1, kind="stable")
    asked_bg = np.where(np.take_along_axis(is_seen_bg, order_bg, 1), 0, token_g[order_bg])
    return asked_bg[:, : int((~is_seen_bg).sum(1).max(initial=0))]


def _mask(mask: Any, shape: tuple[int, int]) -> sparse.csr_matrix | None:
    """Return the mask as compressed rows."""
    if mask is None:
        return None
    if isinstance(mask, pd.DataFrame):
        mask = mask.to_numpy()
    if getattr(mask, "shape", None) != shape:
        message = f"mask has the shape {getattr(mask, 'shape', None)}, the data {shape}: one entry each is needed."
        raise DataError(message)
    result = sparse.csr_matrix(mask, dtype=bool)
    result.eliminate_zeros()
    return result


def _with_hidden(cells: Cells, mask: sparse.csr_matrix | None, reading: Any) -> tuple[Cells, np.ndarray]:
    """Return cells with the masked entries among their genes, whatever their count, and which these are."""
    if mask is None:
        return cells, np.zeros(cells.token_o.size, dtype=bool)
    part = mask[cells.row_b].tocoo()
    token_m = reading.encoding.columns[part.col]
    width = int(reading.encoding.columns.max()) + 1
    masked = (part.row.astype(np.int64) * width + token_m)[token_m > 0]
    own = cells.cell_o * width + cells.token_o
    new = np.setdiff1d(masked, own)
    every = np.concatenate([own, new])
    order = np.argsort(every, kind="stable")
    every = every[order]
    count_o = np.concatenate([cells.count_o, np.zeros(new.size)])[order]
    indptr = np.searchsorted(every, np.arange(cells.keys_b.size + 1) * width)
    hidden_o = np.isin(every, masked)
    # what is hidden is not read
    count_o[hidden_o] = 0.0
    return cells._replace(indptr=indptr, token_o=every % width, count_o=count_o), hidden_o


def _columns(n_genes: int, rows: np.ndarray) -> np.ndarray:
    """Return the column of each token among the genes asked for, -1 for others."""
    column = np.full(n_genes + 1, -1)
    column[rows + 1] = np.arange(rows.size)
    return column


def _as_rows(told: Iterable[Told], n_cells: int, column: np.ndarray) -> dict[str, sparse.csr_matrix]:
    """Return the entries of a minibatch as compressed rows, by the name of the layer."""
    found: dict[str, list[tuple[np.ndarray, ...]]] = {}
    for part in told:
        place_o = column[part.token_o].astype(np.int32)
        for name, value_o in part.values.items():
            found.setdefault(name, []).append((value_o.astype(np.float32), part.cell_o.astype(np.int32), place_o))
    shape = (n_cells, int(column.max()) + 1)
    rows = {}
    for name, parts in found.items():
        value_o, cell_o, column_o = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        rows[name] = sparse.csr_matrix((value_o, (cell_o, column_o)), shape=shape)
    return rows


def _assembled(
    parts: list[tuple[np.ndarray, dict[str, sparse.csr_matrix]]],
    obs_names: pd.Index,
    names: np.ndarray,
    rows: np.ndarray,
) -> AnnData:
    """Return the rows of all minibatches as an AnnData, cells in the order asked for."""
    import anndata

    order = np.concatenate([positions for positions, _ in parts]) if parts else np.zeros(0, dtype=int)
    inverse = np.argsort(order, kind="stable")
    layers: dict[str, sparse.csr_matrix] = {}
    for name in dict.fromkeys(key for _, held in parts for key in held):
        # the rows of a minibatch are let go with the layer
        blocks = [held.pop(name, sparse.csr_matrix((p.size, rows.size), dtype=np.float32)) for p, held in parts]
        layers[name] = sparse.vstack(blocks, format="csr")
        del blocks
        layers[name] = layers[name][inverse]
    x = layers.pop("X", sparse.csr_matrix((len(obs_names), rows.size), dtype=np.float32))
    frames = {"obs": pd.DataFrame(index=obs_names), "var": pd.DataFrame(index=names[rows].astype(object))}
    return anndata.AnnData(x, layers=layers, **frames)
