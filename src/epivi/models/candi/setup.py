"""What CANDI reads of an AnnData of biosamples."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from epivi._keys import (
    OBSM_AVAILABILITY,
    OBSM_AVAILABILITY_SIGNAL,
    OBSM_COUNTS,
    OBSM_SIGNAL,
    UNS_BINS,
    UNS_CATEGORIES,
    UNS_DNA,
    VARM_LOCUS_PRIOR,
)
from epivi.data.windows import ExperimentKeys, ExperimentsField
from epivi.data.windows._checks import check_holder
from epivi.models.base_setup import check_transfer, register

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from anndata import AnnData


class SetupMixin:
    """Setup of bulk experiments."""

    @classmethod
    def setup_anndata(  # noqa: PLR0913, PLR0917
        cls,
        adata: AnnData,
        counts_key: str | None = OBSM_COUNTS,
        signal_key: str | None = OBSM_SIGNAL,
        availability_key: str = OBSM_AVAILABILITY,
        availability_signal_key: str | None = OBSM_AVAILABILITY_SIGNAL,
        covariates_key: Sequence[str] | None = None,
        sequence: str | Path | None = UNS_DNA,
        bins_key: str = UNS_BINS,
        split_key: str | None = None,
        validation_chroms: Sequence[str] | None = None,
        test_chroms: Sequence[str] | None = None,
        prior_key: str = VARM_LOCUS_PRIOR,
        unseen: str = "error",
        **kwargs: Any,
    ) -> None:
        """Check the data and register what the model reads.

        Every value of an available experiment is checked, block by block; arrays on disk stay there.

        Parameters
        ----------
        adata
            Biosamples × assays, as :func:`epivi.pp.bulk.open_store` returns them: ``obsm[counts_key]`` and
            ``obsm[signal_key]`` hold arrays (biosamples, assays, bins), in memory, zarr or dask, of which at least one
            is needed; ``uns[bins_key]`` the table of bins (chrom, start, end), all of one width.
        counts_key, signal_key
            ``None``: not used. With counts, the encoder reads counts; else it reads the signal.
        availability_key, availability_signal_key
            Boolean entries of obsm (biosamples, assays): which experiments exist; without the second the first serves
            counts and signal.
        covariates_key
            Entries of obsm (biosamples, assays): numbers, NaN unknown, or codes, -1 unknown, where
            ``uns["categories"]`` names the levels. By default depth, coverage, read_length and all that are named
            there. Of ``depth`` the logarithm to base 2 is taken.
        sequence
            DNA: a key of uns with codes (0-3 for ACGT, 4 for anything else; bins × bin width), used if it is there; a
            FASTA file; or ``None`` for none.
        bins_key
            Key of uns.
        split_key
            Column of obs that says ``"train"``, ``"validation"`` or ``"test"`` for each biosample; all train by
            default.
        validation_chroms, test_chroms
            Chromosomes to hold out. By default none is for tests, and the smallest that hold 10 % of the bins are for
            validation.
        prior_key
            Key of varm for the mean tracks of ``locus_prior``.
        unseen
            What becomes of categories that no training experiment has: ``"error"`` or ``"unknown"``.
        kwargs
            Used by scvi-tools to transfer a setup.

        Raises
        ------
        DataError
            If the data cannot be used; the message says what was found, where, and what to do.
        ConfigError
            If an argument is not valid.
        """
        setup_method_args = cls._get_setup_method_args(**locals())  # type: ignore[attr-defined]
        check_transfer(cls.setup_anndata, kwargs)
        check_holder(adata, where="adata")
        numbers, levels = _kinds(adata, covariates_key)
        is_key = sequence is None or sequence == UNS_DNA or sequence in adata.uns
        keys = ExperimentKeys(
            counts_key=counts_key,
            signal_key=signal_key,
            availability_key=availability_key,
            availability_signal_key=availability_signal_key,
            continuous_covariates=numbers,
            categorical_covariates=levels,
            bins_key=bins_key,
            dna_key=(None if sequence is None else str(sequence)) if is_key else UNS_DNA,
            fasta=None if is_key else sequence,
            prior_key=prior_key,
            split_key=split_key,
            validation_chroms=validation_chroms,
            test_chroms=test_chroms,
            unseen=unseen,
        )
        register(cls, adata, [ExperimentsField(keys)], setup_method_args, kwargs)


def _kinds(adata: AnnData, names: Sequence[str] | None) -> tuple[list[str] | None, list[str] | None]:
    """Tell covariates that are numbers from those that are codes of levels."""
    if names is None:
        return None, None
    names = [names] if isinstance(names, str) else list(names)
    levels = [name for name in names if name in adata.uns.get(UNS_CATEGORIES, {})]
    return [name for name in names if name not in levels], levels
