"""Vectors of genes: the learned table, and means of genes in the context of cells."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch

from epivi import _keys as keys
from epivi import _validate
from epivi._errors import ConfigError
from epivi.models.expresser.outputs.reading import CellsMixin

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData

KINDS = ("static", "contextual")
N_CELLS = "n_cells"


class GenesMixin(CellsMixin):
    """Vectors of genes."""

    @torch.inference_mode()
    def get_gene_embeddings(
        self,
        kind: str = "static",
        groupby: str | None = None,
        *,
        genes: Sequence[str] | None = None,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        batch_size: int | None = None,
        return_anndata: bool = False,
    ) -> pd.DataFrame | AnnData:
        """Return a vector of each gene.

        Parameters
        ----------
        kind
            ``"static"``: the row of the learned table T, one vector a gene that no cell changes. ``"contextual"``: the
            mean over the cells that express the gene of its vector after the encoder, T'.
        groupby
            Column of obs; contextual vectors are then means within each group.
        genes
            Names; all by default.
        adata, indices, batch_size
            Cells of contextual vectors.
        return_anndata
            Return an AnnData of genes, ready for scanpy, with ``obs["gene"]``, ``obs["group"]`` and
            ``obs["n_cells"]``.

        Returns
        -------
        Genes × d, float32. Contextual vectors of genes that no cell expresses are NaN; with ``groupby`` the index is
        (group, gene). The number of cells behind each contextual vector is ``attrs["n_cells"]``, or in the AnnData,
        which holds only genes that are expressed, ``obs["n_cells"]``.

        Raises
        ------
        ConfigError
            If a choice is not valid, a gene is unknown, or ``groupby`` is given for static vectors.
        DataError
            If the data have no such column.
        """
        _validate.check_choice(kind, "kind", KINDS)
        rows = self._gene_rows(genes)
        names = self.feature_names[rows]
        columns = [str(i) for i in range(self.config.width)]
        if kind == "static":
            if groupby is not None:
                message = "groupby is for kind='contextual': a static vector is the same in all cells."
                raise ConfigError(message)
            table_gd = self.module.network.genes.table.weight[1:].cpu().numpy()[rows].copy()
            frame = pd.DataFrame(table_gd, index=pd.Index(names, name="gene"), columns=columns)
            return _anndata(frame, None) if return_anndata else frame
        self._check_if_trained(warn=True)
        mean_sgd, n_sg, groups = self._contextual(adata, indices, batch_size, groupby)
        mean_sgd, n_sg = mean_sgd[:, rows], n_sg[:, rows]
        index = pd.Index(names, name="gene")
        if groupby is not None:
            index = pd.MultiIndex.from_product([groups, names], names=[groupby, "gene"])
        frame = pd.DataFrame(mean_sgd.reshape(-1, self.config.width), index=index, columns=columns)
        n_cells = pd.Series(n_sg.ravel(), index=index, name=N_CELLS)
        if return_anndata:
            return _anndata(frame, n_cells)
        frame.attrs[N_CELLS] = n_sg.ravel().tolist()
        return frame

    def _contextual(
        self,
        adata: AnnData | None,
        indices: Sequence[int] | None,
        batch_size: int | None,
        groupby: str | None,
    ) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """Return means (s, g, d), numbers of cells (s, g), and names of the s groups; cells are read once."""
        reading = self._read(adata, indices, batch_size)
        codes, groups = self._groups(reading.adata, reading.rows, groupby)
        n_rows = len(self.feature_names) + 1
        sum_nd = torch.zeros(len(groups) * n_rows, self.config.width, dtype=torch.float64, device=self.device)
        n_n = torch.zeros(len(groups) * n_rows, dtype=torch.float64, device=self.device)
        for positions, cells in reading.batches:
            batch = self._to_device(reading.encoding.encoded(cells, np.zeros(cells.token_o.size, dtype=bool)))
            tokens_bt = batch[keys.BATCH_TOKENS]
            group_b1 = torch.from_numpy(codes[positions]).to(tokens_bt)[:, None]
            is_gene_bt = tokens_bt > 0
            row_o = (group_b1 * n_rows + tokens_bt)[is_gene_bt]
            sum_nd.index_add_(0, row_o, self._context(batch)[is_gene_bt].double())
            n_n.index_add_(0, row_o, torch.ones_like(row_o, dtype=torch.float64))
        sum_sgd = sum_nd.view(len(groups), n_rows, -1)[:, 1:]
        n_sg = n_n.view(len(groups), n_rows)[:, 1:]
        mean_sgd = (sum_sgd / n_sg[:, :, None]).float()
        return mean_sgd.cpu().numpy(), n_sg.long().cpu().numpy(), groups


def _anndata(frame: pd.DataFrame, n_cells: pd.Series | None) -> AnnData:
    """Return an AnnData of genes with their vectors as X; genes without a vector are left out."""
    import anndata

    if n_cells is not None:
        frame, n_cells = frame[n_cells.to_numpy() > 0], n_cells[n_cells > 0]
    obs = pd.DataFrame({"gene": frame.index.get_level_values("gene").astype(str)})
    if isinstance(frame.index, pd.MultiIndex):
        obs["group"] = pd.Categorical(frame.index.get_level_values(0).astype(str))
    if n_cells is not None:
        obs[N_CELLS] = n_cells.to_numpy()
    obs.index = obs["gene"] if "group" not in obs else obs["group"].astype(str) + "|" + obs["gene"]
    obs.index = pd.Index(obs.index.astype(str), name=None)
    return anndata.AnnData(frame.to_numpy(), obs=obs, var=pd.DataFrame(index=frame.columns))
