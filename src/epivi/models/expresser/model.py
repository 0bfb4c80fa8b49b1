"""Expresser: vectors of genes and imputed expression, from hiding expressed genes and predicting their values."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from scipy import sparse
from scvi import REGISTRY_KEYS

from epivi import _validate
from epivi._errors import ConfigError
from epivi._keys import OBS_N_EXPRESSED
from epivi.data.buckets import TokenBudgetSampler, fixed_batches
from epivi.data.sparse import SparseReader
from epivi.data.splits import split_cells
from epivi.data.tokens import TokenDataset
from epivi.models.base import model_seed, seeded_module
from epivi.models.base_training import TrainingData
from epivi.models.expresser.config import ExpresserConfig
from epivi.models.expresser.fields import KIND, LOGNORM, N_REPORTED, bin_occupancy
from epivi.models.expresser.module import ExpresserModule
from epivi.models.expresser.outputs.genes import GenesMixin
from epivi.models.expresser.outputs.imputation import ImputationMixin
from epivi.models.expresser.outputs.latent import LatentMixin
from epivi.models.expresser.outputs.network import NetworkMixin
from epivi.models.expresser.query import QueryMixin
from epivi.models.expresser.setup import SetupMixin
from epivi.models.expresser.start import correlation_loadings

if TYPE_CHECKING:
    from anndata import AnnData

    from epivi.data.disk import BlockDataset, BlockSampler, DiskRows
    from epivi.train.config import TrainingConfig

logger = logging.getLogger(__name__)

SPLITS = ("cells", "batch")
LOADERS = ("rows", "annbatch")
BLOCK_SIZE = 8192
# cells from which the vectors of genes start, and the root mean square of the vectors: at 0.02, that of random tables,
# training soon moves them away; from 1 on they are slow to follow it
CELLS_OF_START, START_SD = 20_000, 0.5


class Expresser(SetupMixin, ImputationMixin, GenesMixin, LatentMixin, NetworkMixin, QueryMixin):
    r"""Expression transformer: pretrained vectors of genes, imputation of expression (Cao, thesis, chapter 4).

    A cell is the set of its expressed genes. An encoder reads their identities; in every step the values of a share of
    them are hidden, and a decoder predicts these. Its queries are hidden genes, its keys observed genes in context,
    its values tokens of how highly the observed genes are expressed, relative to the highest of the cell: so what is
    learned of genes lies in identities, what is told of a cell in values.

    .. math::
        \hat X_\psi = \mathrm{softplus}\,\mathrm{MLP}\big([\mathrm{softmax}(T'_\psi W_Q (T'_\phi W_K)^T / \sqrt e)\,
        E_\phi W_V,\; L]\big)

    Parameters
    ----------
    adata
        AnnData of genes, set up with :meth:`setup_anndata`.
    registry
        Used by scvi-tools.
    size
        ``"tutorial"``, ``"test"`` or ``"paper"``.
    width, n_layers, n_heads, n_hidden, n_bins, max_genes, dropout_rate
        Choices of the network that replace those of the size.
    mask_rate
        Share of the expressed genes of a cell that is hidden.
    decoder
        ``"expression"``, or ``"encoder"`` for the ablation without decoder.
    binning
        ``"relative"`` bins up to the cell's maximum; ``"count"``: counts as they are; ``"residual"``: what the
        additive baseline leaves of a value.
    leaky_normalization
        Size factor and maximum of the whole cell, hidden genes included, as in the thesis.
    likelihood
        ``"mse"``, or ``"gaussian"``, which gives intervals.
    reduction
        ``"mean"`` or ``"sum"`` over the hidden genes of a cell.
    baseline
        ``"none"``, or ``"additive"``: the network starts from the mean of the gene plus the shift of the cell.
    gene_init
        ``"random"``, or ``"correlation"``, the default of the size "tutorial": vectors of genes start at the loadings
        of the genes on the components of their correlations over the training cells.
    detection
        Whether a head learns how probable it is that a gene is expressed at all.
    checkpoint
        Compute activations again in the backward pass, to save memory.
    seed
        Seed of the weights, and of the training unless it is given another.

    Raises
    ------
    ConfigError
        If a choice is not valid or does not fit the data.
    DataError
        If the data cannot be used.

    Notes
    -----
    Differences from the thesis, and why, stand in the user guide.

    Examples
    --------
    >>> import anndata as ad, numpy as np, epivi
    >>> counts = np.random.default_rng(0).poisson(1.0, (40, 30)).astype("float32")
    >>> adata = ad.AnnData(counts)
    >>> epivi.Expresser.setup_anndata(adata)
    >>> model = epivi.Expresser(adata, size="test")
    >>> model.train(max_epochs=1, enable_progress_bar=False)
    >>> model.get_gene_embeddings().shape, model.get_latent_representation().shape
    ((30, 32), (40, 32))
    """

    _split_by: str = "cells"
    _loader: str = "rows"
    _block_size: int = BLOCK_SIZE

    def __init__(  # noqa: PLR0913
        self,
        adata: AnnData | None = None,
        registry: dict | None = None,
        *,
        size: str = "tutorial",
        width: int | None = None,
        n_layers: int | None = None,
        n_heads: int | None = None,
        n_hidden: int | None = None,
        n_bins: int | None = None,
        max_genes: int | None = None,
        mask_rate: float = 0.15,
        dropout_rate: float | None = None,
        decoder: str = "expression",
        binning: str = "relative",
        leaky_normalization: bool = False,
        likelihood: str = "mse",
        reduction: str = "mean",
        baseline: str = "none",
        gene_init: str | None = None,
        detection: bool = False,
        checkpoint: bool = False,
        seed: int | None = None,
    ) -> None:
        chosen = {k: v for k, v in locals().items() if k not in ("self", "adata", "registry", "seed", "__class__")}
        self.init_arguments = chosen | {"seed": seed}
        # bad arguments are refused before the data are read
        config = ExpresserConfig.chosen({k: v for k, v in chosen.items() if k != "size"}, size=size)
        super().__init__(adata, registry)
        self.seed = self.init_arguments["seed"] = model_seed(seed)
        self.config = config
        if str(self._field_state(REGISTRY_KEYS.X_KEY)[KIND]) == LOGNORM and binning == "count":
            message = "binning='count' needs counts, and the data are log-normalised. Take binning='relative'."
            raise ConfigError(message)
        n_genes = len(self.feature_names)
        self.module = cast("ExpresserModule", seeded_module(self.seed, lambda: ExpresserModule(config, n_genes)).eval())
        self.get_normalized_function_name_ = "get_normalized_expression"
        self._model_summary_string = self._described(
            genes=f"{n_genes:,}", layers=config.n_layers, width=config.width, decoder=config.decoder
        )

        if self.adata is not None:
            self._report_bins()

    def _report_bins(self) -> None:
        """Say how the values fall into the bins, from some thousand cells."""
        if self.config.binning != "relative" or str(self._field_state(REGISTRY_KEYS.X_KEY)[KIND]) == LOGNORM:
            return
        rows = np.unique(np.linspace(0, self.adata.n_obs - 1, min(self.adata.n_obs, N_REPORTED)).astype(np.int64))
        counts = SparseReader(self.adata_manager.get_from_registry(REGISTRY_KEYS.X_KEY)).rows(rows)
        report = bin_occupancy(counts, self.config.n_bins)
        logger.info(
            "Values of %d cells fill %d of %d bins (%.1f of equal use); %.0f%% are counts of 1, which share a value in "
            "each cell. binning='count' takes counts as bins.",
            rows.size,
            report["n_occupied"],
            self.config.n_bins,
            report["n_effective"],
            100 * report["single_counts"],
        )

    def train(
        self,
        max_epochs: int | None = None,
        *,
        split_by: str = "cells",
        loader: str = "rows",
        block_size: int = BLOCK_SIZE,
        **kwargs: Any,
    ) -> None:
        """Train the model.

        Parameters
        ----------
        max_epochs
            Passes over the training cells.
        split_by
            ``"cells"``: validation cells are drawn at random; ``"batch"``: whole batches of the setup's ``batch_key``
            are held out.
        loader
            ``"rows"``: cells are drawn from all of the data, and read minibatch by minibatch where these are on disk;
            ``"annbatch"``: for zarr stores (:func:`epivi.data.disk.open_collection`), blocks of random chunks of rows
            are read in turn, and minibatches are drawn from the block in memory.
        block_size
            Cells that ``loader="annbatch"`` holds in memory.
        kwargs
            As in :meth:`epivi.models.base.EpiModel.train`.

        Raises
        ------
        ConfigError, TrainingError, CheckpointError
            As there, if there are fewer than two batches to split by, or if the data or the arguments do not fit the
            loader.
        """
        _validate.check_choice(split_by, "split_by", SPLITS)
        _validate.check_choice(loader, "loader", LOADERS)
        _validate.check_number(block_size, "block_size", low=2, integer=True)
        if loader == "annbatch" and kwargs.get("num_workers"):
            message = "loader='annbatch' reads in the process that trains: leave num_workers out."
            raise ConfigError(message)
        self._split_by, self._loader, self._block_size = split_by, loader, int(block_size)
        super().train(max_epochs, **kwargs)

    def training_data(self, config: TrainingConfig, world_size: int) -> TrainingData:
        """Return minibatches of cells of similar length, genes hidden anew in every epoch."""
        splits = self._splits(config)
        source = self.adata_manager.create_torch_dataset()
        # refused before a pass over the data
        matrix = self._disk_rows(source) if self._loader == "annbatch" else None
        if self.config.baseline == "additive":
            self._learn_gene_means(splits["train"])
        if self.config.gene_init == "correlation" and not self.is_trained_:
            self._start_genes(splits["train"], config.seed)
        lengths = np.minimum(self.adata.obs[OBS_N_EXPRESSED].to_numpy(), self.config.max_genes)
        budget = config.batch_size * self.config.max_genes
        seed = config.seed
        encoding = self._encoding(self.adata, seed=seed)
        if matrix is not None:
            from epivi.data.disk import BlockDataset

            return self._blocks(BlockDataset(source, encoding, matrix), splits, lengths, config, world_size)

        def sampler(rank: int, world: int) -> TokenBudgetSampler:
            return TokenBudgetSampler(
                splits["train"], lengths, config.batch_size, budget, seed, rank=rank, world_size=world
            )

        held = splits["validation"]
        validation = fixed_batches(held, lengths, config.batch_size, budget, world_size=world_size)
        return TrainingData(TokenDataset(source, encoding), sampler, cast("list[Any]", validation), splits)

    @staticmethod
    def _disk_rows(source: Any) -> DiskRows:
        """Return the matrix that a dataset reads, as one whose rows can be held."""
        from epivi.data.disk import rows_on_disk

        reader = next(reader for reader in source.readers if isinstance(reader, SparseReader))
        reader.matrix = rows_on_disk(reader.matrix)
        return reader.matrix

    def _blocks(
        self,
        dataset: BlockDataset,
        splits: dict[str, np.ndarray],
        lengths: np.ndarray,
        config: TrainingConfig,
        world_size: int,
    ) -> TrainingData:
        """Return minibatches from blocks of rows that are read in turn."""
        from epivi.data.disk import BlockSampler, block_batches

        size, block_size = config.batch_size, self._block_size

        def sampler(rank: int, world: int) -> BlockSampler:
            options = {"seed": config.seed, "block_size": block_size, "rank": rank, "world_size": world}
            return BlockSampler(splits["train"], lengths, size, **options)

        validation = block_batches(
            splits["validation"],
            lengths,
            size,
            size * self.config.max_genes,
            block_size=block_size,
            world_size=world_size,
        )
        return TrainingData(dataset, sampler, cast("list[Any]", validation), splits)

    def _splits(self, config: TrainingConfig) -> dict[str, np.ndarray]:
        """Return rows for training, validation and test, by cells or by batches."""
        shares = (config.train_size, config.validation_size, config.seed)
        if self._split_by == "cells":
            return split_cells(self.adata.n_obs, *shares)
        key = self.registry["setup_args"].get("batch_key")
        codes = np.zeros(self.adata.n_obs, dtype=int) if key is None else self.adata.obs[key].astype(str).to_numpy()
        names, codes = np.unique(codes, return_inverse=True)
        if names.size < 2:
            message = f"split_by='batch' needs two batches or more; batch_key={key!r} has {names.size}."
            raise ConfigError(message)
        n_train = int(np.clip(round(config.train_size * names.size), 1, names.size - 1))
        order = np.random.default_rng([config.seed, 0x5917]).permutation(names.size)
        is_train = np.isin(codes, order[:n_train])
        rows = {"train": np.flatnonzero(is_train), "validation": np.flatnonzero(~is_train)}
        return rows | {"test": np.array([], dtype=np.int64)}

    @torch.no_grad()
    def _learn_gene_means(self, rows: np.ndarray) -> None:
        """Set the mean of each gene over the training cells that express it; unknown genes get the overall mean."""
        n = len(self.feature_names) + 1
        sum_g, n_g = np.zeros(n), np.zeros(n)
        reading = self._read(self.adata, rows)
        for _, cells in reading.batches:
            value_o = reading.encoding.normalised(cells, np.zeros(cells.token_o.size, dtype=bool)).value_o
            sum_g += np.bincount(cells.token_o, value_o, minlength=n)
            n_g += np.bincount(cells.token_o, minlength=n)
        mean_g = np.where(n_g > 0, sum_g / np.maximum(n_g, 1), sum_g.sum() / max(n_g.sum(), 1))
        self.module.gene_mean.copy_(torch.from_numpy(mean_g).to(self.module.gene_mean))

    @torch.no_grad()
    def _start_genes(self, rows: np.ndarray, seed: int) -> None:
        """Start the vectors of the genes at their loadings on the components of their correlations."""
        chosen = np.sort(np.random.default_rng([seed, 0xC0]).permutation(rows)[:CELLS_OF_START])
        reading = self._read(self.adata, chosen)
        values, code_n = [], np.zeros(chosen.size, dtype=np.int64)
        measured_cm, code_of_cell = reading.encoding.measured or (None, None)
        n_genes, n_read = len(self.feature_names), 0
        for at, cells in reading.batches:
            value_o = reading.encoding.normalised(cells, np.zeros(cells.token_o.size, dtype=bool)).value_o
            values.append(sparse.csr_matrix((value_o, cells.token_o - 1, cells.indptr), shape=(at.size, n_genes)))
            if code_of_cell is not None:
                code_n[n_read : n_read + at.size] = code_of_cell[chosen[at]]
            n_read += at.size
        table_gd = self.module.network.genes.table.weight
        measured = None if measured_cm is None else (measured_cm, code_n)
        loadings_gr = correlation_loadings(sparse.vstack(values), table_gd.shape[1], measured=measured, seed=seed)
        scale = START_SD / max(float(np.sqrt(np.square(loadings_gr).mean())), 1e-12)
        table_gd[1:, : loadings_gr.shape[1]] += torch.from_numpy(scale * loadings_gr).to(table_gd)

    def fingerprint(self, config: TrainingConfig) -> dict[str, Any]:
        """Return what must agree for a run to be resumed: how the cells are split and drawn too."""
        order = {} if self._loader == "rows" else {"loader": self._loader, "block_size": self._block_size}
        return super().fingerprint(config) | {"split_by": self._split_by} | order
