"""Where the weights of a model start, from the data it is trained on.

Legend of shapes: b cells, d width, n genes.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from anndata import AnnData

from epivi._keys import BATCH_RNA
from epivi.models.base import ROWS_AT_ONCE
from epivi.models.epifoundation.config import PRETRAINING
from epivi.models.epifoundation.outputs.latent import LatentMixin
from epivi.models.epifoundation.start.readout import Moments, reduced_rank_ridge

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from epivi.models.epifoundation.module import EpiFoundationModule

logger = logging.getLogger(__name__)

LSI_COMPONENTS = 50
LEAST_SD = 0.01
STANDARDISED_CELLS = 2048


class StartMixin(LatentMixin):
    """Starts peaks at LSI, genes at their means, and the linear readout at a ridge regression."""

    gene_names: np.ndarray
    _setup_argument: Any

    def _start_from_lsi(self, module: EpiFoundationModule) -> None:
        """Start the peaks at the mean LSI coordinates of the cells in which they are open."""
        from epivi.pp.reference import peak_centroids

        holder = self.adata if isinstance(self.adata, AnnData) else self.adata.mod[self._mod_key(self.adata)]
        layer = self._setup_argument("layer" if isinstance(self.adata, AnnData) else "atac_layer")
        n_comps = min(module.encoder.peaks.table.weight.shape[1], LSI_COMPONENTS)
        centroids = peak_centroids(holder, layer=layer, n_comps=n_comps, seed=self.seed)
        found = holder.var_names.get_indexer(self.feature_names)
        with torch.no_grad():
            module.encoder.peaks.table.weight[2:, : centroids.shape[1]] += torch.from_numpy(centroids[found])

    def _start_from_means(self, module: EpiFoundationModule) -> None:
        """Tell the decoder mean and standard deviation of what it predicts of each gene, over the cells with RNA."""
        encode = self._encoding(self.adata, targets=True)
        dataset = self.adata_manager.create_torch_dataset(data_and_attributes=[BATCH_RNA])
        sums_2n, n_cells = np.zeros((2, self.gene_names.size)), 0
        for start in range(0, self.adata.n_obs, ROWS_AT_ONCE):
            rows = dataset[np.arange(start, min(start + ROWS_AT_ONCE, self.adata.n_obs))]
            indptr, indices, values = (rows[f"{BATCH_RNA}_{part}"].numpy() for part in ("indptr", "indices", "values"))
            target_o = encode.gene_values(indptr, values)
            for number, power_o in enumerate((target_o, np.square(target_o))):
                sums_2n[number] += np.bincount(indices, power_o, minlength=sums_2n.shape[1])
            n_cells += int((np.diff(indptr) > 0).sum())
        mean_n, square_n = sums_2n / max(n_cells, 1)
        module.gene_mean.copy_(torch.from_numpy(mean_n))
        if self.config.task == PRETRAINING or self.config.expression_target == "lognorm":
            sd_n = np.sqrt(np.maximum(square_n - mean_n**2, 0.0))
            # a gene expressed in one cell of the data must not weigh as one that varies
            module.gene_sd.copy_(torch.from_numpy(np.maximum(sd_n, LEAST_SD * sd_n.max())))

    def _standardise(self, rows: np.ndarray) -> None:
        """Tell the decoders mean and spread of the cell vectors as they are."""
        vectors_nd = self._vectors(np.random.default_rng(self.seed).permutation(rows)[:STANDARDISED_CELLS])
        sd_d = vectors_nd.std(0)
        self.module.cell_mean.copy_(torch.from_numpy(vectors_nd.mean(0)))
        self.module.cell_sd.copy_(torch.from_numpy(np.maximum(sd_d, LEAST_SD * max(float(sd_d.max()), 1e-6))))

    def _start_from_ridge(self, splits: Mapping[str, np.ndarray]) -> None:
        """Start the linear readout at a ridge regression on the training cells, chosen by the validation cells."""
        held = splits["validation"] if splits["validation"].size else splits["train"]
        train, validation = (Moments.of(self._standard_pairs(rows)) for rows in (splits["train"], held))
        if not train.n or not validation.n:
            return
        weight_dn, chosen = reduced_rank_ridge(train, validation)
        if self.config.task == PRETRAINING:
            # from shares to their logits, as a linear discriminant has it
            weight_dn = weight_dn / self.module.gene_sd.cpu().numpy()
        with torch.no_grad():
            self.module.readout.weight.copy_(torch.from_numpy(weight_dn.T))
        logger.info(
            "The linear readout starts at a ridge regression of rank %d that saves %.2f %% of the squared error.",
            int(chosen["rank"]),
            100.0 * chosen["gain"],
        )

    def _vectors(self, rows: np.ndarray) -> np.ndarray:
        """Return the cell vectors of training data as they are, shape (rows, d)."""
        vectors_nd = np.zeros((rows.size, self.config.width), dtype=np.float32)
        with torch.inference_mode():
            for at, batch in self._read(self.adata, rows, None):
                vectors_nd[at] = self._cells(batch).float().cpu().numpy()
        return vectors_nd

    def _standard_pairs(self, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield standardised vectors and expression of the cells that have any."""
        module = self.module
        encode = self._encoding(self.adata, targets=True)
        dataset = self.adata_manager.create_torch_dataset(data_and_attributes=[BATCH_RNA])
        mean_n, sd_n = module.gene_mean.cpu().numpy(), module.gene_sd.cpu().numpy()
        for start in range(0, rows.size, ROWS_AT_ONCE):
            part = rows[start : start + ROWS_AT_ONCE]
            batch = dataset[part]
            indptr, indices, values = (batch[f"{BATCH_RNA}_{name}"].numpy() for name in ("indptr", "indices", "values"))
            counts_b = np.diff(indptr)
            y_bn = np.zeros((part.size, mean_n.size), dtype=np.float32)
            y_bn[np.repeat(np.arange(part.size), counts_b), indices] = encode.gene_values(indptr, values)
            z_bd = module.standardised(torch.from_numpy(self._vectors(part)).to(self.device)).cpu().numpy()
            has_rna_b = counts_b > 0
            yield z_bd[has_rna_b].astype(np.float64), ((y_bn - mean_n) / sd_n)[has_rna_b].astype(np.float64)
