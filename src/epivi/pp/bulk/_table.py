"""The table of experiments: one row for each biosample and assay that was measured."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from epivi._errors import DataError
from epivi._validate import _some, check_key
from epivi.pp.bulk._grid import check_file
from epivi.pp.bulk.bam import RUN_TYPES

if TYPE_CHECKING:
    import pandas as pd

_FILES = {"bam": "BAM file", "bigwig": "bigWig file"}
_OBSM_TAKEN = ("counts", "signal", "availability", "availability_signal", "checksum")
MEASURED = ("depth", "coverage", "read_length")


class Experiment(NamedTuple):
    """One row of the table."""

    biosample: int
    assay: int
    name: str
    bam: Path | None
    bigwig: Path | None


class Experiments(NamedTuple):
    """The table, checked. `numbers` and `codes` hold the covariates by name, (biosamples, assays)."""

    biosamples: list[str]
    assays: list[str]
    rows: list[Experiment]
    numbers: dict[str, np.ndarray]
    codes: dict[str, np.ndarray]
    categories: dict[str, list[str]]

    def measured(self, kind: str) -> np.ndarray:
        """Return which experiments have a file of this kind, bool (biosamples, assays)."""
        mask = np.zeros((len(self.biosamples), len(self.assays)), dtype=bool)
        for row in self.rows:
            mask[row.biosample, row.assay] = getattr(row, kind) is not None
        return mask


def read_table(table: pd.DataFrame) -> Experiments:
    """Check a table of experiments and arrange it as biosamples by assays.

    Parameters
    ----------
    table
        Columns biosample, assay; bam and/or bigwig (paths; missing values where there is none); further columns are
        covariates: numbers, or categories where they are not numbers.

    Returns
    -------
    Biosamples and assays in the order in which they first occur. Numbers are float32, NaN where unknown, and always
    have depth, coverage and read_length; codes are int8, -1 where unknown, and always have run_type, whose categories
    are "single" and "paired".

    Raises
    ------
    DataError
        If the table is empty; a column is missing or has the name of an array of the store; a name is missing; an
        experiment occurs twice or has no file; a file is missing or empty; a covariate is infinite, has more than 127
        categories, or, for run_type, another category.

    Examples
    --------
    >>> import pandas as pd, tempfile
    >>> with tempfile.NamedTemporaryFile(suffix=".bam") as file:
    ...     _ = file.write(b"x"), file.flush()
    ...     found = read_table(pd.DataFrame({"biosample": ["K562"], "assay": ["DNase"], "bam": [file.name]}))
    >>> found.biosamples, found.assays, found.measured("bam").tolist()
    (['K562'], ['DNase'], [[True]])
    """
    for key in ("biosample", "assay"):
        check_key(table, key, where="table")
    kinds = [kind for kind in _FILES if kind in table]
    if not kinds or len(table) == 0:
        message = (
            f"table has {len(table)} rows and the columns {_some(table)}. At least one row, and a column 'bam' or "
            "'bigwig', are needed."
        )
        raise DataError(message)
    names = {key: _names(table, key) for key in ("biosample", "assay")}
    biosamples, assays = (list(dict.fromkeys(names[key])) for key in ("biosample", "assay"))
    rows: list[Experiment] = []
    seen: dict[tuple[str, str], int] = {}
    for i in range(len(table)):
        pair = names["biosample"][i], names["assay"][i]
        if pair in seen:
            message = (
                f"table: rows {seen[pair]} and {i} are both {pair[1]} of {pair[0]}. Give an experiment once: merge its "
                "files, or name replicates as biosamples of their own."
            )
            raise DataError(message)
        seen[pair] = i
        files = {kind: _path(table[kind].iloc[i], kind) if kind in kinds else None for kind in _FILES}
        if not any(files.values()):
            message = f"table: row {i}, {pair[1]} of {pair[0]}, has no file. Give one, or leave the row out."
            raise DataError(message)
        rows.append(Experiment(biosamples.index(pair[0]), assays.index(pair[1]), f"{pair[1]} of {pair[0]}", **files))
    found = Experiments(biosamples, assays, rows, {}, {}, {})
    for name in dict.fromkeys([*MEASURED, "run_type", *table]):
        if name not in ("biosample", "assay", *_FILES):
            _covariate(found, table, name)
    return found


def _names(table: pd.DataFrame, key: str) -> list[str]:
    missing = np.flatnonzero(table[key].isna().to_numpy())
    if missing.size:
        message = f"table['{key}'] is missing in row {missing[0]}. Name it."
        raise DataError(message)
    return [str(name) for name in table[key]]


def _path(value: Any, kind: str) -> Path | None:
    """Return the file of a cell of the table, None where it is empty."""
    import pandas as pd

    if value is None or (not isinstance(value, str | Path) and pd.isna(value)) or str(value) == "":
        return None
    return check_file(value, _FILES[kind])


def _covariate(found: Experiments, table: pd.DataFrame, name: str) -> None:
    """Arrange one covariate."""
    import pandas as pd

    shape = len(found.biosamples), len(found.assays)
    if not isinstance(name, str) or name in _OBSM_TAKEN or "/" in name:
        message = f"table has a column {name!r}: arrays of the store are named so, or cannot be. Rename it."
        raise DataError(message)
    b, a = [row.biosample for row in found.rows], [row.assay for row in found.rows]
    if name != "run_type" and (name not in table or pd.api.types.is_numeric_dtype(table[name])):
        array = np.full(shape, np.nan, dtype=np.float32)
        if name in table:
            array[b, a] = table[name].to_numpy(dtype=np.float32, na_value=np.nan)
        if np.isinf(array).any():
            message = f"table['{name}'] has an infinite value. Give a number, or leave it empty where unknown."
            raise DataError(message)
        found.numbers[name] = array
        return
    if name in MEASURED:
        message = f"table['{name}'] holds {table[name].dtype}, numbers are needed."
        raise DataError(message)
    codes = np.full(shape, -1, dtype=np.int8)
    values = [None if pd.isna(value) else str(value) for value in table[name]] if name in table else []
    levels = sorted({value for value in values if value is not None})
    if name == "run_type":
        if odd := [level for level in levels if level not in RUN_TYPES]:
            message = f"table['run_type'] has {_some(odd)}. Write 'single' or 'paired', or leave it empty."
            raise DataError(message)
        levels = list(RUN_TYPES)
    if len(levels) > np.iinfo(np.int8).max:
        message = (
            f"table['{name}'] has {len(levels)} categories, at most 127 can be held. Is it a name, not a covariate?"
        )
        raise DataError(message)
    if values:
        codes[b, a] = [-1 if value is None else levels.index(value) for value in values]
    found.codes[name], found.categories[name] = codes, levels
