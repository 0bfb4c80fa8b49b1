"""The one gate for user input: every check of data and arguments that more than one room needs.

Data that cannot be used raise `DataError`, arguments that cannot be used `ConfigError`; both are `ValueError`.
"""

from __future__ import annotations

import numbers
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp

from epivi._errors import ConfigError, DataError, nearest
from epivi._validate_counts import CountSummary, check_counts

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import pandas as pd

    from epivi._validate_counts import Names

__all__ = [
    "CountSummary",
    "check_anndata",
    "check_categorical",
    "check_choice",
    "check_continuous",
    "check_counts",
    "check_key",
    "check_keys_distinct",
    "check_number",
    "check_reference",
    "check_same_features",
]

# A column of numbers is taken for a measurement, not for categories, if it has more values than this and more than
# half of them differ.
_MIN_ROWS_CONTINUOUS = 20


def check_anndata(adata: Any, *, where: str = "adata") -> None:
    """Check that an object is an AnnData with cells, features, unique names and a matrix. Views are fine.

    Raises
    ------
    DataError
        If it is something else (MuData, a matrix, a file name); has fewer than two cells or no feature; has names
        that occur twice in either axis; has neither X nor layers.

    Examples
    --------
    >>> import numpy as np
    >>> from anndata import AnnData
    >>> check_anndata(AnnData(np.ones((3, 2))))
    """
    from anndata import AnnData

    if not isinstance(adata, AnnData):
        raise DataError(_not_anndata(adata, where))
    if adata.n_obs < 2:
        message = f"{where} has {adata.n_obs} cells (shape {adata.shape}). At least two cells are needed."
        raise DataError(message)
    if adata.n_vars < 1:
        message = f"{where} has zero features (shape {adata.shape}). Check how it was filtered or read."
        raise DataError(message)
    for axis in ("obs_names", "var_names"):
        names = getattr(adata, axis)
        if not names.is_unique:
            twice = names[names.duplicated()].unique()
            message = (
                f"{where}.{axis} are not unique: {len(twice)} names occur more than once, {_some(twice)}. "
                f"Call {where}.{axis}_make_unique(), or remove the duplicates."
            )
            raise DataError(message)
    if adata.X is None and len(adata.layers) == 0:
        message = f"{where} has neither X nor layers. Put the counts into {where}.X."
        raise DataError(message)


def _not_anndata(found: Any, where: str) -> str:
    """Say what was found in place of an AnnData and how to get one."""
    kind = f"{type(found).__module__}.{type(found).__qualname__}"
    if type(found).__name__ == "MuData":
        remedy = f"Pass one modality, one of {_some(list(found.mod), quote=True)}, or use the MuData form of the call"
        return f"{where} is a MuData, an AnnData is needed. {remedy}."
    if isinstance(found, str) or hasattr(found, "__fspath__"):
        return f"{where} is a file name ({str(found)!r}), an AnnData is needed. Read it with anndata.read_h5ad(...)."
    if isinstance(found, np.ndarray) or sp.issparse(found) or kind.startswith("pandas."):
        return f"{where} is a {kind}, an AnnData is needed. Wrap it: anndata.AnnData(...)."
    return f"{where} is a {kind}, an AnnData is needed."


def check_key(frame: pd.DataFrame | Mapping[str, Any], key: str, *, where: str) -> None:
    """Check that a table or a mapping such as ``adata.layers`` has an entry, once.

    Raises
    ------
    DataError
        If the key is missing (the nearest names are given), or two columns of the table have this name.
    ConfigError
        If the key is not a string.

    Examples
    --------
    >>> check_key({"counts": 1}, "counts", where="adata.layers")
    """
    if not isinstance(key, str):
        message = f"A key of {where} must be a string, found {key!r} ({type(key).__name__})."
        raise ConfigError(message)
    names = [name for name in frame.keys() if isinstance(name, str)]  # noqa: SIM118 - MuData and frames have keys()
    if (n_found := names.count(key)) == 0:
        message = f"{where} has no entry '{key}'. {nearest(key, names)}"
        raise DataError(message)
    if n_found > 1:
        message = f"{where} has {n_found} columns named '{key}'. Rename or remove all but one."
        raise DataError(message)


