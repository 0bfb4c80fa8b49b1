from __future__ import annotations

import logging
from itertools import pairwise

import anndata as ad
import mudata as md
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from scvi.data import AnnDataManagerValidationCheck
from scvi.data.fields import (
    CategoricalJointObsField,
    CategoricalObsField,
    LayerField,
    MuDataWrapper,
    NumericalJointObsField,
    NumericalObsField,
    ObsmField,
)
from torch.utils.data import DataLoader

from epivi._errors import DataError
from epivi.data.fields import MuDataPeaksField, PeaksField
from epivi.data.sparse import (
    BatchDataset,
    DenseReader,
    SparseDataManager,
    SparseReader,
    modality_rows,
    row_tensors,
)

N_CELLS, N_PEAKS = 12, 9
PARTS = ("indptr", "indices", "values")
ORDERS = [[0], [3, 1, 2], [11, 0, 5, 0, 11], list(range(N_CELLS)), [4, 4]]


@pytest.fixture
def counts_np():
    rng = np.random.default_rng(0)
    counts_np = rng.integers(0, 4, (N_CELLS, N_PEAKS)) * (rng.random((N_CELLS, N_PEAKS)) < 0.5)
    counts_np[4] = 0
    counts_np[:, 2] = 0
    return counts_np.astype(np.float32)


def anndata(counts_np, matrix=None):
    obs = pd.DataFrame(
        {
            "batch": pd.Categorical(["b", "a", "c"] * 4),
            "lab": pd.Categorical(["x", "y"] * 6),
            "depth": np.linspace(10, 21, N_CELLS),
            "age": np.linspace(-1, 1, N_CELLS),
        },
        index=[f"c{i}" for i in range(N_CELLS)],
    )
    var = pd.DataFrame(index=[f"p{i}" for i in range(N_PEAKS)])
    matrix = sparse.csr_matrix(counts_np) if matrix is None else matrix
    reference = np.arange(N_CELLS * 2, dtype=np.float64).reshape(N_CELLS, 2)
    return ad.AnnData(matrix, obs=obs, var=var, obsm={"ref": reference})


def manager(data, *fields, source=None, paired=True):
    found = SparseDataManager(
        fields=list(fields),
        setup_method_args={"model_name": "M", "setup_args": {}},
        validation_checks=AnnDataManagerValidationCheck(check_fully_paired_mudata=paired),
    )
    found.register_fields(data, source_registry=source)
    return found


def dense(batch, n_peaks=N_PEAKS, prefix="x"):
    """The rows of a batch as a dense matrix; the layout of compressed rows is checked on the way."""
    indptr, indices, values = (batch[f"{prefix}_{name}"].numpy() for name in PARTS)
    assert (indptr.dtype, indices.dtype, values.dtype) == (np.int64, np.int64, np.float32)
    assert indptr[0] == 0
    assert indptr[-1] == indices.size == values.size
    assert values.all(), "a stored zero"
    for start, stop in pairwise(indptr):
        assert (np.diff(indices[start:stop]) > 0).all(), "columns of a row out of order or twice"
    return sparse.csr_matrix((values, indices, indptr), shape=(indptr.size - 1, n_peaks)).toarray()


def with_explicit_zeros(counts_np):
    matrix = sparse.csr_matrix(counts_np)
    matrix.data[::3] = 0
    counts_np[:] = matrix.toarray()
    return matrix


def with_entries_twice(counts_np):
    """Each count n is stored as n - 1 and 1, columns in falling order."""
    rows, columns = np.nonzero(counts_np)
    order = np.lexsort([-columns, rows])
    rows, columns = np.repeat(rows[order], 2), np.repeat(columns[order], 2)
    values = np.stack([counts_np[rows[::2], columns[::2]] - 1, np.ones(rows.size // 2)], 1).ravel()
    indptr = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=N_CELLS))])
    return sparse.csr_matrix((values, columns, indptr), shape=counts_np.shape)


