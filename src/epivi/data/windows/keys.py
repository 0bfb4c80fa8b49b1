"""The keys under which experiments lie in an AnnData."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from epivi import _validate
from epivi._errors import ConfigError
from epivi._keys import (
    OBSM_AVAILABILITY,
    OBSM_AVAILABILITY_SIGNAL,
    OBSM_COUNTS,
    OBSM_EXPERIMENT_DEPTH,
    OBSM_SIGNAL,
    UNS_BINS,
    UNS_DNA,
    VARM_LOCUS_PRIOR,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

UNSEEN: Final = ("error", "unknown")


@dataclass(frozen=True, kw_only=True)
class ExperimentKeys:
    """Where the experiments lie in an AnnData, and which of them are for training.

    Parameters
    ----------
    counts_key, signal_key
        Arrays of obsm (biosamples, assays, bins). ``None``: not used. A default key that is not there is not used.
    availability_key, availability_signal_key
        Masks of obsm (biosamples, assays) of the experiments that exist; without the second, the first serves both.
    continuous_covariates
        Entries of obsm (biosamples, assays), NaN unknown; the logarithm to base 2 is taken of ``depth``. By default
        those of depth, coverage and read_length that are there.
    categorical_covariates
        Entries of obsm with integer codes, -1 unknown, and names of the levels in ``uns["categories"]``; by default all
        that are named there.
    depth_key
        Entry of obsm with the number of reads, from which relative depths are taken; not used if it is not there.
    bins_key, dna_key, prior_key
        Entries of uns (table of bins; codes of bases) and of varm (mean tracks); the last two are used if they are
        there.
    fasta
        FASTA file, read into ``uns[dna_key]`` if that is not there; needs ``uns["genome"]["chrom_sizes"]``.
    split_key
        Column of obs that says ``"train"``, ``"validation"`` or ``"test"`` for each biosample; all are for training if
        ``None``.
    validation_chroms, test_chroms
        Chromosomes to hold out, see :func:`epivi.data.windows.split_chromosomes`.
    unseen
        What becomes of categories that no training experiment has: ``"error"`` or ``"unknown"``.

    Raises
    ------
    ConfigError
        If neither counts nor signal are named, or an argument is not valid.

    Examples
    --------
    >>> ExperimentKeys(signal_key=None).counts_key
    'counts'
    """

    counts_key: str | None = OBSM_COUNTS
    signal_key: str | None = OBSM_SIGNAL
    availability_key: str = OBSM_AVAILABILITY
    availability_signal_key: str | None = OBSM_AVAILABILITY_SIGNAL
    continuous_covariates: Sequence[str] | None = None
    categorical_covariates: Sequence[str] | None = None
    depth_key: str | None = OBSM_EXPERIMENT_DEPTH
    bins_key: str = UNS_BINS
    dna_key: str | None = UNS_DNA
    prior_key: str = VARM_LOCUS_PRIOR
    fasta: str | Path | None = None
    split_key: str | None = None
    validation_chroms: Sequence[str] | None = None
    test_chroms: Sequence[str] | None = None
    unseen: str = "error"

    def __post_init__(self) -> None:
        """Check what can be checked without data."""
        if self.counts_key is None and self.signal_key is None:
            message = "counts_key and signal_key are both None: at least one of them is needed."
            raise ConfigError(message)
        if self.fasta is not None and self.dna_key is None:
            message = "fasta is given and dna_key is None: name the entry of uns to read the DNA into."
            raise ConfigError(message)
        _validate.check_choice(self.unseen, "unseen", UNSEEN)
        for name in ("continuous_covariates", "categorical_covariates"):
            chosen = getattr(self, name)
            if isinstance(chosen, str):
                message = f"{name}={chosen!r} is not valid: give a list of keys of obsm."
                raise ConfigError(message)
        _validate.check_keys_distinct(None, self.categorical_covariates, self.continuous_covariates)
