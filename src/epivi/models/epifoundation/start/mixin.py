"""Where the weights of a model start, from the data it is trained on.

Legend of shapes: b cells, d width, n genes.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from anndata import AnnData
from scipy import sparse
from scvi import REGISTRY_KEYS

from epivi._keys import BATCH_RNA, BATCH_TOKENS
from epivi.data.sparse import modality_rows
from epivi.models.base import ROWS_AT_ONCE
from epivi.models.epifoundation.config import PRETRAINING
from epivi.models.epifoundation.encoding import N_SPECIAL
from epivi.models.epifoundation.heads.local import Links
from epivi.models.epifoundation.outputs.latent import LatentMixin
from epivi.models.epifoundation.start.near import LEAST_GAIN, Backfit, Cells
from epivi.models.epifoundation.start.readout import Moments, reduced_rank_ridge

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from epivi.models.epifoundation.module import EpiFoundationModule

logger = logging.getLogger(__name__)

LSI_COMPONENTS = 50
LEAST_SD = 0.01
STANDARDISED_CELLS = 2048
# cells that the local readout starts from, and that choose its penalty
NEAR_CELLS, NEAR_HELD_CELLS = 20_000, 5_000
NEAR_STREAM = 0x10CA1


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
        centroids = peak_centroids(
            holder, layer=layer, n_comps=n_comps, batch_n=self._batches_of(holder), seed=self.seed
        )
        found = holder.var_names.get_indexer(self.feature_names)
        with torch.no_grad():
            module.encoder.peaks.table.weight[2:, : centroids.shape[1]] += torch.from_numpy(centroids[found])

    def _batches_of(self, holder: AnnData) -> np.ndarray | None:
        """Return the batch of each row of the peaks; ``None`` if there is one."""
        if self.summary_stats.n_batch < 2:
            return None
        code_n = self._registered(REGISTRY_KEYS.BATCH_KEY)
        rows = None if holder is self.adata else modality_rows(self.adata, self._mod_key(self.adata))
        if rows is None:
            return code_n
        batch_n = np.zeros(holder.n_obs, dtype=code_n.dtype)
        batch_n[rows] = code_n
        return batch_n

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

    def _start_readouts(self, splits: Mapping[str, np.ndarray]) -> None:
        """Start what is read off the cell vector and the peaks near each gene at least-squares fits."""
        if self.module.local is not None and self._start_from_near_peaks(splits):
            return
        if self.module.readout is not None:
            self._start_from_ridge(splits)

    def _start_from_near_peaks(self, splits: Mapping[str, np.ndarray]) -> bool:
        """Start the local and the linear readout by turns; return whether the validation cells want the local one."""
        module, rng = self.module, np.random.default_rng([self.seed, NEAR_STREAM])
        rows, held = (rng.permutation(splits[part]) for part in ("train", "validation"))
        if not held.size:
            # the penalty cannot be chosen by the cells that it is for
            held, rows = np.split(rows, [max(1, rows.size // 10)])
        train, validation = self._start_cells(rows[:NEAR_CELLS]), self._start_cells(held[:NEAR_HELD_CELLS])
        if not len(train.z_cd) or not len(validation.z_cd):
            return False
        links = Links(module.local.peak.cpu().numpy(), module.local.gene.cpu().numpy())
        fit = Backfit(train, validation, links, is_linear=module.readout is not None).run()
        is_used = bool(np.isfinite(fit.penalty))
        module.local.start(fit.local_l, fit.mean_l, is_used=is_used)
        if not is_used:
            logger.info(
                "Peaks near genes save less than %.1f %% of the squared error: there is no local readout.",
                100.0 * LEAST_GAIN,
            )
            return False
        if module.readout is not None:
            with torch.no_grad():
                module.readout.weight.copy_(torch.from_numpy(fit.linear_dn.T))
        logger.info(
            "The local readout of %d links starts at a ridge regression of penalty %.2g: it saves %.2f %% of the "
            "squared error, the cell vectors alone %.2f %%.",
            fit.local_l.size,
            fit.penalty,
            100.0 * fit.gain,
            100.0 * fit.gain_linear,
        )
        return True

    def _start_cells(self, rows: np.ndarray) -> Cells:
        """Return standardised vectors, open peaks and expression of the cells among some that have any."""
        module = self.module
        encode = self._encoding(self.adata, targets=True)
        dataset = self.adata_manager.create_torch_dataset(data_and_attributes=[BATCH_RNA])
        n_genes = self.gene_names.size
        parts = []
        for start in range(0, rows.size, ROWS_AT_ONCE):
            batch = dataset[np.sort(rows)[start : start + ROWS_AT_ONCE]]
            indptr, indices, values = (batch[f"{BATCH_RNA}_{name}"].numpy() for name in ("indptr", "indices", "values"))
            target = encode.gene_values(indptr, values)
            parts.append(sparse.csr_array((target, indices, indptr), shape=(indptr.size - 1, n_genes)))
        y_cn = sparse.vstack(parts, format="csr") if parts else sparse.csr_array((0, n_genes))
        has_rna = np.diff(y_cn.indptr) > 0
        rows, y_cn = np.sort(rows)[has_rna], y_cn[has_rna]
        z_cd = np.zeros((rows.size, self.config.width))
        cell_o, peak_o = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
        with torch.inference_mode():
            for at, batch in self._read(self.adata, rows, None):
                z_cd[at] = module.standardised(self._cells(batch)).float().cpu().numpy()
                tokens_bt = batch[BATCH_TOKENS].cpu().numpy()
                cell_b, at_b = (tokens_bt >= N_SPECIAL).nonzero()
                cell_o.append(at[cell_b])
                peak_o.append(tokens_bt[cell_b, at_b] - N_SPECIAL)
        cell, peak = np.concatenate(cell_o), np.concatenate(peak_o)
        shape = (rows.size, len(self.feature_names))
        open_cp = sparse.csc_array((np.ones(cell.size, dtype=np.float32), (cell, peak)), shape=shape)
        mean_n, sd_n = (values.cpu().numpy().astype(np.float64) for values in (module.gene_mean, module.gene_sd))
        return Cells(z_cd, open_cp, y_cn.tocsc(), mean_n, sd_n)

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
