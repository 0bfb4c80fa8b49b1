"""EpiFoundation, as its users see it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from scvi import REGISTRY_KEYS

from epivi._errors import ConfigError, DataError
from epivi._keys import BATCH_RNA, VAR_CHROM
from epivi.data.buckets import TokenBudgetSampler, fixed_batches
from epivi.data.splits import split_cells, split_groups
from epivi.data.tokens import TokenDataset
from epivi.models.base import model_seed, seeded_module
from epivi.models.base_training import TrainingData
from epivi.models.epifoundation.config import (
    BATCH_CORRECTION,
    EXPRESSION,
    LABEL_TASKS,
    PRETRAINING,
    EpiFoundationConfig,
)
from epivi.models.epifoundation.encoding import CellEncoding, PeakColumns, Targets
from epivi.models.epifoundation.fields import CHROM_LENGTHS, CHROM_NAMES, FREQUENCY, NAMES, POSITIONS
from epivi.models.epifoundation.finetune import FinetuneMixin
from epivi.models.epifoundation.heads.local import Links, registered_links
from epivi.models.epifoundation.module import EpiFoundationModule, Vocabulary
from epivi.models.epifoundation.outputs.cells import CellsMixin
from epivi.models.epifoundation.outputs.embeddings import EmbeddingsMixin
from epivi.models.epifoundation.outputs.labels import LabelsMixin
from epivi.models.epifoundation.setup import SetupMixin
from epivi.models.epifoundation.start.mixin import StartMixin

if TYPE_CHECKING:
    from anndata import AnnData
    from mudata import MuData

    from epivi.train.config import TrainingConfig

logger = logging.getLogger(__name__)

TOKEN_BUDGET = 48_000
MOST_REPEATS = 10


class EpiFoundation(SetupMixin, StartMixin, FinetuneMixin, LabelsMixin, EmbeddingsMixin, CellsMixin):
    r"""A cell as the set of its open peaks, pretrained against the expression of the same cells (Wu et al., 2025).

    A transformer reads the open peaks of a cell, without order or values, each as the sum of the vectors of the peak
    and of its chromosome; the vector z of a leading [CLS] token is the cell's. In pretraining a gated decoder predicts
    from z, the cell's batch and the vector of a gene whether the gene is expressed, for as many expressed as silent
    genes of the cell (equations 1-10). :meth:`finetune` trains the encoder with other heads: labels (11-12) or
    expression (13-14).

    Parameters
    ----------
    adata
        MuData set up with :meth:`setup_mudata`, or AnnData of peaks set up with :meth:`setup_anndata`.
    registry
        Used by scvi-tools.
    size
        ``"tutorial"``, ``"test"`` or ``"paper"``.
    task
        ``"pretraining"``; other tasks are for :meth:`finetune`, or to train from scratch.
    width, n_layers, n_heads, n_hidden, n_gate, max_peaks, max_genes, dropout_rate
        Choices that replace those of the size: width of all vectors, layers and heads of the encoder, units of its
        feed-forward networks, units of the decoders, peaks read of a cell and genes scored in a step.
    peak_dim
        Width of the peak table before a linear layer; for vocabularies above 200,000 peaks.
    positions
        ``"chromosome"`` as in the paper; ``"genome"``: also learned bins of the genome at three scales, so that peaks
        that were never seen have a meaning; ``"none"``.
    peak_identity
        Whether each peak has a vector of its own.
    peak_init
        ``"random"``, or ``"lsi"``, the default of the size "tutorial": peaks start at the mean LSI coordinates of the
        training cells where they are open, so that the label-free vectors start near LSI.
    masked_peak_weight, masked_peak_rate
        Weight of a further objective of pretraining, to tell hidden open peaks from closed ones, and the share of
        peaks hidden. By default 0 where there is expression, and 1 where there is none.
    batch_adversary
        Weight of an adversary that keeps z from telling the batch.
    count_levels
        Whether tokens tell counts of 1, 2 and more.
    expression_target, n_levels
        What the task ``"expression"`` predicts: ``"lognorm"``, log-normalised values, or ``"level"``, ranks within the
        cell in so many levels, as the paper.
    linear_readout
        Whether a linear map of the cell vector that starts at a ridge regression of reduced rank is added to the gated
        decoder of genes; by default in the size "tutorial".
    local_readout_bp
        For the task ``"expression"``: each gene is also read directly off the open peaks whose midpoints lie in its
        body or at most so many bp from it, by a linear map that starts at a ridge regression. By default 50,000 in the
        size "tutorial" where peaks and genes have positions, else 0, which has none. Beyond the paper.
    checkpoint
        Whether activations are computed again in the backward pass: less memory, more time.
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
    >>> mdata = epivi.simulate.linked_multiome(60, n_peaks=80, n_genes=20, seed=0)
    >>> epivi.EpiFoundation.setup_mudata(mdata, labels_key="cell_type")
    >>> model = epivi.EpiFoundation(mdata, size="test")
    >>> model.train(max_epochs=1, enable_progress_bar=False)
    >>> model.get_latent_representation().shape
    (60, 32)
    """

    _split_key: str | None = None
    _token_budget: int = TOKEN_BUDGET

    def __init__(  # noqa: PLR0913
        self,
        adata: AnnData | MuData | None = None,
        registry: dict | None = None,
        *,
        size: str = "tutorial",
        task: str = PRETRAINING,
        width: int | None = None,
        n_layers: int | None = None,
        n_heads: int | None = None,
        n_hidden: int | None = None,
        n_gate: int | None = None,
        max_peaks: int | None = None,
        max_genes: int | None = None,
        dropout_rate: float | None = None,
        peak_dim: int | None = None,
        positions: str = "chromosome",
        peak_identity: bool = True,
        peak_init: str | None = None,
        masked_peak_weight: float | None = None,
        masked_peak_rate: float = 0.15,
        batch_adversary: float = 0.0,
        count_levels: bool = False,
        expression_target: str = "lognorm",
        n_levels: int = 10,
        linear_readout: bool | None = None,
        local_readout_bp: int | None = None,
        checkpoint: bool = False,
        seed: int | None = None,
    ) -> None:
        chosen = {k: v for k, v in locals().items() if k not in ("self", "adata", "registry", "seed", "__class__")}
        self.init_arguments = chosen | {"seed": seed}
        choices = {k: v for k, v in chosen.items() if k != "size"}
        EpiFoundationConfig.chosen(choices, size=size)  # refuse bad arguments at once
        super().__init__(adata, registry)
        self.seed = self.init_arguments["seed"] = model_seed(seed)
        if masked_peak_weight is None:
            choices["masked_peak_weight"] = float(not self.gene_names.size)
        self.config = self._with_places(EpiFoundationConfig.chosen(choices, size=size))
        self._check_task()
        self.module = cast("EpiFoundationModule", seeded_module(self.seed, self._build_module).eval())
        self.get_normalized_function_name_ = "get_normalized_expression"
        self._model_summary_string = self._describe()

    def _with_places(self, config: EpiFoundationConfig) -> EpiFoundationConfig:
        """Return the choices without chromosomes where the peaks have none."""
        if len(self._field_state(REGISTRY_KEYS.X_KEY)[CHROM_NAMES]) or config.positions == "none":
            return config
        if config.positions == "genome":
            message = "positions='genome' needs peaks with positions: columns chrom, start, end of var, or their names."
            raise ConfigError(message)
        logger.warning("The peaks have no positions (chrom, start, end of var, or names): chromosomes are not told.")
        return config.for_task(config.task, positions="none")

    def _check_task(self) -> None:
        """Check that the data have what the task needs."""
        task = self.config.task
        if task == EXPRESSION and not self.gene_names.size:
            message = "task='expression' needs expression: set up a MuData with setup_mudata()."
            raise ConfigError(message)
        if task in LABEL_TASKS and len(self.classes) < 2:
            message = (
                f"task='{task}' needs at least two classes, found {len(self.classes)}: name a column of cell types "
                "with labels_key= at setup."
            )
            raise ConfigError(message)
        if task == PRETRAINING and not self.gene_names.size and not self.config.masked_peak_weight:
            message = "Without expression, pretraining needs the masked-peak objective: masked_peak_weight=1."
            raise ConfigError(message)

    @property
    def gene_names(self) -> np.ndarray:  # type: ignore[override]
        """Genes of the vocabulary, shape (n,); empty where the model was set up without expression."""
        return np.asarray(self._field_state(BATCH_RNA)[NAMES])

    @property
    def chromosomes(self) -> list[str]:  # type: ignore[override]
        """Chromosomes of the vocabulary, in the order of their codes."""
        return [str(name) for name in self._field_state(REGISTRY_KEYS.X_KEY)[CHROM_NAMES]]

    def _setup_argument(self, name: str) -> Any:
        return self.registry["setup_args"].get(name)

    @property
    def classes(self) -> list[str]:  # type: ignore[override]
        """Cell types of the setup, without the category of unlabeled cells."""
        if self._setup_argument("labels_key") is None:
            return []
        named = [str(c) for c in self._field_state(REGISTRY_KEYS.LABELS_KEY)["categorical_mapping"]]
        unlabeled = self._setup_argument("unlabeled_category")
        return [name for name in named if unlabeled is None or name != str(unlabeled)]

    def _build_module(self) -> EpiFoundationModule:
        peaks, genes = self._field_state(REGISTRY_KEYS.X_KEY), self._field_state(BATCH_RNA)
        n_genes = self.gene_names.size
        links = self._links() if self.config.task == EXPRESSION and self.config.local_readout_bp else None
        code = {name: number + 1 for number, name in enumerate(self.chromosomes)}
        chrom = [code.get(str(name), 0) for name in genes.get("chrom", [])] or [0] * n_genes
        position = genes.get(POSITIONS, [])
        frequency = torch.as_tensor(np.asarray(genes.get(FREQUENCY, []), dtype=np.float64))
        vocabulary = Vocabulary(
            len(self.feature_names),
            tuple(int(n) for n in peaks[CHROM_LENGTHS]),
            torch.tensor(chrom, dtype=torch.long),
            torch.as_tensor(np.asarray(position if len(position) else [-1] * n_genes, dtype=np.int64)),
            torch.logit(frequency),
            self.summary_stats.n_batch,
            len(self.classes),
            links,
        )
        module = EpiFoundationModule(self.config, vocabulary)
        if self.config.peak_init == "lsi" and self.adata is not None:
            self._start_from_lsi(module)
        # data of a model that was trained before may lack expression
        predicts_genes = self.config.task in (PRETRAINING, EXPRESSION)
        if predicts_genes and self.adata is not None and BATCH_RNA in self.adata_manager.data_registry:
            self._start_from_means(module)
        return module

    def _links(self) -> Links | None:
        """Return the peaks near each gene; ``None`` without positions, if they were not asked for by the user."""
        peaks, genes, window_bp = (
            self._field_state(REGISTRY_KEYS.X_KEY),
            self._field_state(BATCH_RNA),
            self.config.local_readout_bp,
        )
        links = registered_links(peaks, genes, window_bp)
        if links is not None and links.peak_l.size:
            return links
        if self.init_arguments["local_readout_bp"]:
            message = f"local_readout_bp={window_bp} needs to know which peaks lie near a gene: "
            if links is None:
                message += (
                    "give the genes columns chrom, start and end in rna.var, and the peaks the same or their names."
                )
            else:
                found = [str(name) for name in np.unique(genes[VAR_CHROM])[:3]]
                message += (
                    f"none does (chromosomes of the genes {found}, of the peaks {self.chromosomes[:3]}). Are they "
                    "written alike, and of one genome?"
                )
            raise ConfigError(message)
        return None

    def _encoding(self, adata: AnnData | MuData, *, targets: bool) -> CellEncoding:
        """Return what turns registered rows of data into tokens."""
        state = self.get_anndata_manager(adata, required=True).registry["field_registries"]
        columns = PeakColumns.of(state[REGISTRY_KEYS.X_KEY]["state_registry"])
        if "query_rows" in state[REGISTRY_KEYS.X_KEY]["state_registry"] and self.config.positions != "genome":
            message = "Peaks can be read by position only by a model with positions='genome'. Project them instead."
            raise ConfigError(message)
        scored = None
        if targets:
            named = state[REGISTRY_KEYS.LABELS_KEY]["state_registry"].get("categorical_mapping", ["0"])
            classes = {name: number for number, name in enumerate(self.classes)}
            class_of_code = np.array([classes.get(str(name), -1) for name in named])
            kind = str(self._field_state(BATCH_RNA).get("kind", "counts"))
            scored = Targets(self.gene_names.size, kind, class_of_code)
        return CellEncoding(adata.obs_names, columns, self.config, seed=self.seed, targets=scored)

    def train(
        self,
        max_epochs: int | None = None,
        *,
        split_key: str | None = None,
        token_budget: int = TOKEN_BUDGET,
        **kwargs: Any,
    ) -> None:
        """Train the model.

        Parameters
        ----------
        max_epochs
            Passes over the training cells.
        split_key
            Column of obs, such as the donor, whose groups are not torn apart by the split into training and validation.
        token_budget
            Most padded tokens of a minibatch; cells of similar length go together.
        kwargs
            As in :meth:`epivi.models.base.EpiModel.train`; ``precision="bf16-mixed"`` and
            ``accumulate_grad_batches=k`` are those of Lightning.

        Raises
        ------
        ConfigError, DataError, TrainingError, CheckpointError
            As there.

        Notes
        -----
        Where fewer than 20 of the validation cells would have a label, a model for labels trains on all cells, without
        early stopping, unless ``train_size``, ``validation_size`` or ``early_stopping`` are given.
        """
        self._split_key, self._token_budget = split_key, token_budget
        if self.config.task in LABEL_TASKS and self.adata is not None:
            kwargs = self._without_few_labels(kwargs)
        super().train(max_epochs, **kwargs)
        if self.config.task in LABEL_TASKS:
            self._calibrate()

    def training_data(self, config: TrainingConfig, world_size: int) -> TrainingData:
        """Return cells as tokens, split at random or by group, in minibatches of similar length."""
        splits = self._splits(config)
        if not self.is_trained_:
            self._standardise(splits["train"])
            self._start_readouts(splits)
        lengths = self._lengths(self.adata)
        rows = self._balanced(splits["train"], config.seed)
        dataset = TokenDataset(self.adata_manager.create_torch_dataset(), self._encoding(self.adata, targets=True))
        return TrainingData(
            dataset,
            lambda rank, world: TokenBudgetSampler(
                rows, lengths, config.batch_size, self._token_budget, config.seed, rank=rank, world_size=world
            ),
            fixed_batches(splits["validation"], lengths, config.batch_size, self._token_budget, world_size=world_size)
            if splits["validation"].size
            else [],
            splits,
        )

    def _splits(self, config: TrainingConfig) -> dict[str, np.ndarray]:
        """Return the rows to train on, to validate on, and neither."""
        shares = (config.train_size, config.validation_size, config.seed)
        if self._split_key is None:
            return split_cells(self.adata.n_obs, *shares)
        if self._split_key not in self.adata.obs:
            message = f"split_key='{self._split_key}' is no column of obs."
            raise DataError(message)
        return split_groups(self.adata.obs[self._split_key].astype(str).to_numpy(), *shares)

    def _balanced(self, rows: np.ndarray, seed: int) -> np.ndarray:
        """Return the training rows; for batch correction those of small batches several times."""
        if self.config.task != BATCH_CORRECTION or self.summary_stats.n_batch < 2:
            return rows
        codes = self._registered(REGISTRY_KEYS.BATCH_KEY)[rows]
        sizes = np.bincount(codes)
        rng = np.random.default_rng([seed, 0xBA7C])
        parts = []
        for code in np.unique(codes):
            own = rows[codes == code]
            n = min(int(sizes.max()), MOST_REPEATS * own.size)
            parts += [np.tile(own, n // own.size), rng.choice(own, n % own.size, replace=False)]
        return np.sort(np.concatenate(parts))

    def fingerprint(self, config: TrainingConfig) -> dict[str, Any]:
        """Return what must agree for a run to be resumed: split and token budget too."""
        return super().fingerprint(config) | {"split_key": self._split_key, "token_budget": self._token_budget}

    def _describe(self) -> str:
        return self._described(
            task=self.config.task,
            peaks=len(self.feature_names),
            genes=self.gene_names.size,
            width=self.config.width,
            layers=self.config.n_layers,
            batches=self.summary_stats.n_batch,
            classes=len(self.classes),
        )