def check_categorical(frame: pd.DataFrame, key: str, *, where: str) -> None:
    """Check that a column can be used as categories: nothing missing, one type, not a measurement.

    A numeric column is refused as a measurement if it has more than 20 rows and more than half of its values differ.

    Raises
    ------
    DataError
        If the column is missing, has missing values (count and first cells are given), mixes types, or looks
        continuous.

    Examples
    --------
    >>> import pandas as pd
    >>> check_categorical(pd.DataFrame({"batch": ["a", "b"]}), "batch", where="adata.obs")
    """
    import pandas as pd

    check_key(frame, key, where=where)
    column = frame[key]
    missing = column.isna().to_numpy()
    if missing.any():
        message = (
            f"{where}['{key}'] has {int(missing.sum())} missing values, in {_some(column.index[missing])}. "
            "Give every cell a category, for example with .fillna('unknown'), or remove these cells."
        )
        raise DataError(message)
    n_unique = column.nunique()
    if (
        pd.api.types.is_numeric_dtype(column)
        and not pd.api.types.is_bool_dtype(column)
        and len(column) > _MIN_ROWS_CONTINUOUS
        and n_unique > 0.5 * len(column)
    ):
        message = (
            f"{where}['{key}'] looks continuous: {column.dtype} with {n_unique} different values in {len(column)} "
            "rows. Pass it as a continuous covariate; if these are categories, convert them with .astype(str)."
        )
        raise DataError(message)
    values = list(column.unique())
    if len({isinstance(value, str) for value in values}) > 1:
        types = sorted({type(value).__name__ for value in values})
        message = f"{where}['{key}'] mixes types: {', '.join(types)}. Convert the column with .astype(str)."
        raise DataError(message)


def check_continuous(frame: pd.DataFrame, key: str, *, where: str, positive: bool = False) -> None:
    """Check that a column holds finite numbers, above zero if asked.

    Raises
    ------
    DataError
        If the column is missing, is not numeric (Boolean, text and categories are not), or has a value that is
        missing, infinite, or with `positive` not above zero; the first such cell is named.

    Examples
    --------
    >>> import pandas as pd
    >>> check_continuous(pd.DataFrame({"depth": [10, 200]}), "depth", where="adata.obs", positive=True)
    """
    import pandas as pd

    check_key(frame, key, where=where)
    column = frame[key]
    types = pd.api.types
    if (
        not types.is_numeric_dtype(column)
        or types.is_bool_dtype(column)
        or types.is_complex_dtype(column)
        or isinstance(column.dtype, pd.CategoricalDtype)
    ):
        message = (
            f"{where}['{key}'] has dtype {column.dtype}, numbers are needed. Convert it with .astype(float), or pass "
            "it as a categorical covariate."
        )
        raise DataError(message)
    values_n = column.to_numpy(dtype=float, na_value=np.nan)
    for bad_n, needed in ((~np.isfinite(values_n), "finite"), (values_n <= 0, "above zero")):
        if (needed == "finite" or positive) and bad_n.any():
            at = int(np.flatnonzero(bad_n)[0])
            message = (
                f"{where}['{key}'] of cell '{column.index[at]}' (row {at}) is {values_n[at]:g}; every value must be "
                f"{needed}, {int(bad_n.sum())} are not. Correct these values or remove the cells."
            )
            raise DataError(message)


def check_keys_distinct(
    batch_key: str | None,
    categorical_keys: Sequence[str] | None = None,
    continuous_keys: Sequence[str] | None = None,
) -> None:
    """Check that no key is used twice among batch, categorical and continuous covariates.

    Raises
    ------
    ConfigError
        If a key has two roles or stands twice in one list, or a string is given where a list is needed.

    Examples
    --------
    >>> check_keys_distinct("batch", ["donor"], ["age"])
    """
    roles: dict[str, str] = {} if batch_key is None else {batch_key: "batch_key"}
    for role, keys in (
        ("categorical_covariate_keys", categorical_keys),
        ("continuous_covariate_keys", continuous_keys),
    ):
        if isinstance(keys, str):
            message = f"{role} must be a list of keys, found the string {keys!r}. Write [{keys!r}]."
            raise ConfigError(message)
        for key in keys or ():
            if key in roles:
                message = f"The key '{key}' is used twice, in {roles[key]} and in {role}. Use it once."
                raise ConfigError(message)
            roles[key] = role