KINDS = {
    "csr_matrix": sparse.csr_matrix,
    "csr_array": sparse.csr_array,
    "csc_matrix": sparse.csc_matrix,
    "csc_array": sparse.csc_array,
    "coo": sparse.coo_matrix,
    "dense": np.array,
    "integers": lambda x: sparse.csr_matrix(x.astype(np.uint8)),
    "dense integers": lambda x: x.astype(np.int32),
    "int64 indices": lambda x: sparse.csr_array(
        (
            sparse.csr_array(x).data,
            *(a.astype(np.int64) for a in (sparse.csr_array(x).indices, sparse.csr_array(x).indptr)),
        )
    ),
    "explicit zeros": with_explicit_zeros,
    "entries twice": with_entries_twice,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", ORDERS)
def test_every_kind_of_matrix_gives_the_rows_asked_in_their_order(counts_np, kind, rows):
    matrix = KINDS[kind](counts_np)
    before = matrix.copy()
    batch = SparseReader(matrix).read(np.array(rows))
    np.testing.assert_array_equal(dense(batch), counts_np[rows])
    # the user's matrix keeps its zeros, duplicates and order
    changed = (before != matrix).nnz if sparse.issparse(matrix) else (before != matrix).sum()
    assert changed == 0
    assert getattr(before, "nnz", 0) == getattr(matrix, "nnz", 0)


@pytest.mark.parametrize("kind", ["csr_matrix", "csc_matrix", "dense"])
@pytest.mark.parametrize("rows", ORDERS)
def test_files_on_disk_give_the_same_rows(counts_np, kind, rows, tmp_path):
    anndata(counts_np, KINDS[kind](counts_np)).write_h5ad(tmp_path / "a.h5ad")
    backed = ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
    try:
        reader = SparseReader(backed.X)
        np.testing.assert_array_equal(dense(reader.read(np.array(rows))), counts_np[rows])
        order = np.arange(N_PEAKS)[::-1]
        reader = SparseReader(backed.X, indexer=order, row_map=np.arange(N_CELLS)[::-1])
        np.testing.assert_array_equal(dense(reader.read(np.array(rows))), counts_np[::-1, ::-1][rows])
    finally:
        backed.file.close()


@pytest.mark.parametrize("kind", KINDS)
def test_permuted_and_superfluous_peaks_are_put_into_the_trained_order(counts_np, kind):
    indexer = np.array([5, 0, 8, 1])
    reader = SparseReader(KINDS[kind](counts_np), indexer=indexer)
    np.testing.assert_array_equal(dense(reader.read(np.array([3, 0])), 4), counts_np[[3, 0]][:, indexer])


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_mapped_and_those_without_one_are_empty(counts_np, kind):
    row_map = np.array([7, -1, 0, -1, 3])
    reader = SparseReader(KINDS[kind](counts_np), row_map=row_map)
    expected = np.where(row_map[:, None] >= 0, counts_np[row_map], 0)
    np.testing.assert_array_equal(dense(reader.read(np.arange(5))), expected)
    np.testing.assert_array_equal(dense(reader.read(np.array([3, 1]))), np.zeros((2, N_PEAKS)))
    np.testing.assert_array_equal(dense(reader.read(np.array([4, 1, 0]))), expected[[4, 1, 0]])


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.lists(st.integers(0, 7), min_size=1, max_size=12), st.booleans())
def test_any_rows_equal_those_of_the_dense_matrix(seed, rows, permuted):
    rng = np.random.default_rng(seed)
    counts_np = rng.integers(0, 2, (8, 6))
    indexer = rng.permutation(6) if permuted else None
    batch = SparseReader(sparse.csr_matrix(counts_np), indexer=indexer).read(np.array(rows))
    expected = counts_np[rows] if indexer is None else counts_np[rows][:, indexer]
    np.testing.assert_array_equal(dense(batch, 6), expected)


def test_a_column_matrix_is_converted_once_and_said_so(counts_np, caplog):
    with caplog.at_level(logging.INFO, "epivi"):
        reader = SparseReader(sparse.csc_matrix(counts_np))
        reader.read(np.array([0]))
    assert [record.message for record in caplog.records] == [
        "The counts are stored as csc; rows are read from a copy stored as csr."
    ]
    assert reader.matrix.format == "csr"


