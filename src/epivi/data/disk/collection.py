"""From zarr stores of one data set to an AnnData whose matrix stays on disk."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from epivi._errors import DataError
from epivi.data.disk.rows import DiskRows, annbatch_or_refuse

if TYPE_CHECKING:
    from anndata import AnnData

# annbatch numbers the data sets of a collection
PREFIX = "dataset_"


def open_collection(path: Path | str | Any, *, layer: str | None = None) -> AnnData:
    """Open an annbatch collection of shuffled zarr shards, or one AnnData in a zarr store, with X left on disk.

    Parameters
    ----------
    path
        Folder of the store, a zarr group, or an ``annbatch.DatasetCollection``.
    layer
        Layer that becomes X; X itself by default.

    Returns
    -------
    AnnData with obs and var in memory, of all shards one below the other, and X as
    :class:`epivi.data.disk.DiskRows`. Tables of varm are those of the first shard; other entries are left out.

    Raises
    ------
    ConfigError
        If annbatch is not installed.
    DataError
        If there is no store, it holds no AnnData, a shard lacks the matrix, has it in another form than row-compressed,
        or other genes, or a name of a cell occurs twice.
    """
    annbatch_or_refuse()
    import anndata

    groups = _groups(path)
    parts, frames = [], []
    first = anndata.io.read_elem(groups[0]["var"])
    for group in groups:
        parts.append(_matrix(group, layer))
        if not anndata.io.read_elem(group["var"]).index.equals(first.index):
            message = f"The shards '{groups[0].name}' and '{group.name}' have other genes, or another order of them."
            raise DataError(message)
        frames.append(anndata.io.read_elem(group["obs"]))
    names = np.concatenate([frame.index.to_numpy() for frame in frames])
    is_repeat = pd.Index(names).duplicated()
    if is_repeat.any():
        twice = np.unique(names[is_repeat])[:3].tolist()
        message = (
            f"The store holds cells twice: {twice}. What is drawn of a cell follows from its name: make obs_names "
            "unique in the files before they are joined."
        )
        raise DataError(message)
    # anndata unites the categories of the columns
    obs = frames[0]
    if len(frames) > 1:
        obs = anndata.concat([anndata.AnnData(obs=frame) for frame in frames], join="outer").obs
    varm = anndata.io.read_elem(groups[0]["varm"]) if "varm" in groups[0] else {}
    return anndata.AnnData(DiskRows(parts), obs=obs, var=first, varm=varm)


def _groups(path: Any) -> list[Any]:
    """Return the groups of the shards, in order."""
    import zarr

    if hasattr(path, "add_adatas"):  # a collection of annbatch
        groups = list(path)
        if not groups:
            message = "The annbatch.DatasetCollection is empty: add data with add_adatas."
            raise DataError(message)
        return groups
    if isinstance(path, str | Path):
        if not Path(path).is_dir():
            message = f"There is no zarr store at '{path}': a folder written by annbatch or adata.write_zarr is needed."
            raise DataError(message)
        try:
            path = zarr.open_group(path, mode="r")
        except FileNotFoundError as error:
            message = f"The folder '{path}' is no zarr store."
            raise DataError(message) from error
    names = [name for name in path.group_keys() if name.startswith(PREFIX) and name[len(PREFIX) :].isdigit()]
    if names:
        return [path[name] for name in sorted(names, key=lambda name: int(name[len(PREFIX) :]))]
    if "obs" not in path or "var" not in path:
        found = sorted(path.keys())[:5]
        message = f"The store '{path.store}' holds neither an AnnData nor shards named {PREFIX}0, ...; it has {found}."
        raise DataError(message)
    return [path]


def _matrix(group: Any, layer: str | None) -> Any:
    """Return the matrix of a shard, on disk."""
    import anndata

    key = "X" if layer is None else f"layers/{layer}"
    if key not in group:
        found = sorted(group["layers"].keys()) if "layers" in group else []
        message = f"The shard '{group.name}' has no '{key}'. Its layers are {found}."
        raise DataError(message)
    kind = group[key].attrs.get("encoding-type")
    if kind != "csr_matrix":
        message = f"'{key}' of the shard '{group.name}' is stored as {kind}, not row-compressed. Write it as scipy csr."
        raise DataError(message)
    return anndata.io.sparse_dataset(group[key])
