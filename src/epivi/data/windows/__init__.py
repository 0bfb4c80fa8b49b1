"""Bulk experiments and their windows: the registry field, regions, batches and samplers.

An obs row is a biosample; a training sample is a pair (biosample, window).
"""

from epivi.data.windows.field import ExperimentsField
from epivi.data.windows.keys import ExperimentKeys
from epivi.data.windows.loci import Blacklist, TrainingWindows, training_starts
from epivi.data.windows.reader import (
    Experiments,
    WindowDataset,
    fingerprint,
    mean_tracks,
    open_experiments,
    relative_counts,
    split_rows,
)
from epivi.data.windows.regions import GenomeSplit, Run, Runs, Tiling, runs, split_chromosomes, tile
from epivi.data.windows.sampler import WindowSampler, validation_windows

__all__ = [
    "Blacklist",
    "ExperimentKeys",
    "Experiments",
    "ExperimentsField",
    "GenomeSplit",
    "Run",
    "Runs",
    "Tiling",
    "TrainingWindows",
    "WindowDataset",
    "WindowSampler",
    "fingerprint",
    "mean_tracks",
    "open_experiments",
    "relative_counts",
    "runs",
    "split_chromosomes",
    "split_rows",
    "tile",
    "training_starts",
    "validation_windows",
]
