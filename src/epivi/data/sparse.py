"""From registered data to batches: sparse rows stay sparse.

A batch is a plain dict of tensors. Each registered array has a reader that turns row numbers into entries of that dict;
arrays of other shapes (ragged tokens, tracks) come through the same door with readers of their own.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import pandas as pd
import torch
from scipy import sparse
from scvi.data import AnnDataManager
from scvi.data.fields import CategoricalJointObsField, CategoricalObsField
from torch.utils.data import Dataset, Subset

from epivi._errors import DataError
from epivi._keys import BATCH_INDICES, BATCH_INDPTR, BATCH_ROWS, BATCH_VALUES
from epivi.data.fields import INDEXER
from epivi.data.restore import restored_on_error

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from mudata import MuData
    from torch import Tensor

logger = logging.getLogger(__name__)


class Reader(Protocol):
    """Turns row numbers into entries of the batch."""

    def read(self, rows: np.ndarray) -> dict[str, Tensor]:
        """Return the entries of the rows, in the order of ``rows``."""


class SparseReader:
    """Rows of a matrix as compressed sparse rows: ``x_indptr``, ``x_indices``, ``x_values``.

    Parameters
    ----------
    matrix
        Cells × peaks: scipy sparse, dense, or backed on disk. Column-compressed matrices are converted once.
    indexer
        Position of each trained peak in ``matrix``, where the order differs.
    row_map
        Row of ``matrix`` that holds each observation, for a modality of a MuData; -1 where there is none, which reads
        as an empty row. ``None`` where rows and observations agree.
    prefix
        What the names of the entries begin with, for a second modality: ``rna_indptr`` and so on.
    """

    def __init__(
        self,
        matrix: Any,
        *,
        indexer: np.ndarray | None = None,
        row_map: np.ndarray | None = None,
        prefix: str = "x",
    ) -> None:
        if sparse.issparse(matrix) and matrix.format != "csr":
            logger.info("The counts are stored as %s; rows are read from a copy stored as csr.", matrix.format)
            matrix = matrix.tocsr()
        self.matrix = matrix
        self.indexer = indexer
        self.row_map = row_map
        self.prefix = prefix
        self.is_backed = not sparse.issparse(matrix) and not isinstance(matrix, np.ndarray)

    def rows(self, rows: np.ndarray) -> sparse.csr_matrix:
        """Return the rows as a csr matrix without stored zeros, each column once and sorted."""
        absent = None
        if self.row_map is not None:
            rows = self.row_map[rows]
            absent, rows = rows < 0, np.maximum(rows, 0)
        part = self._take(rows)
        if self.indexer is not None:
            part = part[:, self.indexer]
        part.sum_duplicates()
        if absent is not None and absent.any():
            part.data[np.repeat(absent, np.diff(part.indptr))] = 0
        if part.nnz and not part.data.all():
            part.eliminate_zeros()
        return part

    def _take(self, rows: np.ndarray) -> sparse.csr_matrix:
        """Return a copy of the rows."""
        inverse = None
        if self.is_backed:
            # stores on disk want increasing rows without repeats
            rows, inverse = np.unique(rows, return_inverse=True)
        part = self.matrix[rows]
        # scipy has no sparse form of half precision
        part = sparse.csr_matrix(part.astype(np.float32) if part.dtype == np.float16 else part)
        return part if inverse is None else part[inverse]

    def read(self, rows: np.ndarray) -> dict[str, Tensor]:
        """Return ``x_indptr`` (b + 1), ``x_indices`` (o) and ``x_values`` (o), with the reader's prefix for ``x``."""
        return row_tensors(self.rows(rows), prefix=self.prefix)


def row_tensors(part: sparse.csr_matrix, *, prefix: str = "x") -> dict[str, Tensor]:
    """Return compressed rows as entries of the batch: ``x_indptr`` (b + 1), ``x_indices`` (o), ``x_values`` (o).

    Parameters
    ----------
    part
        Rows of the matrix.
    prefix
        What the names begin with in place of ``x``.

    Examples
    --------
    >>> {key: value.tolist() for key, value in row_tensors(sparse.csr_matrix([[0, 3], [0, 0]])).items()}
    {'x_indptr': [0, 1, 1], 'x_indices': [1], 'x_values': [3.0]}
    """
    arrays = {
        BATCH_INDPTR: part.indptr.astype(np.int64),
        BATCH_INDICES: part.indices.astype(np.int64),
        BATCH_VALUES: part.data.astype(np.float32),
    }
    return {prefix + key.removeprefix("x"): torch.from_numpy(array) for key, array in arrays.items()}


class DenseReader:
    """Rows of a dense array of any number of axes: covariates, embeddings, tracks.

    Parameters
    ----------
    key
        Name of the entry in the batch.
    array
        Shape (n, ...).
    dtype
        Type of the tensor.
    row_map
        Row of ``array`` that holds each observation, for a modality of a MuData; ``None`` where they agree.
    """

    def __init__(self, key: str, array: np.ndarray, dtype: type, *, row_map: np.ndarray | None = None) -> None:
        self.key = key
        self.array = array
        self.dtype = dtype
        self.row_map = row_map

    def read(self, rows: np.ndarray) -> dict[str, Tensor]:
        """Return the rows under the reader's key."""
        if self.row_map is not None:
            rows = self.row_map[rows]
        return {self.key: torch.from_numpy(np.ascontiguousarray(self.array[rows], dtype=self.dtype))}