def test_a_dense_reader_keeps_order_shape_and_asked_type():
    array = np.arange(24).reshape(4, 3, 2)[:, ::-1]  # not contiguous
    entry = DenseReader("tracks", array, np.float32).read(np.array([2, 0, 2]))["tracks"]
    assert entry.dtype == torch.float32
    np.testing.assert_array_equal(entry.numpy(), array[[2, 0, 2]])
    mapped = DenseReader("tracks", array, np.float32, row_map=np.array([3, 1])).read(np.array([1, 0]))["tracks"]
    np.testing.assert_array_equal(mapped.numpy(), array[[1, 3]])
    assert DenseReader("codes", array, np.int64).read(np.array([1]))["codes"].dtype == torch.int64


def test_a_dataset_joins_its_readers_and_tells_the_rows(counts_np):
    dataset = BatchDataset([SparseReader(counts_np), DenseReader("d", np.arange(N_CELLS), np.float32)], N_CELLS)
    assert len(dataset) == N_CELLS
    batch = dataset[[5, 2]]
    assert set(batch) == {"rows", "x_indptr", "x_indices", "x_values", "d"}
    assert batch["rows"].tolist() == [5, 2]
    assert batch["d"].tolist() == [5.0, 2.0]
    one = dataset[3]
    np.testing.assert_array_equal(dense(one), counts_np[[3]])
    same = dataset.__getitems__([5, 2])
    assert all(torch.equal(batch[key], same[key]) for key in batch)


def test_a_second_modality_has_names_of_its_own(counts_np):
    rna_np = counts_np[:, ::-1] + np.eye(N_CELLS, N_PEAKS, dtype=np.float32)
    dataset = BatchDataset([SparseReader(counts_np), SparseReader(sparse.csr_matrix(rna_np), prefix="rna")], N_CELLS)
    batch = dataset[[5, 2]]
    assert set(batch) == {"rows", *(f"{part}_{name}" for part in ("x", "rna") for name in PARTS)}
    np.testing.assert_array_equal(dense(batch), counts_np[[5, 2]])
    np.testing.assert_array_equal(dense(batch, prefix="rna"), rna_np[[5, 2]])
    # a prefix that begins with, or holds, the default one
    part = sparse.csr_matrix(counts_np[:3])
    for prefix in ("x", "xx", "x_rna", "matrix"):
        tensors = row_tensors(part, prefix=prefix)
        assert list(tensors) == [f"{prefix}_{name}" for name in PARTS]
        np.testing.assert_array_equal(dense(tensors, prefix=prefix), counts_np[:3])
    assert list(row_tensors(part)) == ["x_indptr", "x_indices", "x_values"]


FIELDS = {
    "X": lambda: PeaksField("X", None),
    "batch": lambda: CategoricalObsField("batch", "batch"),
    "cats": lambda: CategoricalJointObsField("cats", ["batch", "lab"]),
    "depth": lambda: NumericalObsField("depth", "depth"),
    "conts": lambda: NumericalJointObsField("conts", ["depth", "age"]),
    "ref": lambda: ObsmField("ref", "ref"),
}
EXPECTED = {
    "batch": (torch.int64, [[1], [0]]),
    "cats": (torch.int64, [[1, 1], [0, 0]]),
    "depth": (torch.float32, [[13.0], [20.0]]),
    "conts": (torch.float32, [[13.0, -1 + 3 * 2 / 11], [20.0, -1 + 10 * 2 / 11]]),
    "ref": (torch.float32, [[6.0, 7.0], [20.0, 21.0]]),
}


def test_registered_fields_become_entries_of_the_right_type(counts_np):
    data = manager(anndata(counts_np), *(make() for make in FIELDS.values()))
    batch = data.create_torch_dataset()[np.array([3, 10])]
    np.testing.assert_array_equal(dense(batch), counts_np[[3, 10]])
    for key, (dtype, values) in EXPECTED.items():
        assert batch[key].dtype == dtype
        torch.testing.assert_close(batch[key], torch.tensor(values, dtype=dtype))
    assert set(batch) == {"rows", "x_indptr", "x_indices", "x_values", *EXPECTED}


