"""What a trained SAILER returns: latents, accessibility, likelihoods, and a report on confounders."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from scipy import sparse
from scvi import REGISTRY_KEYS, settings

from epivi import _validate
from epivi._errors import ConfigError, nearest
from epivi._keys import BATCH_DEPTH
from epivi.metrics import confounder_information
from epivi.models.base_likelihood import LikelihoodMixin
from epivi.objectives.invariance import mixture_information, pairwise_kl

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from anndata import AnnData

logger = logging.getLogger(__name__)

COLLAPSED_KL = 0.01
REPORT_CELLS = 2048


class OutputsMixin(LikelihoodMixin):
    """Normalised accessibility, likelihoods and the confounder report."""

    @torch.inference_mode()
    def get_normalized_accessibility(  # noqa: PLR0913
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        *,
        region_list: Sequence[str] | None = None,
        transform_batch: str | None = None,
        library_size: str | float = "mean",
        use_z_mean: bool = True,
        threshold: float | None = None,
        calibrated: bool = True,
        return_numpy: bool = False,
        batch_size: int | None = None,
    ) -> pd.DataFrame | np.ndarray | sparse.csr_matrix | AnnData:
        """Return the probability that each peak is open, at one depth and in one batch.

        Parameters
        ----------
        adata, indices, batch_size
            As in :meth:`get_latent_representation`.
        region_list
            Names of the peaks to return; only they are computed.
        transform_batch
            Batch that the decoder is told; ``"observed"`` tells each cell's own. By default the batch with the highest
            median depth, named in a log message.
        library_size
            ``"mean"``: the mean log depth of the training data; ``"observed"``: each cell's own; or a depth.
        use_z_mean
            Decode the posterior mean; otherwise a sample, drawn with the model's seed and the row of the cell.
        threshold
            Set probabilities below it to zero and return a sparse result, built batch by batch.
        calibrated
            Undo the weight of open entries, so that values are probabilities. Under the Poisson likelihood they always
            are: those of any count.
        return_numpy
            Return an array, or with ``threshold`` a csr matrix.

        Returns
        -------
        Cells × peaks: a DataFrame; with ``threshold`` an AnnData with sparse X; with ``return_numpy`` bare matrices.

        Raises
        ------
        ConfigError
            If a batch or a region is unknown, or a value outside its range.
        """
        if threshold is not None:
            _validate.check_number(threshold, "threshold", low=0.0, high=1.0)
        peaks, names = self._regions(region_list)
        data, rows, batches = self._trained_batches(adata, indices, batch_size)
        parts: list[Any] = []
        # new memory costs as much time as what is computed: a dense result is written to where it stays, rows of a
        # sparse one to the same place again and again; numpy asks for large pages, which torch does not
        size = rows.size if threshold is None else min(batch_size or settings.batch_size, rows.size)
        kind = np.float64 if self.module.decoder.logits.weight.dtype == torch.float64 else np.float32
        matrix = torch.from_numpy(np.empty((size, names.size), dtype=kind))
        blocks = self._probabilities(
            batches,
            peaks,
            matrix,
            depth=self._depth(library_size),
            batch=self._batch_code(transform_batch),
            use_z_mean=use_z_mean,
            calibrated=calibrated,
        )
        start = 0
        for block_bp in blocks:
            if threshold is not None:
                parts.append(sparse_rows(block_bp.numpy(), threshold))
                continue
            target_bp = matrix[start : start + block_bp.shape[0]]
            if block_bp.data_ptr() != target_bp.data_ptr():
                target_bp.copy_(block_bp)
            start += block_bp.shape[0]
        if threshold is None:
            values = matrix.numpy()
            if return_numpy:
                return values
            return pd.DataFrame(values, index=data.obs_names[rows], columns=names, copy=False)
        stacked = sparse.vstack(parts, format="csr")
        if return_numpy:
            return stacked
        import anndata

        obs, var = pd.DataFrame(index=data.obs_names[rows]), pd.DataFrame(index=pd.Index(names))
        return anndata.AnnData(stacked, obs=obs, var=var)

    def get_normalized_expression(self, *args: Any, **kwargs: Any) -> Any:
        """Return :meth:`get_normalized_accessibility`; the name by which scvi-tools calls it. No RNA is modelled."""
        return self.get_normalized_accessibility(*args, **kwargs)

    def _probabilities(
        self,
        batches: Iterator[dict[str, torch.Tensor]],
        peaks: torch.Tensor | None,
        memory_np: torch.Tensor,
        *,
        use_z_mean: bool,
        calibrated: bool,
        **options: Any,
    ) -> Iterator[torch.Tensor]:
        """Yield probabilities batch by batch, shape (b, p), on the CPU.

        All peaks may be written to the next rows of ``memory_np``, or to the first where it has no more.
        """
        start = 0
        for batch in batches:
            outputs = self.module.inference(**self.module._get_inference_input(batch), deterministic=True)
            if not use_z_mean:
                outputs["z"] = self._sample(batch, outputs["qz"])
            inputs = self.module._get_generative_input(batch, outputs, use_z_mean=use_z_mean, **options)
            hidden = self.module.generative(**inputs)["hidden"]
            scale_b = self.module.log_scale(hidden, inputs["depth_b"])
            start = start if start + hidden.shape[0] <= memory_np.shape[0] else 0
            out_bp = memory_np[start : start + hidden.shape[0]] if peaks is None else None
            start += hidden.shape[0]
            yield self.module.probabilities(
                hidden, peaks, calibrated=calibrated, log_scale_b=scale_b, out_bp=out_bp
            ).cpu()

    def _regions(self, region_list: Sequence[str] | None) -> tuple[torch.Tensor | None, np.ndarray]:
        names = self.feature_names
        if region_list is None:
            return None, names
        index = pd.Index(names)
        wanted = pd.Index([region_list] if isinstance(region_list, str) else region_list)
        positions = index.get_indexer(wanted)
        if (positions < 0).any():
            unknown = str(wanted[positions < 0][0])
            message = f"region_list holds '{unknown}', which is no peak of the model. {nearest(unknown, names[:5000])}"
            raise ConfigError(message)
        return torch.from_numpy(positions).to(self.device), names[positions]

    def _depth(self, library_size: str | float) -> float | None:
        if isinstance(library_size, str):
            if library_size == "observed":
                return None
            if library_size == "mean":
                return float(self.module.covariates.log_depth_mean.exp())
            message = f"library_size must be 'mean', 'observed' or a positive number, found '{library_size}'."
            raise ConfigError(message)
        _validate.check_number(library_size, "library_size", low=0.0, low_inclusive=False)
        return float(library_size)

    def _batch_code(self, transform_batch: str | None) -> int | None:
        if transform_batch is not None or self.summary_stats.n_batch == 1:
            return self._named_batch(transform_batch)
        categories = self.batch_categories
        if self.adata is None:
            message = f"transform_batch is needed for a model without data. Batches: {categories}."
            raise ConfigError(message)
        depth, codes = self._registered(BATCH_DEPTH), self._registered(REGISTRY_KEYS.BATCH_KEY)
        medians = pd.Series(depth).groupby(codes).median()
        code = int(medians.index[int(medians.to_numpy().argmax())])
        logger.info("transform_batch: '%s', the batch with the highest median depth.", categories[code])
        return code

    def _negative_log_likelihood(
        self, batch: dict[str, torch.Tensor], outputs: dict[str, Any]
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """Return the unweighted Bernoulli loss at calibrated probabilities; a weighted one is no likelihood."""
        inputs = self.module._get_generative_input(batch, outputs)

        def of_latent(z_bd: torch.Tensor) -> torch.Tensor:
            hidden = self.module.generative(**inputs | {"z": z_bd})["hidden"]
            return self.module.reconstruction(hidden, outputs["blocked"], weighted=False)

        return of_latent

    def get_library_size_factors(
        self, adata: AnnData | None = None, indices: Sequence[int] | None = None
    ) -> np.ndarray:
        """Return the depth of each cell, shape (n,), as the decoder is told before standardisation.

        Parameters
        ----------
        adata, indices
            As in :meth:`get_latent_representation`.
        """
        _, _, batches = self._batches(adata, indices, None)
        return np.concatenate([batch[BATCH_DEPTH][:, 0].cpu().numpy() for batch in batches])

    @torch.inference_mode()
    def confounder_report(self, *, n_cells: int = REPORT_CELLS) -> pd.Series:
        """Return how much the latent tells of depth and batch, and how well the information term estimates it.

        Parameters
        ----------
        n_cells
            Cells of the estimates of the information term, drawn with the model's seed.

        Returns
        -------
        Mean and largest information with depth (and batch) over the latent dimensions, in nats; the pairwise and the
        mixture estimate of the information between latent and data; the share of collapsed dimensions (mean KL below
        0.01); the mean KL of a cell.
        """
        mean_nd, variance_nd = self.get_latent_representation(return_dist=True)
        rows = np.random.default_rng(self.seed).permutation(mean_nd.shape[0])[:n_cells]
        mean, logvar = torch.from_numpy(mean_nd).double(), torch.from_numpy(variance_nd).double().log()
        kl_d = 0.5 * (logvar.exp() + mean.square() - 1 - logvar).mean(0)
        depth = confounder_information(mean_nd, self.get_library_size_factors(), discrete=False, seed=self.seed)
        report = {"information_depth": depth.mean, "information_depth_max": depth.max}
        if self.summary_stats.n_batch > 1:
            codes = self._registered(REGISTRY_KEYS.BATCH_KEY)
            batch = confounder_information(mean_nd, codes, discrete=True, seed=self.seed)
            report |= {"information_batch": batch.mean, "information_batch_max": batch.max}
        report |= {
            "pairwise_kl": float(pairwise_kl(mean[rows], logvar[rows])),
            "mixture_information": float(mixture_information(mean[rows], logvar[rows])),
            "collapsed_share": float((kl_d < COLLAPSED_KL).double().mean()),
            "kl": float(kl_d.sum()),
        }
        return pd.Series(report, name=type(self).__name__)


def sparse_rows(values_bp: np.ndarray, threshold: float) -> sparse.csr_matrix:
    """Return the values of a matrix that are not zero and not below a threshold, as compressed rows.

    Examples
    --------
    >>> sparse_rows(np.array([[0.2, 0.7], [0.0, 0.3]]), 0.3).toarray().tolist()
    [[0.0, 0.7], [0.0, 0.3]]
    """
    kept_bp = ~(values_bp < threshold)
    if threshold == 0:
        kept_bp &= values_bp != 0
    columns = [np.flatnonzero(kept_p) for kept_p in kept_bp]
    indptr = np.concatenate([[0], np.cumsum([column.size for column in columns])])
    kind = np.int32 if max(indptr[-1], values_bp.shape[1]) < 2**31 else np.int64
    indices = np.concatenate([np.empty(0, dtype=kind), *columns], dtype=kind, casting="same_kind")
    parts = [row_p[column] for row_p, column in zip(values_bp, columns, strict=True)]
    data = np.concatenate([np.empty(0, dtype=values_bp.dtype), *parts])
    return sparse.csr_matrix((data, indices, indptr.astype(kind)), shape=values_bp.shape)