def check_reference(array: Any, *, where: str, obs_names: Names, minimum: int = 2) -> np.ndarray:
    """Check a reference embedding and return which cells have one.

    Parameters
    ----------
    array
        Embedding of shape (n cells, r), numpy or DataFrame. A row of NaN means that the cell has no reference.
    where
        How the message names it, for example ``"adata.obsm['X_pca']"``.
    obs_names
        The n cell names.
    minimum
        Fewest cells with a reference.

    Returns
    -------
    Boolean mask (n,) of the cells with a reference.

    Raises
    ------
    DataError
        If it is not two-dimensional and numeric, has other rows than there are cells, has an infinite value, a row
        that is partly NaN, a row of zeros (its cosine is undefined), or fewer than ``minimum`` cells with a reference.

    Examples
    --------
    >>> check_reference([[1.0, 2.0], [float("nan")] * 2, [3.0, 1.0]], where="ref", obs_names=["a", "b", "c"]).tolist()
    [True, False, True]
    """
    values_nr = _reference_values(array, where, obs_names)
    names = np.asarray(obs_names, dtype=object)
    nan_nr = np.isnan(values_nr)
    has_reference_n = ~nan_nr.all(axis=1)
    zero_n = ~(values_nr != 0).any(axis=1)
    for bad_n, cause in (
        (np.isinf(values_nr).any(axis=1), "have infinite values. Compute the embedding anew"),
        (
            has_reference_n & nan_nr.any(axis=1),
            "are partly NaN. A cell has either a whole row of numbers or, without reference, a whole row of NaN",
        ),
        (zero_n, "hold only zeros, which have no direction. Set the rows of these cells to NaN"),
    ):
        if bad_n.any():
            message = f"{where}: the rows of {int(bad_n.sum())} cells, {_some(names[bad_n])}, {cause}."
            raise DataError(message)
    if has_reference_n.sum() < minimum:
        message = (
            f"{where}: {int(has_reference_n.sum())} of {len(names)} cells have a reference (a row without NaN), at "
            f"least {minimum} are needed. Check that the embedding belongs to these cells."
        )
        raise DataError(message)
    return has_reference_n


def _reference_values(array: Any, where: str, obs_names: Names) -> np.ndarray:
    """Return the embedding as a float array of the right shape, or refuse it."""
    if sp.issparse(array):
        message = f"{where} is a sparse matrix, a dense embedding is needed. Pass .toarray()."
        raise DataError(message)
    index = getattr(array, "index", None)
    if hasattr(array, "columns") and list(index) != list(obs_names) and set(index) == set(obs_names):  # type: ignore[arg-type]
        message = f"{where} has the cells in another order. Reorder it with .loc[obs_names]."
        raise DataError(message)
    values_nr = np.asarray(array)
    if values_nr.dtype.kind not in "iuf":
        message = f"{where} has dtype {values_nr.dtype}, numbers are needed. Convert it with .astype('float32')."
        raise DataError(message)
    if values_nr.ndim != 2 or values_nr.shape[0] != len(obs_names) or values_nr.shape[1] == 0:
        message = (
            f"{where} has shape {values_nr.shape}, needed is ({len(obs_names)} cells, dimensions). "
            "Compute the embedding on these cells."
        )
        raise DataError(message)
    return values_nr


