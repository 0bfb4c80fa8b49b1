"""Vectors of peaks and genes, peaks that speak for genes, and the way from other peaks to the model's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from scvi import REGISTRY_KEYS

from epivi import _keys as keys
from epivi import pp
from epivi._errors import ConfigError, DataError
from epivi.models.epifoundation.fields import CHROM_CODES, POSITIONS
from epivi.models.epifoundation.outputs.expression import ExpressionMixin

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from mudata import MuData


class EmbeddingsMixin(ExpressionMixin):
    """Tables of peaks and genes."""

    chromosomes: list[str]

    @torch.inference_mode()
    def get_peak_embeddings(self) -> pd.DataFrame:
        """Return the vector of each peak as the transformer reads it, identity and place, peaks × d."""
        self._check_if_trained(warn=True)
        state = self._field_state(REGISTRY_KEYS.X_KEY)
        device = self.device
        token = torch.arange(len(self.feature_names), device=device) + 2
        chrom = torch.as_tensor(np.asarray(state[CHROM_CODES]) + 1, device=device)
        position = torch.as_tensor(np.asarray(state[POSITIONS]), device=device)
        told = position if self.config.positions == "genome" else None
        vectors = self.module.encoder.embed(token, chrom, told, None)
        return pd.DataFrame(vectors.float().cpu().numpy(), index=self.feature_names)

    @torch.inference_mode()
    def get_gene_embeddings(self) -> pd.DataFrame:
        """Return the vector of each gene as the decoder reads it, genes × d.

        Raises
        ------
        ConfigError
            If the model has no genes.
        """
        self._check_if_trained(warn=True)
        if self.module.genes is None:
            message = "The model has no genes: it was set up without expression, or is for another task."
            raise ConfigError(message)
        vectors = self.module.genes(self.module.encoder.places)
        return pd.DataFrame(vectors.float().cpu().numpy(), index=self.gene_names)

    def get_gene_peak_scores(
        self,
        genes: Sequence[str],
        adata: AnnData | MuData | None = None,
        indices: Sequence[int] | None = None,
        batch_size: int | None = None,
        *,
        groupby: str | None = None,
    ) -> pd.DataFrame:
        """Return how much each open peak speaks for a gene: gradient × input of what is predicted of the gene.

        The input is the vector of the peak, and where genes are read off the peaks near them too, that it is open.

        Parameters
        ----------
        genes
            Genes.
        adata, indices, batch_size
            As in :meth:`get_latent_representation`.
        groupby
            Column of obs; scores are means over the cells of each group in which the peak is open.

        Returns
        -------
        Rows (gene, group), columns the peaks of the model; 0 where a peak is open in no cell of the group.

        Raises
        ------
        ConfigError
            If the model predicts no expression, or a gene is unknown.
        DataError
            If ``groupby`` is no column of obs.
        """
        if self.module.genes is None:
            message = "The model predicts no expression, so that peaks cannot be scored for genes."
            raise ConfigError(message)
        data, rows = self._opened(adata, indices)
        gene_rows = self._gene_rows(genes)
        if groupby is not None and groupby not in data.obs:
            message = f"groupby='{groupby}' is no column of obs."
            raise DataError(message)
        groups = np.full(rows.size, "all") if groupby is None else data.obs[groupby].astype(str).to_numpy()[rows]
        names, group_n = np.unique(groups, return_inverse=True)
        n_peaks = len(self.feature_names)
        sums = np.zeros((gene_rows.size, names.size, n_peaks + 2))
        counts = np.zeros((names.size, n_peaks + 2))
        for at, batch in self._read(data, rows, batch_size):
            token_bt = batch[keys.BATCH_TOKENS].cpu().numpy()
            cell_bt = np.broadcast_to(group_n[at][:, None], token_bt.shape)
            n_bt = np.arange(token_bt.shape[1]) < batch[keys.BATCH_LENGTH].cpu().numpy()[:, None]
            np.add.at(counts, (cell_bt[n_bt], token_bt[n_bt]), 1.0)
            for number, score_bt in enumerate(self._gradients(batch, gene_rows)):
                np.add.at(sums[number], (cell_bt[n_bt], token_bt[n_bt]), score_bt[n_bt])
        means = (sums / np.maximum(counts, 1.0))[:, :, 2:]
        index = pd.MultiIndex.from_product([self.gene_names[gene_rows], names], names=["gene", "group"])
        return pd.DataFrame(means.reshape(-1, n_peaks), index=index, columns=self.feature_names)

    def _gradients(self, batch: dict[str, torch.Tensor], genes: np.ndarray) -> list[np.ndarray]:
        """Return gradient × input of each gene's prediction over the tokens, each of shape (b, t)."""
        encoder = self.module.encoder
        inputs = self.module._get_inference_input(batch)
        with torch.enable_grad():
            x_btd = encoder.embed(inputs["tokens"], inputs["chrom"], inputs["position"], inputs["level"]).detach()
            x_btd.requires_grad_()
            n = x_btd.shape[1]
            mask_bt = torch.arange(n, device=x_btd.device) < inputs["length"][:, None]
            z_bd = encoder.transformer(x_btd, mask_bt)[:, 0]
            index_bg = torch.as_tensor(genes, device=x_btd.device).expand(z_bd.shape[0], -1)
            outputs_bgo = self.module.generative(z_bd, index_bg, None, inputs["tokens"])["genes"]
            logit_bg = outputs_bgo[:, :, -1] - (outputs_bgo[:, :, 0] if outputs_bgo.shape[2] > 1 else 0.0)
            found = []
            for number in range(genes.size):
                (gradient,) = torch.autograd.grad(logit_bg[:, number].sum(), x_btd, retain_graph=True)
                score_bt = (gradient * x_btd).sum(2)
                if self.module.local is not None:
                    gene = int(genes[number])
                    score_bt = score_bt + self.module.gene_sd[gene] * self.module.local.of_gene(inputs["tokens"], gene)
                found.append(score_bt.detach().cpu().numpy())
        return found

    def project_peaks(self, adata: AnnData, **kwargs: Any) -> AnnData:
        """Return cells on the model's peaks, by genomic overlap; see :func:`epivi.pp.project_peaks`.

        Parameters
        ----------
        adata
            Cells × other peaks, with positions.
        kwargs
            Arguments of :func:`epivi.pp.project_peaks`.

        Raises
        ------
        DataError
            If the model's peaks or the cells' have no positions, or they lie in different genomes.
        """
        state = self._field_state(REGISTRY_KEYS.X_KEY)
        if keys.VAR_START not in state:
            message = "The peaks of the model have no positions: others cannot be mapped onto them."
            raise DataError(message)
        code = np.asarray(state[CHROM_CODES])
        target = pd.DataFrame(
            {
                keys.VAR_CHROM: np.asarray(self.chromosomes)[code],
                keys.VAR_START: np.asarray(state[keys.VAR_START]),
                keys.VAR_END: np.asarray(state[keys.VAR_END]),
            },
            index=self.feature_names,
        )
        return pp.project_peaks(adata, target, **kwargs)
