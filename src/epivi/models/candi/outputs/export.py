"""Predicted tracks to bigWig files, stretch by stretch."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from epivi import _validate
from epivi._errors import ConfigError
from epivi._keys import UNS_GENOME
from epivi.models.candi.outputs.request import run_of
from epivi.models.candi.outputs.tracks import TracksMixin, check_interval
from epivi.pp.bulk import BigWigWriter

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    import numpy as np
    from anndata import AnnData

    from epivi.data.windows import Runs
    from epivi.models.candi.outputs.request import Request


class ExportMixin(TracksMixin):
    """Files of predicted tracks."""

    def export_bigwig(  # noqa: PLR0913
        self,
        folder: str | Path,
        *,
        what: Sequence[str] | str = ("mean", "lower", "upper"),
        assays: Sequence[str] | str | None = None,
        biosamples: Sequence[str] | str | None = None,
        region: Any = None,
        covariates: Mapping[str, Any] | None = None,
        leave_one_out: bool = False,
        interval: float = 0.9,
        original_scale: bool = True,
        adata: AnnData | None = None,
        batch_size: int = 32,
        overwrite: bool = False,
        progress: bool = True,
    ) -> list[Path]:
        """Write predicted tracks to bigWig files, streamed along the genome.

        Parameters
        ----------
        folder
            Where to write ``BIOSAMPLE.ASSAY.WHAT.bw``; it is made if it is not there.
        what
            Layers of :meth:`impute` to write.
        assays, biosamples, region, covariates, leave_one_out, interval, original_scale, adata, batch_size
            As in :meth:`impute`; by default all assays, measured ones denoised and others imputed.
        overwrite
            Replace files that are there.
        progress
            Show a progress bar where there is a terminal.

        Returns
        -------
        The files.

        Raises
        ------
        ConfigError
            If an argument is not valid, ``folder`` is a file, two tracks would have one name, or a file is there and
            ``overwrite`` is false.
        DataError
            If no bin overlaps the region.
        MissingDependencyError
            If pyBigWig is not installed.

        Notes
        -----
        Memory is that of one minibatch of windows for each track of a biosample. Biosamples are written one after the
        other; the files of each appear when they are whole.
        """
        from tqdm import tqdm

        what = [what] if isinstance(what, str) else list(what)
        for name in what:
            _validate.check_choice(name, "what", self._layers())
        check_interval(interval)
        kind = "left out" if leave_one_out else "all"
        whole = self._request(self._opened(adata), region, assays, biosamples, kind=kind)
        parts = whole.by_biosample()
        stretches = [self._stretches(part, covariates, batch_size) for part in parts]
        paths = [self._paths(Path(folder), part, what) for part in parts]
        _check_paths(Path(folder), [path for part in paths for row in part for path in row], overwrite=overwrite)
        Path(folder).mkdir(parents=True, exist_ok=True)
        runs = whole.dataset.experiments.runs
        sizes = _chrom_sizes(whole.data, runs)
        total = whole.runs.total * len(parts)
        with tqdm(total=total, unit="bins", unit_scale=True, disable=None if progress else True) as bar:
            # one biosample after the other: a system opens some hundred files at once
            for part, found, targets in zip(parts, stretches, paths, strict=True):
                summaries = (
                    (one.first, self._summaries(part, one, interval, None, original_scale, what)) for one in found
                )
                write_tracks(targets, what, summaries, runs=runs, sizes=sizes, advance=bar.update)
        return [path for part in paths for row in part for path in row]

    def _paths(self, folder: Path, request: Request, what: Sequence[str]) -> list[list[Path]]:
        """Return the files of each target."""
        tracks = [f"{request.data.obs_names[t.row]}.{self.assay_names[t.assay]}" for t in request.targets]
        return [[folder / f"{track.replace('/', '_')}.{name}.bw" for name in what] for track in tracks]


def write_tracks(
    paths: Sequence[Sequence[Path]],
    what: Sequence[str],
    summaries: Iterable[tuple[int, Mapping[str, np.ndarray]]],
    *,
    runs: Runs,
    sizes: Mapping[str, int],
    advance: Callable[[int], Any],
) -> None:
    """Write one file for each track and layer; they appear when all are whole.

    Parameters
    ----------
    paths
        Files of each track, one for each layer; those that are there are replaced.
    what
        Names of layers.
    summaries
        First bin and layers (tracks, bins) of neighbouring bins, in the order of the genome.
    runs
        Runs of the bins.
    sizes
        Sizes of the chromosomes in bp.
    advance
        Called with the number of bins that were written.

    Raises
    ------
    MissingDependencyError
        If pyBigWig is not installed.
    """
    with ExitStack() as stack:
        writers: list[list[Any]] = [
            [stack.enter_context(BigWigWriter(path, sizes, runs.bin_size_bp)) for path in row] for row in paths
        ]
        for first, layers in summaries:
            run = run_of(runs, first)
            start_bp = run.start_bp + (first - run.first) * runs.bin_size_bp
            for column, name in enumerate(what):
                for row, values_l in zip(writers, layers[name], strict=True):
                    row[column].add(run.chrom, values_l, start_bp)
            advance(layers[what[0]].shape[1])


def _check_paths(folder: Path, paths: Sequence[Path], *, overwrite: bool) -> None:
    """Refuse files that cannot be written, or that are there."""
    if folder.exists() and not folder.is_dir():
        message = f"{folder} is a file; the name of a folder is needed."
        raise ConfigError(message)
    if len(set(paths)) < len(paths):
        message = "Two tracks would be written to one file: names of biosamples and assays are not distinct."
        raise ConfigError(message)
    there = [path for path in paths if path.exists()]
    if there and not overwrite:
        message = f"{there[0]} is there already, as are {len(there) - 1} more. Pass overwrite=True to replace them."
        raise ConfigError(message)


def _chrom_sizes(adata: AnnData, runs: Runs) -> dict[str, int]:
    """Return the sizes of the chromosomes: those of the genome, or where the last bin ends."""
    genome = adata.uns.get(UNS_GENOME, {})
    known = dict(genome.get("chrom_sizes", {})) if isinstance(genome, Mapping) else {}
    ends = {run.chrom: run.start_bp + run.n_bins * runs.bin_size_bp for run in runs}
    return {name: int(known.get(name, end)) for name, end in ends.items()}