class BatchDataset(Dataset):
    """Batches of registered data; one call reads a whole minibatch, with the row numbers under ``rows``.

    Parameters
    ----------
    readers
        One reader for each registered array.
    n_obs
        Number of observations.
    """

    def __init__(self, readers: Sequence[Reader], n_obs: int) -> None:
        self.readers = list(readers)
        self.n_obs = n_obs

    def __len__(self) -> int:
        return self.n_obs

    def __getitem__(self, rows: int | Sequence[int] | np.ndarray) -> dict[str, Tensor]:
        rows = np.atleast_1d(np.asarray(rows, dtype=np.int64))
        batch: dict[str, Tensor] = {BATCH_ROWS: torch.from_numpy(rows)}
        for reader in self.readers:
            batch.update(reader.read(rows))
        return batch

    def __getitems__(self, rows: Sequence[int]) -> dict[str, Tensor]:
        return self[rows]


class SparseDataManager(AnnDataManager):
    """Manager of scvi-tools whose datasets keep sparse rows sparse, and whose refusals leave the data as they were."""

    def register_fields(
        self, adata: AnnData | MuData, source_registry: dict | None = None, **transfer_kwargs: Any
    ) -> None:
        """Register all fields, or none: if one raises, columns of obs and entries of obsm are as before.

        Parameters
        ----------
        adata
            AnnData or MuData to register.
        source_registry
            Registry of the trained data, if their setup is transferred.
        transfer_kwargs
            How it is transferred.
        """
        with restored_on_error(adata):
            super().register_fields(adata, source_registry, **transfer_kwargs)

    def create_torch_dataset(
        self,
        indices: Sequence[int] | Sequence[bool] | None = None,
        data_and_attributes: list[str] | dict[str, np.dtype] | None = None,
        load_sparse_tensor: bool = True,  # noqa: ARG002, FBT001, FBT002
    ) -> Dataset:
        """Return a dataset of the registered data, or of the chosen keys.

        Parameters
        ----------
        indices
            Observations, row numbers or a mask; all if ``None``.
        data_and_attributes
            Keys of the registry to read; all if ``None``.
        load_sparse_tensor
            Kept for scvi-tools; sparse data always stay sparse.
        """
        keys = list(self.data_registry) if data_and_attributes is None else list(data_and_attributes)
        dataset = BatchDataset([self._reader(key) for key in keys], self.adata.n_obs)
        if indices is None:
            return dataset
        rows = np.asarray(indices)
        return Subset(dataset, (np.flatnonzero(rows) if rows.dtype == bool else rows).tolist())

    def _reader(self, key: str) -> Reader:
        state = self.registry["field_registries"][key]["state_registry"]
        for field in self.fields:
            # fields of other shapes than a matrix or an array know how they are read
            if field.registry_key == key and hasattr(field, "make_reader"):
                return field.make_reader(self.adata, state)
        array = self.get_from_registry(key)
        mod_key = getattr(self.data_registry[key], "mod_key", None)
        row_map = None if mod_key is None else modality_rows(self.adata, mod_key)
        if INDEXER in state:
            indexer = state[INDEXER]
            return SparseReader(array, indexer=None if indexer is None else np.asarray(indexer), row_map=row_map)
        if isinstance(array, pd.DataFrame):
            array = array.to_numpy()
        if not isinstance(array, np.ndarray):
            message = (
                f"The registered entry '{key}' is a {type(array).__name__}, which no reader of epivi knows. "
                "Store it as a numpy array or a scipy sparse matrix."
            )
            raise DataError(message)
        if row_map is not None and (n_absent := int((row_map < 0).sum())):
            message = (
                f"The registered entry '{key}' comes from mdata['{mod_key}'], which lacks {n_absent} of "
                f"{row_map.size} cells. Put it into mdata.obs or mdata.obsm, or keep the cells of this modality."
            )
            raise DataError(message)
        dtype = np.int64 if self._is_categorical(key) else np.float32
        return DenseReader(key, array, dtype, row_map=row_map)

    def _is_categorical(self, key: str) -> bool:
        for field in self.fields:
            if field.registry_key == key:
                return isinstance(getattr(field, "adata_field", field), CategoricalObsField | CategoricalJointObsField)
        return False


def modality_rows(mdata: Any, modality: str) -> np.ndarray | None:
    """Return the row of a modality that holds each observation of a MuData, -1 where it has none.

    Parameters
    ----------
    mdata
        MuData.
    modality
        Name of the modality.

    Returns
    -------
    Shape (n,), or ``None`` if observations and rows agree.

    Examples
    --------
    >>> import anndata as ad, mudata as md
    >>> a = ad.AnnData(np.ones((2, 1)), obs=pd.DataFrame(index=["c1", "c2"]))
    >>> b = ad.AnnData(np.ones((2, 1)), obs=pd.DataFrame(index=["c2", "c3"]), var=pd.DataFrame(index=["g"]))
    >>> modality_rows(md.MuData({"a": a, "b": b}), "b").tolist()
    [-1, 0, 1]
    """
    rows = mdata.mod[modality].obs_names.get_indexer(mdata.obs_names)
    return None if np.array_equal(rows, np.arange(rows.size)) and rows.size == mdata.mod[modality].n_obs else rows
