"""SAILER, as its users see it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from scvi import REGISTRY_KEYS

from epivi._keys import BATCH_DEPTH, BATCH_INDICES, BATCH_VALUES
from epivi.data.fields import CHROMOSOMES, DENSITY, MEAN, OPEN_PER_PEAK, SD
from epivi.models.base import EpiModel, model_seed, seeded_module
from epivi.models.base_setup import ObsKeys, check_transfer, register
from epivi.models.sailer.config import LINEAR_BELOW, SailerConfig
from epivi.models.sailer.differential import DifferentialMixin
from epivi.models.sailer.module import SailerModule
from epivi.models.sailer.outputs import OutputsMixin
from epivi.models.sailer.query import PeakQueryMixin
from epivi.models.sailer.setup import accessibility_fields, peak_blocks
from epivi.nn.covariates import DecoderCovariates

if TYPE_CHECKING:
    from anndata import AnnData

logger = logging.getLogger(__name__)

# cells whose open peaks are counted at once: as many as a minibatch, so that set-up needs no more memory than a step
ROWS_COUNTED = 128


class SAILER(OutputsMixin, DifferentialMixin, PeakQueryMixin, EpiModel):
    r"""Accessibility latents that do not depend on depth and batch (Cao et al., Bioinformatics 2021).

    A variational autoencoder of binary accessibility whose decoder is given the confounders c (log depth, batch,
    further covariates) and whose encoder is not. Its loss adds to the negative ELBO a bound on the information between
    the latent z and c (equations 2.5-2.6 and 2.14 of the thesis):

    .. math::
        L = E[\mathrm{KL}(q(z|x) \| p(z)) + \lambda\,\mathrm{KL}(q(z|x) \| q(z))]
            - (1 + \lambda)\, E \log p(x|z,c)

    with the second KL replaced by its mean over the pairs of a minibatch, computed exactly in O(b d).

    Parameters
    ----------
    adata
        AnnData of peaks or bins (cells × peaks), set up with :meth:`setup_anndata`; one that was not is set up with the
        defaults.
    encoder
        ``"chromosome"``: one network a chromosome before common heads, the default where peaks carry chromosomes;
        ``"dense"``: the network of the thesis, p-1000-100-d; ``"linear"``: a linear map and a linear decoder, beyond
        the paper, for sets of a few thousand cells or fewer.
    n_latent
        Latent dimensions d; by default 10, or 20 for the linear encoder.
    n_hidden
        Units of the two hidden layers; by default (64, 32) a chromosome, or (1000, 100).
    dropout_rate
        Dropout after hidden activations.
    input_transform
        What the encoder reads: ``"binary"`` open peaks as in the paper, or ``"tfidf"``, open peaks weighted by inverse
        document frequency in rows of equal length. By default ``"tfidf"`` for the linear encoder, else ``"binary"``.
    input_dropout_rate
        Share of open peaks hidden from the encoder in training; by default 0.75 for the linear encoder, else 0.
    likelihood
        ``"bernoulli"``: entries are open or closed, as in the paper; ``"poisson"``: entries are counts (of fragments),
        with rates that are shares of the cell's count.
    open_weight
        Weight omega of open entries in the likelihood; ``"auto"`` is the ratio of closed to open entries, at most 30.
        Probabilities are calibrated for it. By default 1 for the linear encoder, else ``"auto"``.
    invariance_weight
        Weight lambda of the information term.
    kl_scale
        Factor of both KL terms against the reconstruction; 1 in the paper, and by default 0.1 for the linear encoder.
    information_bound
        ``"pairwise"`` (the paper), ``"mixture"`` (Kolchinsky and Tracey, tighter but a worse regulariser) or
        ``"none"``.
    loss_preset
        ``"epivi"``, or ``"released_code"``: the weighting of the released code, which is not a bound, for comparison.
    use_covariates
        If false the decoder is given nothing: the ablation against which invariance is measured.
    batch_norm_momentum, batch_norm_eps
        Of the batch normalisation.
    kernels
        How the layers that touch all peaks are computed on the CPU: ``"auto"``, compiled, with products of training
        steps in bfloat16 where the processor has them (weights, sums and optimiser stay in single precision);
        ``"float32"``, compiled in single precision; ``"plain"``, by torch. On a GPU torch computes them always.
    seed
        Seed of the weights, and of the training unless it is given another; by default that of scvi-tools, else 0.

    Raises
    ------
    ConfigError
        If an argument is outside its range.
    DataError
        If ``encoder="chromosome"`` and the peaks carry no chromosomes, or the data cannot be used.

    Notes
    -----
    Where this differs from the thesis and the released code, and why, stands in the user guide. The latent is invariant
    because the decoder knows the confounders and the information term compresses the rest; no term penalises the
    information between z and c directly.

    Examples
    --------
    >>> import epivi
    >>> adata = epivi.simulate.accessibility([60, 60], n_fg=300, n_bg=300, median=150, clip=(50, 500))
    >>> epivi.SAILER.setup_anndata(adata, batch_key="batch")
    >>> model = epivi.SAILER(adata, n_latent=5)
    >>> model.train(max_epochs=2, enable_progress_bar=False)
    >>> model.get_latent_representation().shape
    (120, 5)
    """

    _module_cls: ClassVar[type[SailerModule]] = SailerModule
    _config_cls: ClassVar[type[SailerConfig]] = SailerConfig

    def __init__(  # noqa: PLR0913
        self,
        adata: AnnData | None = None,
        registry: dict | None = None,
        *,
        encoder: str | None = None,
        n_latent: int | None = None,
        n_hidden: tuple[int, int] | None = None,
        dropout_rate: float = 0.0,
        input_transform: str | None = None,
        input_dropout_rate: float | None = None,
        likelihood: str = "bernoulli",
        open_weight: float | str | None = None,
        invariance_weight: float = 1.0,
        kl_scale: float | None = None,
        information_bound: str = "pairwise",
        loss_preset: str = "epivi",
        use_covariates: bool = True,
        batch_norm_momentum: float = 0.1,
        batch_norm_eps: float = 1e-5,
        kernels: str = "auto",
        seed: int | None = None,
    ) -> None:
        chosen = {k: v for k, v in locals().items() if k not in ("self", "adata", "registry", "seed", "__class__")}
        self._start(adata, registry, chosen, seed)

    def _start(self, adata: AnnData | None, registry: dict | None, chosen: dict[str, Any], seed: int | None) -> None:
        """Build the model from the constructor's arguments."""
        self.init_arguments = chosen | {"seed": seed}
        self._config_cls.chosen(chosen, has_chromosomes=True, open_per_peak=0.0)  # refuse bad arguments at once
        super().__init__(adata, registry)
        self.seed = self.init_arguments["seed"] = model_seed(seed)
        x_state = self._field_state(REGISTRY_KEYS.X_KEY)
        chromosomes = x_state.get(CHROMOSOMES)
        chromosomes = None if chromosomes is None else np.asarray(chromosomes)
        self.config = self._config_cls.chosen(
            chosen, has_chromosomes=chromosomes is not None, open_per_peak=x_state[OPEN_PER_PEAK]
        )
        self._hint_at_few_cells(chosen["encoder"], x_state[OPEN_PER_PEAK])
        blocks = peak_blocks(self.config.encoder, self.summary_stats.n_vars, chromosomes)
        self.module = seeded_module(self.seed, lambda: self._build_module(blocks)).eval()
        self.get_normalized_function_name_ = "get_normalized_accessibility"
        self._model_summary_string = self._describe(len(blocks.sizes))

    def _hint_at_few_cells(self, encoder: str | None, open_per_peak: float) -> None:
        if encoder == "auto":
            logger.info("encoder='%s': a peak is open in %.0f cells on average.", self.config.encoder, open_per_peak)
        elif encoder is None and open_per_peak < LINEAR_BELOW:
            logger.warning(
                "A peak is open in %.0f cells on average, fewer than the %.0f weights a peak of the %s network. "
                "encoder='auto' takes a linear one for such data.",
                open_per_peak,
                LINEAR_BELOW,
                self.config.encoder,
            )

    def _build_module(self, blocks: Any) -> SailerModule:
        x_state = self._field_state(REGISTRY_KEYS.X_KEY)
        more = {} if self.adata is None else self._of_data()
        return self._module_cls(
            self.config,
            blocks,
            self._covariates(),
            open_weight=self.config.resolve_open_weight(x_state[DENSITY]),
            **more,
            **self._module_arguments(),
        )

    def _module_arguments(self) -> dict[str, Any]:
        """Return what the module of a subclass needs beside that of SAILER."""
        return {}

    def _of_data(self) -> dict[str, Any]:
        """Share of cells in which each peak is open, in the trained order; mean number of open peaks; count a depth."""
        dataset = self.adata_manager.create_torch_dataset(data_and_attributes=[REGISTRY_KEYS.X_KEY])
        total, count = np.zeros(self.summary_stats.n_vars), 0.0
        for start in range(0, len(dataset), ROWS_COUNTED):
            rows = dataset[np.arange(start, min(start + ROWS_COUNTED, len(dataset)))]
            total += np.bincount(rows[BATCH_INDICES].numpy(), minlength=total.size)
            count += float(rows[BATCH_VALUES].double().sum())
        return {
            "frequency": torch.from_numpy((total / len(dataset)).astype(np.float32)),
            "mean_open": float(total.sum() / len(dataset)),
            "counts_per_depth": count / float(self._registered(BATCH_DEPTH).sum(dtype=np.float64)),
        }

    def _covariates(self) -> DecoderCovariates:
        depth = self._field_state(BATCH_DEPTH)
        return DecoderCovariates(depth[MEAN], depth[SD], **self._covariate_sizes())

    def _describe(self, n_blocks: int) -> str:
        parts = {
            "encoder": self.config.encoder,
            "peaks": self.summary_stats.n_vars,
            "blocks": n_blocks,
            "n_latent": self.config.n_latent,
            "batches": self.summary_stats.n_batch,
            "open_weight": round(float(self.module.open_weight), 2),
        }
        return self._described(**parts)

    @classmethod
    def setup_anndata(
        cls,
        adata: AnnData,
        layer: str | None = None,
        batch_key: str | None = None,
        labels_key: str | None = None,
        depth_key: str | None = None,
        categorical_covariate_keys: list[str] | None = None,
        continuous_covariate_keys: list[str] | None = None,
        chrom_key: str = "chrom",
        **kwargs: Any,
    ) -> None:
        """Check the data and register what the model reads.

        Parameters
        ----------
        adata
            Cells × peaks; counts or 0/1, sparse or dense, in memory or backed. They are read as open or closed.
        layer
            Layer of the counts; X by default.
        batch_key, labels_key
            Columns of obs: sample and cell type.
        depth_key
            Column of obs with positive depths; by default the number of open peaks of each cell.
        categorical_covariate_keys, continuous_covariate_keys
            Further columns of obs that the decoder is given.
        chrom_key
            Column of var with the chromosome of each peak.
        kwargs
            Used by scvi-tools to transfer a setup.

        Raises
        ------
        DataError
            If the data cannot be used; the message says what was found, where, and what to do.
        ConfigError
            If a key is named twice.
        """
        setup_method_args = cls._get_setup_method_args(**locals())
        check_transfer(cls.setup_anndata, kwargs)
        keys = ObsKeys.of(setup_method_args)
        fields = accessibility_fields(adata, layer, depth_key, keys, chrom_key)
        register(cls, adata, fields, setup_method_args, kwargs)
