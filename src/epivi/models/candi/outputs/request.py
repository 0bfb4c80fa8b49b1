"""Which tracks are asked for, and where: names, regions, bins."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from epivi._errors import ConfigError, nearest
from epivi._keys import VAR_CHROM, VAR_END, VAR_START
from epivi.data.windows import Runs
from epivi.models.candi.data import ExperimentsMixin
from epivi.models.candi.outputs.prediction import Job
from epivi.pp import peak_names

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData

    from epivi.data.windows import Run, WindowDataset


class Target(NamedTuple):
    """One predicted track: a biosample's row and an assay's number, and whether it was measured."""

    row: int
    assay: int
    available: bool


class Request(NamedTuple):
    """What is predicted where.

    Attributes
    ----------
    data, dataset
        Biosamples, and their windows.
    jobs
        Passes along the genome; their assays, in order, are the targets.
    targets
        What comes out, one row each.
    runs
        Bins.
    is_left_out
        Whether measured tracks are predicted from the others.
    """

    data: AnnData
    dataset: WindowDataset
    jobs: list[Job]
    targets: list[Target]
    runs: Runs
    is_left_out: bool

    def by_biosample(self) -> list[Request]:
        """Return the parts of the request, one for each biosample."""
        rows = dict.fromkeys(target.row for target in self.targets)
        return [
            self._replace(
                jobs=[job for job in self.jobs if job.row == row],
                targets=[target for target in self.targets if target.row == row],
            )
            for row in rows
        ]


class RequestMixin(ExperimentsMixin):
    """Data, biosamples, assays and bins of what users ask for."""

    def _parts(self, dataset: Any, region: Any) -> list[tuple[Run, Run]]:
        """Return the runs of a region, each with the whole run that it is a part of."""
        whole = dataset.experiments.runs
        return [(part, run_of(whole, part.first)) for part in region_runs(whole, region)]

    def _rows(self, adata: AnnData, biosamples: Sequence[str] | str | None) -> list[int]:
        return places(biosamples, [str(name) for name in adata.obs_names], what="biosample")

    def _learned_from(self, data: AnnData, adata: AnnData | None) -> list[str]:
        """Return the training biosamples, or all biosamples of data that were passed or have none of them."""
        names = [str(name) for name in data.obs_names]
        trained = {str(name) for name in self.state["biosamples"]["train"]} & set(names)
        return names if adata is not None or not trained else [name for name in names if name in trained]

    def _request(
        self,
        opened: tuple[AnnData, WindowDataset],
        region: Any,
        assays: Sequence[str] | str | None,
        biosamples: Sequence[str] | str | None,
        *,
        kind: str,
    ) -> Request:
        """Return which tracks of opened data are predicted where: missing, measured, left out one by one, or all."""
        data, dataset = opened
        numbers = places(assays, self.assay_names, what="assay")
        found = dataset.experiments
        any_ba = np.logical_or.reduce(list(found.available.values()))
        shown_ba = found.available[self.config.input]
        jobs, targets = [], []
        for row in self._rows(data, biosamples):
            wanted = [a for a in numbers if kind == "all" or bool(any_ba[row, a]) == (kind != "missing")]
            targets += [Target(row, a, bool(any_ba[row, a])) for a in wanted]
            all_a = np.ones(len(self.assay_names), dtype=np.float32)
            if kind == "left out":
                hide = np.eye(len(self.assay_names), dtype=np.float32)
                jobs += [Job(row, all_a - hide[a], (a,)) for a in wanted]
            elif wanted:
                jobs.append(Job(row, all_a * shown_ba[row], tuple(wanted)))
        if not targets:
            message = f"No assay of the biosamples asked for is {'missing' if kind == 'missing' else 'measured'}. " + (
                "denoise() predicts assays that were measured, and impute(leave_one_out=True) each from the others."
                if kind == "missing"
                else "impute() predicts assays that were not measured."
            )
            raise ConfigError(message)
        return Request(data, dataset, jobs, targets, region_runs(found.runs, region), kind == "left out")


def run_of(runs: Runs, at: int) -> Run:
    """Return the run that holds a bin."""
    return next(run for run in runs if run.first <= at < run.stop)


def region_runs(runs: Runs, region: Any) -> Runs:
    """Return the bins of a region, of a list of regions in the order of the genome, all, or those that are given.

    Raises
    ------
    ConfigError
        If a region cannot be read, the list is empty, or its regions overlap.
    DataError
        If no bin overlaps a region.
    """
    if region is None:
        return runs
    if isinstance(region, Runs):
        return region
    if isinstance(region, list) and not region:
        message = "The list of regions is empty. Name one, or give None for all bins."
        raise ConfigError(message)
    if isinstance(region, list) and not (len(region) == 3 and isinstance(region[1], int)):
        parts = [part for one in region for part in runs.region(one)]
        parts.sort(key=lambda part: part.first)
        if any(b.first < a.stop for a, b in itertools.pairwise(parts)):
            message = "Regions overlap: ask for each bin once."
            raise ConfigError(message)
        columns = [np.array([part[i] for part in parts]) for i in (0, 1, 2, 3)]
        first, n_bins, start_bp = (column.astype(np.int64) for column in columns[1:])
        return Runs(columns[0].astype(np.str_), first, n_bins, start_bp, runs.bin_size_bp)
    return runs.region(region)


def places(names: Sequence[str] | str | None, known: Sequence[str], *, what: str) -> list[int]:
    """Return the numbers of names, all for ``None``.

    Raises
    ------
    ConfigError
        If a name is unknown or given twice.

    Examples
    --------
    >>> places("ATAC", ["DNase", "ATAC"], what="assay")
    [1]
    """
    if names is None:
        return list(range(len(known)))
    names = [names] if isinstance(names, str) else [str(name) for name in names]
    for name in names:
        if names.count(name) > 1:
            message = f"The {what} '{name}' is named {names.count(name)} times. Name it once."
            raise ConfigError(message)
    for name in names:
        if name not in known:
            message = f"There is no {what} '{name}'. {nearest(name, known)}"
            raise ConfigError(message)
    return [list(known).index(name) for name in names]


def bins_table(runs: Runs) -> pd.DataFrame:
    """Return the table of bins of some runs, named ``chrom:start-end``."""
    width = runs.bin_size_bp
    start = np.concatenate([run.start_bp + width * np.arange(run.n_bins) for run in runs])
    chrom = pd.Categorical(np.repeat(runs.chrom, runs.n_bins))
    table = pd.DataFrame({VAR_CHROM: chrom, VAR_START: start, VAR_END: start + width})
    table.index = peak_names(table)
    return table