@pytest.mark.parametrize("keys", [["depth"], {"depth": np.float32}])
def test_chosen_keys_are_read_alone(counts_np, keys):
    data = manager(anndata(counts_np), *(make() for make in FIELDS.values()))
    assert set(data.create_torch_dataset(data_and_attributes=keys)[0]) == {"rows", "depth"}


def test_chosen_observations_by_number_and_by_mask(counts_np):
    data = manager(anndata(counts_np), FIELDS["X"]())
    chosen = [9, 1, 4, 6]
    subset = data.create_torch_dataset(indices=chosen)
    assert len(subset) == 4
    np.testing.assert_array_equal(dense(subset[[2, 0]]), counts_np[[4, 9]])
    mask = np.isin(np.arange(N_CELLS), chosen)
    subset = data.create_torch_dataset(indices=mask)
    assert len(subset) == 4
    assert subset[[0, 1, 2, 3]]["rows"].tolist() == [1, 4, 6, 9]
    assert data.create_torch_dataset(indices=mask.tolist())[[3]]["rows"].tolist() == [9]


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_loader_gives_whole_minibatches(counts_np, num_workers):
    dataset = manager(anndata(counts_np), FIELDS["X"](), FIELDS["batch"]()).create_torch_dataset()
    parts = [[3, 1, 2], [11, 0], [4]]
    loader = DataLoader(dataset, sampler=parts, batch_size=None, num_workers=num_workers)
    for part, batch in zip(parts, loader, strict=True):
        assert batch["rows"].tolist() == part
        np.testing.assert_array_equal(dense(batch), counts_np[part])
        assert batch["batch"].shape == (len(part), 1)


@pytest.mark.parametrize("kind", ["csr_matrix", "csc_matrix", "dense"])
def test_a_query_with_permuted_peaks_gives_the_trained_order(counts_np, kind):
    trained = manager(anndata(counts_np), FIELDS["X"]())
    order = np.random.default_rng(2).permutation(N_PEAKS)
    query = anndata(counts_np, KINDS[kind](counts_np))[:, order].copy()
    moved = manager(query, FIELDS["X"](), source=trained.registry)
    np.testing.assert_array_equal(dense(moved.create_torch_dataset()[[7, 2]]), counts_np[[7, 2]])


def test_a_backed_anndata_gives_the_same_batches(counts_np, tmp_path):
    anndata(counts_np).write_h5ad(tmp_path / "a.h5ad")
    backed = ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
    try:
        batch = manager(backed, FIELDS["X"](), FIELDS["depth"]()).create_torch_dataset()[[8, 3, 8]]
        np.testing.assert_array_equal(dense(batch), counts_np[[8, 3, 8]])
        assert batch["depth"].tolist() == [[18.0], [13.0], [18.0]]
    finally:
        backed.file.close()


def paired(counts_np, atac_cells, rna_cells):
    """A MuData whose modalities hold some of the cells c0 to c11, in orders of their own."""
    whole = anndata(counts_np)
    atac = whole[atac_cells].copy()
    rna = ad.AnnData(
        np.ones((len(rna_cells), 2), dtype=np.float32),
        obs=pd.DataFrame(index=[f"c{i}" for i in rna_cells]),
        var=pd.DataFrame(index=["g0", "g1"]),
    )
    return md.MuData({"rna": rna, "atac": atac})


def test_rows_of_a_modality_are_found_by_name(counts_np):
    mdata = paired(counts_np, [5, 1, 8], [8, 2, 5])
    expected = {"atac": ["c5", "c1", "c8"], "rna": ["c8", "c2", "c5"]}
    for modality, names in expected.items():
        rows = modality_rows(mdata, modality)
        assert rows.size == mdata.n_obs == 4
        assert [names[row] if row >= 0 else None for row in rows] == [
            name if name in names else None for name in mdata.obs_names
        ]


