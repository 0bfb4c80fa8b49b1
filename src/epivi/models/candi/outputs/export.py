"""Predicted tracks to bigWig files, stretch by stretch."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from epivi import _validate
from epivi._errors import ConfigError
from epivi.models.candi.outputs.tracks import TracksMixin
from epivi.pp.bulk import BigWigWriter

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import numpy as np
    from anndata import AnnData

    from epivi.data.windows import Runs


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
            If an argument is not valid, or a file is there and ``overwrite`` is false.
        MissingDependencyError
            If pyBigWig is not installed.

        Notes
        -----
        Memory is that of one minibatch of windows for each track. A file appears under its name when it is whole.
        """
        what = [what] if isinstance(what, str) else list(what)
        data, dataset = self._opened(adata)
        kind = "left out" if leave_one_out else "all"
        request = self._request(adata, region, assays, biosamples, kind=kind)
        names = self._layers()
        for name in what:
            _validate.check_choice(name, "what", names)
        tracks = [f"{data.obs_names[t.row]}.{self.assay_names[t.assay]}" for t in request.targets]
        stretches = self._stretches(dataset, request, covariates, batch_size)
        summaries = (
            (first, self._summaries(request, stretch, interval, None, original_scale)) for first, stretch in stretches
        )
        total = sum(part.n_bins for part in request.runs)
        return write_tracks(
            Path(folder),
            tracks,
            what,
            summaries,
            runs=dataset.experiments.runs,
            sizes=_chrom_sizes(data, dataset.experiments.runs),
            total=total,
            overwrite=overwrite,
            progress=progress,
        )


def write_tracks(  # noqa: PLR0913
    folder: Path,
    tracks: Sequence[str],
    what: Sequence[str],
    summaries: Iterable[tuple[int, Mapping[str, np.ndarray]]],
    *,
    runs: Runs,
    sizes: Mapping[str, int],
    total: int,
    overwrite: bool,
    progress: bool,
) -> list[Path]:
    """Write one file for each track and layer.

    Parameters
    ----------
    folder
        Where to write; it is made if it is not there.
    tracks, what
        Names of tracks, one for each row of a layer, and of layers.
    summaries
        First bin and layers (tracks, bins) of neighbouring bins, in the order of the genome.
    runs
        Runs of the bins.
    sizes
        Sizes of the chromosomes in bp.
    total
        Number of bins, for the progress bar.
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
        If the folder is a file, a file is there and ``overwrite`` is false, or two tracks have one name.
    MissingDependencyError
        If pyBigWig is not installed.
    """
    from tqdm import tqdm

    paths = [[folder / f"{track.replace('/', '_')}.{name}.bw" for name in what] for track in tracks]
    flat = [path for row in paths for path in row]
    if folder.exists() and not folder.is_dir():
        message = f"{folder} is a file; the name of a folder is needed."
        raise ConfigError(message)
    if len(set(flat)) < len(flat):
        message = "Two tracks would be written to one file: names of biosamples and assays are not distinct."
        raise ConfigError(message)
    there = [path for path in flat if path.exists()]
    if there and not overwrite:
        message = f"{there[0]} is there already, as are {len(there) - 1} more. Pass overwrite=True to replace them."
        raise ConfigError(message)
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        bar = stack.enter_context(tqdm(total=total, unit="bins", unit_scale=True, disable=None if progress else True))
        writers: list[list[Any]] = [
            [stack.enter_context(BigWigWriter(path, sizes, runs.bin_size_bp)) for path in row] for row in paths
        ]
        for first, layers in summaries:
            run = next(run for run in runs if run.first <= first < run.stop)
            start_bp = run.start_bp + (first - run.first) * runs.bin_size_bp
            for column, name in enumerate(what):
                for row, values_l in zip(writers, layers[name], strict=True):
                    row[column].add(run.chrom, values_l, start_bp)
            bar.update(layers[what[0]].shape[1])
    return flat


def _chrom_sizes(adata: AnnData, runs: Runs) -> dict[str, int]:
    """Return the sizes of the chromosomes: those of the genome, or where the last bin ends."""
    known = dict(adata.uns.get("genome", {}).get("chrom_sizes", {}))
    ends = {run.chrom: run.start_bp + run.n_bins * runs.bin_size_bp for run in runs}
    return {name: int(known.get(name, end)) for name, end in ends.items()}
