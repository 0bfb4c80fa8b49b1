"""What a CANDI knows of the experiments it was set up with, and their windows."""

from __future__ import annotations

import logging
from functools import cached_property
from typing import TYPE_CHECKING, Any

from scvi import REGISTRY_KEYS

from epivi._errors import ConfigError, DataError
from epivi.data.windows import GenomeSplit, Runs, WindowDataset, mean_tracks, split_chromosomes, split_rows
from epivi.models.base import EpiModel

if TYPE_CHECKING:
    from collections.abc import Mapping

    from anndata import AnnData

    from epivi.models.candi.config import CandiConfig
    from epivi.models.candi.module import CandiModule

logger = logging.getLogger(__name__)

_HELD = ("validation", "test")


class ExperimentsMixin(EpiModel):
    """Access to experiments: names, bins, split, windows, mean tracks."""

    module: CandiModule
    config: CandiConfig

    @property
    def state(self) -> Mapping[str, Any]:
        """What the setup registered about the trained data."""
        return self._field_state(REGISTRY_KEYS.X_KEY)

    @property
    def assay_names(self) -> list[str]:
        """Names of the assays in the trained order."""
        return [str(name) for name in self.state["column_names"]]

    @property
    def runs(self) -> Runs:
        """Runs of contiguous bins of the trained data."""
        return Runs.from_state(self.state["runs"])

    @cached_property
    def genome_split(self) -> GenomeSplit:
        """Bins of the trained data to train on, to validate on and to test on."""
        held = {name: state if (state := self.state[f"{name}_chroms"]) is None else list(state) for name in _HELD}
        return split_chromosomes(self.runs, self.config.n_bins, **held)

    def _has_trained_bins(self, dataset: WindowDataset) -> bool:
        """Whether data have the bins that the model was set up with, so that the split of the genome holds for them."""
        return dataset.experiments.runs.state()["hash"] == str(self.state["runs"]["hash"])

    def _opened(self, adata: AnnData | None) -> tuple[AnnData, WindowDataset]:
        """Return data, validated, and their windows."""
        if adata is None and self.adata is None:
            message = "The model was loaded without data: pass adata=..."
            raise ConfigError(message)
        data = self._validate_anndata(adata)
        return data, self.windows(data)

    def _prepare_prior(self, adata: AnnData | None) -> None:
        """Compute the mean tracks of the training biosamples where they are needed and not there."""
        if not self.config.locus_prior or adata is None:
            return
        state = self._data_state(adata)
        key = state["keys"]["prior"]
        if key in adata.varm:
            return
        rows = split_rows(adata, state)["train"]
        names = [str(name) for name in state["biosamples"]["train"]]
        if rows.size != len(names):
            message = (
                f"The model starts from the mean tracks of its {len(names)} training biosamples, and varm['{key}'] is "
                f"not there. Copy it from the training data: adata.varm['{key}'] = trained.varm['{key}']."
            )
            raise DataError(message)
        adata.varm[key], _ = mean_tracks(adata, state, rows, kind=self.config.input)
        logger.info("The mean tracks of %d training biosamples are stored in varm['%s'].", rows.size, key)

    def _data_state(self, adata: AnnData) -> Mapping[str, Any]:
        """Return what the setup registered about some data."""
        manager = self.get_anndata_manager(adata, required=True)
        return manager.registry["field_registries"][REGISTRY_KEYS.X_KEY]["state_registry"]

    def windows(self, adata: AnnData) -> WindowDataset:
        """Return the windows of data that were set up."""
        prior = self.config.input if self.config.locus_prior else None
        self._prepare_prior(adata)
        return WindowDataset(adata, self._data_state(adata), self.config.n_bins, prior=prior)