def check_same_features(trained_names: Iterable[str], query_names: Iterable[str], *, where: str) -> np.ndarray | None:
    """Compare features by name and return how to reorder the query, or None if nothing is to be done.

    Returns
    -------
    None if both agree; else an integer array (p,) such that ``query[:, indexer]`` has the trained features in the
    trained order. Features which only the query has are left out by it.

    Raises
    ------
    DataError
        If features are missing in the query (number and first five are named) or names occur twice.

    Examples
    --------
    >>> check_same_features(["a", "b"], ["b", "c", "a"], where="adata").tolist()
    [2, 0]
    """
    import pandas as pd

    trained, query = pd.Index(trained_names), pd.Index(query_names)
    for names, whose in ((trained, "the trained model"), (query, where)):
        if not names.is_unique:
            twice = names[names.duplicated()].unique()
            message = f"The features of {whose} are not unique: {_some(twice)} occur twice. Remove the duplicates."
            raise DataError(message)
    if trained.equals(query):
        return None
    indexer = query.get_indexer(trained)
    missing = indexer < 0
    if missing.any():
        hint = ""
        if missing.all() and len(query):
            hint = f" No feature is shared: here the names look like '{query[0]}', genome and naming may differ."
        message = (
            f"{where} lacks {int(missing.sum())} of the {len(trained)} features of the trained model: "
            f"{_some(trained[missing])}.{hint} Call prepare_query_anndata first: it reorders and pads."
        )
        raise DataError(message)
    return indexer


def check_choice(value: Any, name: str, choices: Iterable[Any]) -> None:
    """Check that an argument is one of the allowed values.

    Raises
    ------
    ConfigError
        If it is not; the nearest allowed value is given.

    Examples
    --------
    >>> check_choice("dense", "encoder", ["dense", "chromosome"])
    """
    choices = list(choices)
    # True == 1 in Python, and arrays compare to arrays: neither may pass for a choice
    plain = value is None or isinstance(value, str | numbers.Number | np.bool_)
    is_bool = isinstance(value, bool | np.bool_)
    if not (plain and any(isinstance(choice, bool) == is_bool and value == choice for choice in choices)):
        message = f"{name}={value!r} is not valid. {nearest(str(value), map(str, choices))}"
        raise ConfigError(message)


def check_number(
    value: Any,
    name: str,
    *,
    low: float | None = None,
    high: float | None = None,
    integer: bool = False,
    low_inclusive: bool = True,
    high_inclusive: bool = True,
) -> None:
    """Check that an argument is a finite number inside a range. A Boolean is not a number.

    Raises
    ------
    ConfigError
        If it is not a number, is NaN or infinite, is not an integer where one is needed, or is out of range; the
        message gives the value, the range and its nearest end.

    Examples
    --------
    >>> check_number(0.5, "dropout_rate", low=0, high=1, high_inclusive=False)
    """
    what = "an integer" if integer else "a number"
    span = _span(low, high, low_inclusive=low_inclusive, high_inclusive=high_inclusive)
    kind = numbers.Integral if integer else numbers.Real
    if isinstance(value, bool | np.bool_) or not isinstance(value, kind):
        message = f"{name}={value!r} ({type(value).__name__}) is not valid: {what}{span} is needed."
        raise ConfigError(message)
    number: Any = value
    if not isinstance(number, numbers.Integral) and not np.isfinite(float(number)):
        message = f"{name}={value} is not valid: {what}{span} is needed, and it must be finite."
        raise ConfigError(message)
    for bound, outside, at_end in (
        (low, low is not None and number < low, not low_inclusive and number == low),
        (high, high is not None and number > high, not high_inclusive and number == high),
    ):
        if outside or at_end:
            message = f"{name}={value} is out of range: {what}{span} is needed. The nearest end is {bound}."
            raise ConfigError(message)


def _span(low: float | None, high: float | None, *, low_inclusive: bool, high_inclusive: bool) -> str:
    """Write a range in words: ' of at least 0 and below 1'."""
    parts = []
    if low is not None:
        parts.append(f"of at least {low}" if low_inclusive else f"above {low}")
    if high is not None:
        parts.append(f"of at most {high}" if high_inclusive else f"below {high}")
    return " " + " and ".join(parts) if parts else ""


def _some(names: Iterable[Any], *, n_shown: int = 5, quote: bool = True) -> str:
    """List the first names of many."""
    names = list(names)
    shown = ", ".join(f"'{name}'" if quote else str(name) for name in names[:n_shown])
    return f"{shown} and {len(names) - n_shown} more" if len(names) > n_shown else shown