def test_rows_that_agree_need_no_map(counts_np):
    mdata = paired(counts_np, list(range(N_CELLS)), list(range(N_CELLS)))
    assert modality_rows(mdata, "atac") is None
    assert modality_rows(mdata[[2, 0]].copy(), "atac") is None
    longer = paired(counts_np, [0, 1, 2], [0, 1])
    assert modality_rows(longer, "rna") is not None or longer.n_obs == 2


def test_batches_of_a_mudata_follow_its_own_order_and_leave_missing_cells_empty(counts_np):
    mdata = paired(counts_np, [5, 1, 8], [8, 2, 5])
    data = manager(mdata, MuDataPeaksField("X", None, mod_key="atac", mod_required=True), paired=False)
    dataset = data.create_torch_dataset()
    assert len(dataset) == 4
    order = [3, 0, 2, 1]
    numbers = [int(name[1:]) for name in mdata.obs_names[order]]
    expected = np.stack([np.zeros(N_PEAKS) if i == 2 else counts_np[i] for i in numbers])
    np.testing.assert_array_equal(dense(dataset[order]), expected)


def test_every_entry_of_a_modality_follows_the_order_of_the_mudata(counts_np):
    rng = np.random.default_rng(4)
    in_order = rng.permutation(N_CELLS).tolist()
    mdata = paired(counts_np, in_order, rng.permutation(N_CELLS).tolist())
    in_atac = {"mod_key": "atac"}
    data = manager(
        mdata,
        MuDataPeaksField("X", None, **in_atac, mod_required=True),
        MuDataWrapper(CategoricalObsField)("batch", "batch", **in_atac),
        MuDataWrapper(NumericalObsField)("depth", "depth", **in_atac),
        MuDataWrapper(ObsmField)("ref", "ref", **in_atac),
    )
    batch = data.create_torch_dataset()[np.arange(N_CELLS)]
    numbers = np.array([int(name[1:]) for name in mdata.obs_names])
    assert numbers.tolist() != in_order, "the modality must have an order of its own"
    np.testing.assert_array_equal(dense(batch), counts_np[numbers])
    assert batch["batch"][:, 0].tolist() == [[1, 0, 2][i % 3] for i in numbers]
    torch.testing.assert_close(batch["depth"][:, 0], torch.from_numpy(10.0 + numbers).float())
    assert batch["ref"][:, 0].tolist() == (2.0 * numbers).tolist()


def test_dense_entries_of_a_modality_that_lacks_cells_are_refused(counts_np):
    mdata = paired(counts_np, [5, 1, 8], [8, 2, 5])
    data = manager(mdata, MuDataWrapper(NumericalObsField)("depth", "depth", mod_key="atac"), paired=False)
    with pytest.raises(DataError, match=r"'depth' comes from mdata\['atac'\], which lacks 1 of 4 cells. Put it into"):
        data.create_torch_dataset()


def test_an_entry_of_unknown_type_is_refused(counts_np):
    adata = anndata(counts_np)
    adata.obsm["ref"] = sparse.csr_matrix(adata.obsm["ref"])
    data = manager(adata, FIELDS["ref"]())
    with pytest.raises(DataError, match="The registered entry 'ref' is a csr_matrix, which no reader of epivi knows"):
        data.create_torch_dataset()


def test_a_sparse_layer_without_a_peaks_field_is_refused(counts_np):
    data = manager(anndata(counts_np), LayerField("X", None, is_count_data=False))
    with pytest.raises(DataError, match="Store it as a numpy array or a scipy sparse matrix"):
        data.create_torch_dataset()


def test_categories_of_a_modality_are_codes(counts_np):
    mdata = paired(counts_np, list(range(N_CELLS)), list(range(N_CELLS)))
    field = MuDataWrapper(CategoricalObsField)("batch", "batch", mod_key="atac")
    batch = manager(mdata, field).create_torch_dataset()[[3, 10]]
    assert batch["batch"].dtype == torch.int64
    assert batch["batch"].tolist() == [[1], [0]]
