"""DNA under the bins: codes of bases, 0-3 = A, C, G, T and 4 = anything else."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np

from epivi._errors import DataError
from epivi._keys import UNS_GENOME
from epivi.data.windows._checks import BLOCK_VALUES, in_memory

if TYPE_CHECKING:
    from pathlib import Path

    from anndata import AnnData

    from epivi.data.windows.regions import Runs

BASES: Final = 5


def check_dna(dna: Any, *, where: str, n_bp: int) -> None:
    """Check that DNA is one code from 0 to 4 for each bp of the bins.

    Raises
    ------
    DataError
        If it has another type or length, or another value; the first one is named.

    Examples
    --------
    >>> check_dna(np.array([0, 4], dtype=np.uint8), where="uns['dna']", n_bp=2)
    """
    if not hasattr(dna, "shape") or not hasattr(dna, "dtype") or np.dtype(dna.dtype) != np.uint8:
        found = getattr(dna, "dtype", type(dna).__name__)
        message = f"{where} is {found}: codes of bases as uint8 are needed, 0-3 = A, C, G, T and 4 = anything else."
        raise DataError(message)
    if tuple(dna.shape) != (n_bp,):
        message = f"{where} has the shape {tuple(dna.shape)}, needed is ({n_bp},): a code for each bp of the bins."
        raise DataError(message)
    for start in range(0, n_bp, BLOCK_VALUES):
        part = in_memory(dna[start : start + BLOCK_VALUES])
        if part.max(initial=0) >= BASES:
            at = int(np.argmax(part >= BASES))
            message = f"{where} is {part[at]} at position {start + at}: codes are 0-3 = A, C, G, T and 4."
            raise DataError(message)


def read_fasta(fasta: str | Path, adata: AnnData, found: Runs, *, where: str) -> np.ndarray:
    """Return the codes of the bases under the bins, uint8 (n_bins · width,).

    Parameters
    ----------
    fasta
        FASTA file, plain or gzip.
    adata
        Its ``uns["genome"]["chrom_sizes"]`` tells the lengths of the chromosomes.
    found
        Runs of the bins.
    where
        How messages call the object.

    Raises
    ------
    DataError
        If the lengths are missing or shorter than the bins reach, or the file cannot be used.

    Examples
    --------
    >>> import pathlib, tempfile
    >>> import pandas as pd
    >>> from anndata import AnnData
    >>> from epivi.data.windows.regions import runs
    >>> path = pathlib.Path(tempfile.mkdtemp()) / "a.fa"
    >>> _ = path.write_text(">1" + chr(10) + "ACGTN")
    >>> adata = AnnData(uns={"genome": {"chrom_sizes": {"1": 5}}})
    >>> bins = runs(pd.DataFrame({"chrom": ["1", "1"], "start": [1, 3], "end": [3, 5]}))
    >>> read_fasta(path, adata, bins, where="adata").tolist()
    [1, 2, 3, 4]
    """
    from epivi.pp.bulk.dna import read_dna

    genome = adata.uns.get(UNS_GENOME, {})
    if not hasattr(genome, "get") or not genome.get("chrom_sizes"):
        message = (
            f"fasta needs the lengths of the chromosomes in {where}.uns['genome']['chrom_sizes'] (name to bp). Add "
            "them, or put the codes of the bases into uns['dna']."
        )
        raise DataError(message)
    sizes = {name: int(genome["chrom_sizes"][name]) for name in found.chromosomes if name in genome["chrom_sizes"]}
    for run in found:
        end = run.start_bp + run.n_bins * found.bin_size_bp
        if end > sizes.get(run.chrom, 0):
            message = (
                f"The bins of {where} reach to {run.chrom}:{end}, beyond the {sizes.get(run.chrom, 0)} bp that "
                "uns['genome']['chrom_sizes'] tells. Correct one of them."
            )
            raise DataError(message)
    codes = read_dna(fasta, sizes, bin_size_bp=1)
    parts = [codes[run.chrom][run.start_bp : run.start_bp + run.n_bins * found.bin_size_bp] for run in found]
    return np.concatenate(parts)
