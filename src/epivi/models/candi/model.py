"""CANDI: imputes and denoises bulk tracks with calibrated uncertainty."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import sha256
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import pandas as pd
import torch

from epivi._errors import ConfigError
from epivi.data.windows import (
    TrainingWindows,
    WindowSampler,
    fingerprint,
    split_rows,
    validation_windows,
)
from epivi.models.base import model_seed, seeded_module
from epivi.models.base_training import TrainingData, cut_rows
from epivi.models.candi.config import CandiConfig
from epivi.models.candi.module import CandiModule, CovariateScales
from epivi.models.candi.network import CandiNetwork
from epivi.models.candi.outputs.evaluation import EvaluationMixin
from epivi.models.candi.outputs.export import ExportMixin
from epivi.models.candi.outputs.latent import LatentMixin
from epivi.models.candi.outputs.ranking import RankingMixin
from epivi.models.candi.setup import SetupMixin

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData

    from epivi.train.config import TrainingConfig


class Sampling(NamedTuple):
    """Which windows are trained on, see :meth:`CANDI.train`."""

    loci: Any = "uniform"
    blacklist: pd.DataFrame | None = None
    windows_per_epoch: int | None = None
    same_locus: bool = False
    max_validation_windows: int = 512


class CANDI(SetupMixin, EvaluationMixin, RankingMixin, ExportMixin, LatentMixin):
    r"""Confidence-aware denoising and imputation of bulk tracks (Foroozandeh, Diab and Libbrecht).

    A row of obs is a biosample, not a training sample: a training sample is a biosample and a window of the genome. The
    encoder reads the tracks that exist, the DNA where it was set up, and the covariates of the experiments; the decoder
    predicts every assay at the covariates asked for, counts by a negative binomial law and the signal by a Gaussian
    one. The model sees neither the name of the biosample nor the position, so that new biosamples need no training.

    In each step k ~ U{1, ..., A - 1} assays of each sample are hidden, and counts are thinned by a factor of 1, 2 or 4.
    The loss is the sum of four means of negative log-likelihoods, over hidden assays (imputation) and shown ones
    (upsampling), of counts and of signal.

    Parameters
    ----------
    adata
        AnnData of biosamples, set up with :meth:`setup_anndata`, for example from :func:`epivi.pp.bulk.open_store`.
    registry
        Used by scvi-tools.
    size
        ``"tutorial"``, ``"test"``, ``"pilot"``, ``"paper"``, or ``"paper_code"``, the released network.
    n_bins, n_stages, expansion, n_heads, n_layers, dropout_rate, dispersion, max_distance
        Choices of the network that replace those of the size: bins of a window, stages of the towers (each halves the
        bins), growth of the channels, heads and layers of the transformer, dropout, ``"assay"`` or ``"assay-bin"``
        dispersion, largest distance that attention tells apart.
    n_features, pre_norm, skip
        Beyond the paper: features of each assay before the heads (1 in the paper), normalisation before attention, and
        whether the input also enters at full resolution before the heads. They train faster and predict better where
        there are few assays.
    head
        ``"default"``: mean and dispersion with the depth as offset; ``"paper"``: the published head.
    locus_prior
        Whether the mean track of each assay over the other training biosamples is an input. It is taken from
        ``varm[prior_key]``, or computed from the training biosamples and stored there.
    thinning, thin_each_assay
        Factors of the depth in training, and whether each assay draws its own.
    loss_weighting
        ``"equal"``, or ``"mask_fraction"``: imputation and upsampling weighted by the shares of hidden and shown
        assays, as in the released code.
    covariate_dropout_rate
        Chance that, in training, a covariate asked of the decoder is unknown, and that all of an experiment are: the
        decoder learns to predict assays of which nothing is known.
    mixup
        Alpha of the Beta(alpha, alpha) law of weights with which training biosamples are mixed in pairs at the same
        locus: signals are averaged, reads drawn from both. It helps where there are few biosamples; 0 mixes none.
    swap_rate
        Chance that, in training, an assay that is shown is that of another biosample at the same locus; the targets
        stay the sample's own. Predictions then lean on what assays agree about, and shrink where they do not; it helps
        to impute where there are few biosamples and no prior.
    hide_all_rate
        Share of samples that hide all their assays, so that the model learns to predict from the DNA or the prior.
    seed
        Seed of the weights, and of the training unless it is given another.

    Raises
    ------
    ConfigError
        If a choice is not valid, or asks for what the data lack.
    DataError
        If the data cannot be used.

    Notes
    -----
    Differences from the paper and the released code, and why, stand in the user guide.

    Examples
    --------
    >>> import epivi
    >>> adata = epivi.simulate.bulk(4, chrom_sizes=[640, 320], seed=0)
    >>> epivi.CANDI.setup_anndata(adata)
    >>> model = epivi.CANDI(adata, size="test")
    >>> model.train(max_epochs=1, enable_progress_bar=False)
    >>> tracks = model.denoise("chr1:0-5,000", ["ATAC"], ["biosample_0"])
    >>> tracks.layers["mean"].shape, list(tracks.obs_names)
    ((1, 200), ['biosample_0|ATAC'])
    """

    _sampling: Sampling = Sampling()

    def __init__(  # noqa: PLR0913
        self,
        adata: AnnData | None = None,
        registry: dict | None = None,
        *,
        size: str = "tutorial",
        n_bins: int | None = None,
        n_stages: int | None = None,
        expansion: int | None = None,
        n_heads: int | None = None,
        n_layers: int | None = None,
        dropout_rate: float | None = None,
        head: str | None = None,
        dispersion: str | None = None,
        max_distance: int | None = None,
        n_features: int | None = None,
        pre_norm: bool | None = None,
        skip: bool | None = None,
        locus_prior: bool = False,
        thinning: Sequence[int] = (1, 2, 4),
        thin_each_assay: bool = False,
        loss_weighting: str = "equal",
        covariate_dropout_rate: float = 0.1,
        mixup: float = 0.0,
        swap_rate: float = 0.0,
        hide_all_rate: float = 0.0,
        seed: int | None = None,
    ) -> None:
        chosen = {k: v for k, v in locals().items() if k not in ("self", "adata", "registry", "seed", "__class__")}
        chosen["thinning"] = tuple(thinning) if isinstance(thinning, Iterable) else thinning
        self.init_arguments = chosen | {"seed": seed}
        choices = {k: v for k, v in chosen.items() if k != "size"}
        CandiConfig.chosen(choices, size=size)  # refuse bad arguments at once
        super().__init__(adata, registry)
        self.seed = self.init_arguments["seed"] = model_seed(seed)
        state = self.state
        bin_size_bp = int(state["bin_size_bp"])
        kind = "counts" if "counts" in state["kinds"] else "signal"
        self.config = CandiConfig.chosen(choices | {"input": kind, "bin_size_bp": bin_size_bp}, size=size)
        if hide_all_rate and not (state["has_dna"] or locus_prior):
            message = "hide_all_rate is above 0, but there is neither DNA nor a prior to predict from. Leave it at 0."
            raise ConfigError(message)
        self._prepare_prior(self.adata)
        self.module = cast("CandiModule", seeded_module(self.seed, self._build_module).eval())
        self.get_normalized_function_name_ = "get_normalized_expression"
        self._model_summary_string = self._describe()

    def _build_module(self) -> CandiModule:
        state = self.state
        names = [str(name) for name in state["continuous"]]
        categories = [len(levels) for levels in state["categories"].values()]
        network = CandiNetwork(
            self.config,
            len(self.assay_names),
            len(names),
            categories,
            has_dna=bool(state["has_dna"]),
            heads=tuple(state["kinds"]),
        )
        scales = CovariateScales(
            torch.tensor([state["moments"][name]["mean"] for name in names]),
            torch.tensor([state["moments"][name]["sd"] for name in names]),
            names.index("depth") if "depth" in names else None,
            names.index("coverage") if "coverage" in names else None,
        )
        return CandiModule(self.config, network, scales)

    def _describe(self) -> str:
        state = self.state
        parts = {
            "assays": len(self.assay_names),
            "training biosamples": len(state["biosamples"]["train"]),
            "predicts": " and ".join(state["kinds"]),
            "DNA": bool(state["has_dna"]),
            "window": f"{self.config.n_bins} bins of {self.config.bin_size_bp} bp",
            "head": self.config.head,
            "locus_prior": self.config.locus_prior,
        }
        return self._described(**parts)

    def train(
        self,
        max_epochs: int | None = None,
        *,
        loci: pd.DataFrame | str = "uniform",
        blacklist: pd.DataFrame | None = None,
        windows_per_epoch: int | None = None,
        same_locus: bool = False,
        max_validation_windows: int = 512,
        **kwargs: Any,
    ) -> None:
        """Train the model.

        Parameters
        ----------
        max_epochs
            Epochs; each draws windows for every training biosample.
        loci
            ``"uniform"``: every epoch tiles the training chromosomes from a new random offset. Or a table of regions
            (chrom, start, end), such as cCREs or transcription starts: every epoch visits each, at a random place in
            the window.
        blacklist
            Regions that training windows avoid, as :func:`epivi.pp.read_blacklist` returns them.
        windows_per_epoch
            Most samples (biosample, window) of an epoch; all by default.
        same_locus
            Whether a minibatch holds one locus in many biosamples.
        max_validation_windows
            Most samples of the validation.
        kwargs
            As in :meth:`epivi.models.base.EpiModel.train`. ``train_size`` and ``validation_size`` have no effect:
            validation is on the chromosomes and biosamples of the setup.

        Raises
        ------
        ConfigError, DataError, TrainingError, CheckpointError
            As there, and if loci or blacklist cannot be used, or the data have other bins than those of the setup.
        """
        self._sampling = Sampling(loci, blacklist, windows_per_epoch, same_locus, max_validation_windows)
        super().train(max_epochs, **kwargs)

    def training_data(self, config: TrainingConfig, world_size: int) -> TrainingData:
        """Return windows of the training chromosomes and biosamples, and fixed windows for validation."""
        rows = split_rows(self.adata, self._data_state(self.adata))
        dataset = self.windows(self.adata)
        if not self._has_trained_bins(dataset):
            message = (
                "The data have other bins than those that the model was set up with, and which of them to hold out is "
                "not known. Train on the bins of the setup, or set these data up and build a new model."
            )
            raise ConfigError(message)
        genome, window, asked = self.genome_split, self.config.n_bins, self._sampling
        windows = TrainingWindows(genome.train, window, loci=asked.loci, blacklist=asked.blacklist)
        held_rows = rows["validation"] if rows["validation"].size else rows["train"]
        held_w2 = np.zeros((0, 2), dtype=np.int64)
        if len(genome.validation):
            most = asked.max_validation_windows
            held_w2 = validation_windows(genome.validation, held_rows, window, max_windows=most)
        return TrainingData(
            dataset,
            lambda rank, world: WindowSampler(
                rows["train"],
                windows,
                config.batch_size,
                config.seed,
                windows_per_epoch=asked.windows_per_epoch,
                same_locus=asked.same_locus,
                paired=self.config.is_paired,
                rank=rank,
                world_size=world,
            ),
            cut_rows(held_w2, config.batch_size, world_size),
            rows,
        )

    def fingerprint(self, config: TrainingConfig) -> dict[str, Any]:
        """Return what must agree for a run to be resumed: which windows are drawn too."""
        sampling = {key: _written(value) for key, value in self._sampling._asdict().items()}
        return super().fingerprint(config) | sampling

    def _data_fingerprint(self) -> str:
        return fingerprint(self.adata, self._data_state(self.adata))


def _written(value: Any) -> str:
    """Return a text that tells values of an argument apart; of a table a hash of all its rows."""
    if not isinstance(value, pd.DataFrame):
        return str(value)
    rows = pd.util.hash_pandas_object(value, index=False).to_numpy()
    return sha256("\n".join(map(str, value.columns)).encode() + rows.tobytes()).hexdigest()
