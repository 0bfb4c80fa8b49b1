"""What ConvNetVAE and FCVAE share: setup of tracks, construction, description."""

from __future__ import annotations

import logging
from abc import abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from scvi import REGISTRY_KEYS

from epivi._keys import OBSM_TRACKS
from epivi.data.tracks._checks import check_holder
from epivi.data.tracks.field import IS_INCOMPLETE, N_MEASURED, TOTAL_COUNTS, MuDataTracksField, TracksField
from epivi.data.tracks.grids import TrackLayout
from epivi.models.base import EpiModel, model_seed, seeded_module
from epivi.models.base_query import QueryMixin
from epivi.models.base_setup import ObsKeys, check_transfer, register
from epivi.models.convnetvae.outputs import TracksOutputsMixin
from epivi.nn.covariates import Covariates

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from anndata import AnnData
    from mudata import MuData

    from epivi.models.convnetvae.config import TracksConfig
    from epivi.models.convnetvae.module import TracksModule
    from epivi.train.config import TrainingConfig

logger = logging.getLogger(__name__)


class TracksModel(TracksOutputsMixin, QueryMixin, EpiModel):
    """Base of the models of multi-channel tracks; a subclass chooses configuration and module."""

    _config_cls: ClassVar[type[TracksConfig]]

    def _start(
        self, adata: AnnData | MuData | None, registry: dict | None, chosen: dict[str, Any], seed: int | None
    ) -> None:
        """Build the model from the constructor's arguments."""
        self.init_arguments = chosen | {"seed": seed}
        self._config_cls.chosen(chosen, is_missing=False)  # refuse bad arguments at once
        super().__init__(adata, registry)
        self.seed = self.init_arguments["seed"] = model_seed(seed)
        state = self._field_state(REGISTRY_KEYS.X_KEY)
        measured = torch.tensor(state[N_MEASURED], dtype=torch.float64)
        self.layout = TrackLayout.from_state(state)
        # of the training data, also where the model is loaded or maps a query
        self.config = self._config_cls.chosen(chosen, is_missing=bool(state[IS_INCOMPLETE]))
        library_c = torch.tensor(state[TOTAL_COUNTS], dtype=torch.float64) / measured
        covariates = Covariates(**self._covariate_sizes())
        self.module = seeded_module(self.seed, lambda: self._build_module(covariates, library_c)).eval()
        self._model_summary_string = self._describe()
        if self.config.modality_dropout_rate and chosen.get("modality_dropout_rate") is None:
            logger.info(
                "Some training cells lack a modality: modality_dropout_rate=%g, so that the encoder learns to do "
                "without.",
                self.config.modality_dropout_rate,
            )

    def fingerprint(self, config: TrainingConfig) -> dict[str, Any]:
        """Return what must agree for a run to be resumed: the bins too."""
        return super().fingerprint(config) | {"grids": [grid.state()["hash"] for grid in self.layout.grids]}

    @abstractmethod
    def _build_module(self, covariates: Covariates, library_c: torch.Tensor) -> TracksModule:
        """Return the module of the subclass."""

    def _describe(self) -> str:
        parts = {
            "channels": list(self.layout.channels),
            "bins": sorted(set(self.layout.n_bins)),
            "n_latent": self.config.n_latent,
            "likelihood": self.config.likelihood,
            "modality_dropout_rate": self.config.modality_dropout_rate,
            "batches": self.summary_stats.n_batch,
        }
        return self._described(**parts)

    @classmethod
    def setup_anndata(
        cls,
        adata: AnnData,
        tracks_key: str = OBSM_TRACKS,
        batch_key: str | None = None,
        labels_key: str | None = None,
        mask_key: str | None = None,
        categorical_covariate_keys: list[str] | None = None,
        continuous_covariate_keys: list[str] | None = None,
        empty: str = "observed",
        **kwargs: Any,
    ) -> None:
        """Check the data and register what the model reads.

        Parameters
        ----------
        adata
            ``obsm[tracks_key]`` holds counts, dense (cells, channels, bins) or CSR (cells, channels × bins), channel by
            channel; ``uns[tracks_key]`` their ``channels`` and ``bins`` (table of chrom, start, end), as
            :func:`epivi.pp.stack_tracks` writes them.
        tracks_key
            Key of obsm and uns.
        batch_key, labels_key
            Columns of obs: sample and cell type.
        mask_key
            Key of obsm with a Boolean array (cells, channels): which modality was measured in which cell. By default
            ``<tracks_key>_mask`` where it is there, else all were measured.
        categorical_covariate_keys, continuous_covariate_keys
            Further columns of obs that encoder and decoder are given.
        empty
            What a measured modality without counts in a cell is: ``"observed"``, or ``"mask"``, not measured.
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
        is_default = mask_key is None
        read_key = f"{tracks_key}_mask" if mask_key is None else mask_key
        if is_default and read_key in getattr(adata, "obsm", ()):
            logger.info("Which modalities were measured is read from obsm['%s'].", read_key)
        tracks = TracksField(
            REGISTRY_KEYS.X_KEY,
            tracks_key,
            mask_key=read_key,
            is_mask_optional=is_default,
            empty=empty,
        )
        check_holder(adata, where="adata", minimum=1)
        keys.check(adata.obs, where="adata.obs")
        register(cls, adata, [tracks, *keys.fields()], setup_method_args, kwargs)

    @classmethod
    def setup_mudata(  # noqa: PLR0913, PLR0917
        cls,
        mdata: MuData,
        modalities: Sequence[str] | Mapping[str, str] | None = None,
        layer: str | None = None,
        batch_key: str | None = None,
        labels_key: str | None = None,
        mask_key: str | None = None,
        categorical_covariate_keys: list[str] | None = None,
        continuous_covariate_keys: list[str] | None = None,
        empty: str = "observed",
        **kwargs: Any,
    ) -> None:
        """Check a MuData whose modalities are the channels, and register what the model reads.

        Parameters
        ----------
        mdata
            MuData; cells that a modality lacks were not measured in it.
        modalities
            Modalities to read, or a mapping from names of channels to modalities; all by default.
        layer
            Layer of the counts in every modality; X by default.
        batch_key, labels_key, categorical_covariate_keys, continuous_covariate_keys
            Columns of ``mdata.obs``, or of the first modality's obs.
        mask_key
            Key of ``mdata.obsm`` with a mask of measured modalities beyond the membership of cells.
        empty, kwargs
            As in :meth:`setup_anndata`.

        Raises
        ------
        DataError
            If the data cannot be used; the message says what was found, where, and what to do.
        ConfigError
            If a key or a modality is named twice.
        """
        setup_method_args = cls._get_setup_method_args(**locals())
        check_transfer(cls.setup_mudata, kwargs)
        keys = ObsKeys.of(setup_method_args)
        tracks = MuDataTracksField(REGISTRY_KEYS.X_KEY, modalities, layer=layer, mask_key=mask_key, empty=empty)
        tracks.validate_field(mdata)
        names = list(tracks.modalities.values()) if tracks.modalities else list(mdata.mod)
        mod_key = keys.check_mudata(mdata, next(name for name in names if name in mdata.mod))
        register(cls, mdata, [tracks, *keys.mudata_fields(mod_key)], setup_method_args, kwargs)
