"""SAILERX, as its users see it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from scvi import REGISTRY_KEYS

from epivi._errors import ConfigError, DataError
from epivi._keys import (
    BATCH_ALIGN_WEIGHT,
    BATCH_DEPTH,
    BATCH_HAS_REFERENCE,
    BATCH_REFERENCE,
)
from epivi.data.fields import MuDataDepthField, MuDataPeaksField
from epivi.data.sparse import modality_rows
from epivi.data.splits import EpochSampler, NeighborSampler, StratifiedSampler
from epivi.models.base import check_indices
from epivi.models.base_setup import ObsKeys, check_transfer, modality_names, register
from epivi.models.sailer.model import SAILER
from epivi.models.sailer.setup import accessibility_fields, check_atac, chromosome_of_peak
from epivi.models.sailerx.config import SailerxConfig
from epivi.models.sailerx.module import SailerxModule
from epivi.models.sailerx.reference import (
    AlignWeightField,
    HasReferenceField,
    MuDataAlignWeightField,
    MuDataHasReferenceField,
    MuDataReferenceField,
    ReferenceField,
    ReferenceSource,
)
from epivi.objectives.alignment import alignment_share

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from anndata import AnnData
    from mudata import MuData

    from epivi.models.sailer.config import SailerConfig
    from epivi.models.sailer.module import SailerModule
    from epivi.train.config import TrainingConfig

logger = logging.getLogger(__name__)

N_NEIGHBORS = 15


class SAILERX(SAILER):
    r"""Multiome latents whose similarities follow a reference embedding (Cao et al., Nucleic Acids Research 2022).

    SAILER of the ATAC modality with one more term: over pairs of cells with a reference, such as principal
    components of RNA, the cosine similarities of the posterior means are drawn towards those of the reference
    (equations 3.3-3.5),

    .. math:: L = L_{SAILER} + A\,\frac{1}{n_m^2}\sum_{ij} w_i w_j (S^g_{ij} - S^p_{ij})^2

    with weights w that are larger where ATAC is poor relative to RNA. RNA itself is not modelled, and cells without a
    reference train in the same minibatches.

    Parameters
    ----------
    adata
        MuData set up with :meth:`setup_mudata`, or AnnData set up with :meth:`setup_anndata`; data that were not are
        set up with the defaults.
    n_latent
        Latent dimensions d.
    align_weight
        Alignment weight per peak; A is this times the number of peaks. By default 0.457, the published balance; 2,000
        for the linear encoder, whose data are too sparse to follow a reference at the published weight.
    min_reference_per_batch
        Fewest cells with a reference in a minibatch, where some cells have none.
    sampler
        ``"shuffle"``, or ``"neighbors"``: half of a minibatch are reference neighbours of the other half, so that rare
        types have partners.
    fuse_reference
        Beyond the paper: the posterior of a cell with a reference is the product of the ATAC expert and an expert on
        the reference. Off by default; the latent of such cells then contains the reference itself.
    encoder, n_hidden, dropout_rate, input_transform, input_dropout_rate, open_weight, invariance_weight, kl_scale
        As in :class:`epivi.SAILER`.
    information_bound, loss_preset, use_covariates, batch_norm_momentum, batch_norm_eps, kernels, likelihood, seed
        As in :class:`epivi.SAILER`.

    Raises
    ------
    ConfigError
        If an argument is outside its range.
    DataError
        If the data cannot be used.

    Examples
    --------
    >>> import epivi
    >>> mdata = epivi.simulate.multiome([60, 60], n_atac_only=20)
    >>> epivi.SAILERX.setup_mudata(mdata, reference_key="X_pca", batch_key="batch")
    >>> model = epivi.SAILERX(mdata, n_latent=5)
    >>> model.train(max_epochs=2, enable_progress_bar=False)
    >>> model.get_latent_representation().shape
    (140, 5)
    """

    _module_cls: ClassVar[type[SailerModule]] = SailerxModule
    _config_cls: ClassVar[type[SailerConfig]] = SailerxConfig

    def __init__(  # noqa: PLR0913
        self,
        adata: MuData | AnnData | None = None,
        registry: dict | None = None,
        *,
        encoder: str | None = None,
        n_latent: int = 50,
        align_weight: float | None = None,
        min_reference_per_batch: int = 32,
        sampler: str = "shuffle",
        fuse_reference: bool = False,
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

    def _module_arguments(self) -> dict[str, Any]:
        return {"n_reference": len(self._field_state(BATCH_REFERENCE)["column_names"])}

    def make_sampler(
        self, indices: np.ndarray, config: TrainingConfig, *, rank: int = 0, world_size: int = 1
    ) -> EpochSampler:
        """Return the sampler of the training cells: shuffled, stratified by reference, or by reference neighbours."""
        options: dict[str, Any] = {"rank": rank, "world_size": world_size}
        arguments = (indices, config.batch_size, config.seed)
        has = self._has_reference()
        if self.config.sampler == "neighbors":
            known = getattr(self, "_neighbors", None)  # of the last training cells
            if known is None or not np.array_equal(known[0], indices):
                reference = self.adata_manager.get_from_registry(BATCH_REFERENCE)
                known = self._neighbors = (indices, reference_neighbors(reference, has, indices))
            return NeighborSampler(*arguments, neighbors=known[1], **options)
        if not has[indices].all():
            minimum = self.config.min_reference_per_batch
            return StratifiedSampler(*arguments, group=has, minimum=minimum, **options)
        return EpochSampler(*arguments, **options)

    def _has_reference(self) -> np.ndarray:
        return np.asarray(self.adata_manager.get_from_registry(BATCH_HAS_REFERENCE)).ravel().astype(bool)

    def get_alignment_weights(self) -> np.ndarray:
        """Return the alignment weight gamma of each cell, shape (n,); 0 for cells without reference."""
        return np.asarray(self.adata_manager.get_from_registry(BATCH_ALIGN_WEIGHT), dtype=np.float64).ravel()

    @torch.inference_mode()
    def get_alignment_loss(
        self,
        adata: MuData | AnnData | None = None,
        indices: Sequence[int] | None = None,
        *,
        return_per_cell: bool = False,
        batch_size: int = 1024,
    ) -> float | np.ndarray:
        """Return how far the similarities of the latent are from those of the reference.

        Parameters
        ----------
        adata, indices
            As in :meth:`get_latent_representation`.
        return_per_cell
            Return each cell's share, shape (n,), NaN for cells without reference.
        batch_size
            Cells between which pairs are formed.

        Returns
        -------
        Mean of the loss over groups of ``batch_size`` cells with a reference, or the shares.
        """
        adata = self._validate_anndata(adata)
        manager = self.get_anndata_manager(adata, required=True)
        latent_nd = torch.from_numpy(self.get_latent_representation(adata, indices))
        rows = check_indices(indices, adata.n_obs)
        entries = (manager.get_from_registry(key) for key in (BATCH_HAS_REFERENCE, BATCH_REFERENCE, BATCH_ALIGN_WEIGHT))
        has, reference, weight = (torch.as_tensor(np.asarray(entry, dtype=np.float32))[rows] for entry in entries)
        shares = torch.full((rows.size,), torch.nan)
        losses = []
        for part in torch.nonzero(has[:, 0])[:, 0].split(batch_size):
            shares[part] = alignment_share(
                latent_nd[part], reference[part], weight[part, 0], torch.tensor(part.numel())
            )
            losses.append(float(shares[part].sum()))
        return shares.numpy() if return_per_cell else float(np.mean(losses)) if losses else 0.0

    @classmethod
    def setup_mudata(  # noqa: PLR0913, PLR0917
        cls,
        mdata: MuData,
        modalities: Mapping[str, str] | None = None,
        atac_layer: str | None = None,
        rna_layer: str | None = None,
        reference_key: str | None = None,
        batch_key: str | None = None,
        labels_key: str | None = None,
        depth_key: str | None = None,
        rna_depth_key: str | None = None,
        categorical_covariate_keys: list[str] | None = None,
        continuous_covariate_keys: list[str] | None = None,
        chrom_key: str = "chrom",
        **kwargs: Any,
    ) -> None:
        """Check a MuData and register what the model reads.

        Parameters
        ----------
        mdata
            MuData; every cell has ATAC, RNA may be missing for some or, in a query, for all.
        modalities
            Names of the modalities, by default ``{"atac": "atac", "rna": "rna"}``.
        atac_layer, rna_layer
            Layers of the counts; X by default.
        reference_key
            Key of the RNA modality's obsm that holds the reference; rows of NaN have none. By default ``X_pca``, or 50
            principal components computed from the RNA counts.
        batch_key, labels_key, categorical_covariate_keys, continuous_covariate_keys
            Columns of the ATAC modality's obs, or of ``mdata.obs``.
        depth_key, rna_depth_key
            Depth columns of the ATAC and the RNA modality; by default open peaks and RNA counts.
        chrom_key
            Column of the ATAC modality's var with the chromosome of each peak.
        kwargs
            Used by scvi-tools to transfer a setup.

        Raises
        ------
        DataError
            If the data cannot be used; the message says what was found, where, and what to do.
        ConfigError
            If a key or a modality is named twice or unknown.
        """
        setup_method_args = cls._get_setup_method_args(**locals())
        check_transfer(cls.setup_mudata, kwargs)
        atac, rna = modality_names(mdata, modalities, needs_rna=not kwargs.get("source_registry"))
        where = f"mdata['{atac}']"
        check_atac(mdata.mod[atac], where=where, layer=atac_layer)
        rows = modality_rows(mdata, atac)
        if rows is not None and (rows < 0).any():
            first = mdata.obs_names[rows < 0][:3].tolist()
            message = (
                f"{int((rows < 0).sum())} of {mdata.n_obs} cells have no '{atac}' (first: {first}), and SAILERX embeds "
                f"cells by their ATAC. Keep the others: mdata = mdata[mdata['{atac}'].obs_names].copy()."
            )
            raise DataError(message)
        keys = ObsKeys.of(setup_method_args)
        mod_key = keys.check_mudata(mdata, atac)
        source = ReferenceSource(
            rna, layer=rna_layer, reference_key=reference_key, rna_depth_key=rna_depth_key, atac=atac
        )
        if not kwargs.get("source_registry"):
            source.check_keys(mdata)
        chromosomes = chromosome_of_peak(mdata.mod[atac], chrom_key)
        in_atac = {"mod_key": atac, "mod_required": True}
        fields = [
            MuDataPeaksField(REGISTRY_KEYS.X_KEY, atac_layer, chromosomes=chromosomes, where=where, **in_atac),
            MuDataDepthField(BATCH_DEPTH, depth_key, where=f"{where}.obs", **in_atac),
            *keys.mudata_fields(mod_key),
            MuDataReferenceField(BATCH_REFERENCE, source),
            MuDataHasReferenceField(BATCH_HAS_REFERENCE),
            MuDataAlignWeightField(BATCH_ALIGN_WEIGHT, source),
        ]
        register(cls, mdata, fields, setup_method_args, kwargs)

    @classmethod
    def setup_anndata(  # type: ignore[override]  # noqa: PLR0913, PLR0917
        cls,
        adata: AnnData,
        reference_key: str | None = None,
        layer: str | None = None,
        batch_key: str | None = None,
        labels_key: str | None = None,
        depth_key: str | None = None,
        rna_depth_key: str | None = None,
        categorical_covariate_keys: list[str] | None = None,
        continuous_covariate_keys: list[str] | None = None,
        chrom_key: str = "chrom",
        **kwargs: Any,
    ) -> None:
        r"""Check an AnnData of peaks that carries the reference in its obsm, and register what the model reads.

        Parameters
        ----------
        adata
            Cells × peaks.
        reference_key
            Key of obsm that holds the reference; rows of NaN have none.
        layer, batch_key, labels_key, depth_key, chrom_key, kwargs
            As in :meth:`epivi.SAILER.setup_anndata`.
        categorical_covariate_keys, continuous_covariate_keys
            As in :meth:`epivi.SAILER.setup_anndata`.
        rna_depth_key
            Column of obs with the RNA depth; without it every referenced cell has alignment weight 1.

        Raises
        ------
        DataError
            If the data cannot be used.
        ConfigError
            If no ``reference_key`` is given, or a key is named twice.
        """
        setup_method_args = cls._get_setup_method_args(**locals())
        check_transfer(cls.setup_anndata, kwargs)
        if reference_key is None:
            message = "SAILERX.setup_anndata needs reference_key=: the key of obsm that holds the reference embedding."
            raise ConfigError(message)
        keys = ObsKeys.of(setup_method_args)
        fields = accessibility_fields(adata, layer, depth_key, keys, chrom_key)
        source = ReferenceSource(None, layer=None, reference_key=reference_key, rna_depth_key=rna_depth_key, atac=None)
        if not kwargs.get("source_registry"):
            source.check_keys(adata)
        fields += [
            ReferenceField(BATCH_REFERENCE, source),
            HasReferenceField(BATCH_HAS_REFERENCE),
            AlignWeightField(BATCH_ALIGN_WEIGHT, source),
        ]
        register(cls, adata, fields, setup_method_args, kwargs)


def reference_neighbors(reference: np.ndarray, has_reference: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return rows of the nearest neighbours by cosine among referenced training cells, -1 for cells without reference.

    Parameters
    ----------
    reference
        Shape (n, r).
    has_reference
        Shape (n,), bool.
    rows
        Training cells; only they are neighbours.

    Returns
    -------
    Shape (n, k), k at most 15.

    Examples
    --------
    >>> x = np.array([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [0.1, 1.0]])
    >>> reference_neighbors(x, np.ones(4, dtype=bool), np.arange(4))[:, 0].tolist()
    [1, 0, 3, 2]
    """
    from sklearn.neighbors import NearestNeighbors

    members = rows[has_reference[rows]]
    k = min(N_NEIGHBORS, members.size - 1)
    result = np.full((has_reference.size, max(k, 1)), -1, dtype=np.int64)
    if k < 1:
        return result
    unit = reference / np.maximum(np.linalg.norm(reference, axis=1, keepdims=True), 1e-12)
    found = NearestNeighbors(n_neighbors=k + 1).fit(unit[members]).kneighbors(unit[members], return_distance=False)
    for row, neighbors in zip(members, members[found], strict=True):
        result[row] = neighbors[neighbors != row][:k]
    return result
