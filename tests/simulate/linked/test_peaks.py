from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from epivi._errors import ConfigError, DataError
from epivi.simulate import linked_multiome, shifted_peaks


def peaks(regions, x=None):
    """Return cells by these peaks, by default one cell a peak with the peak open."""
    chrom, start, end = zip(*regions, strict=True)
    var = pd.DataFrame(
        {"chrom": chrom, "start": np.array(start), "end": np.array(end)}, index=[f"p{i}" for i in range(len(regions))]
    )
    return AnnData(sparse.csr_matrix(np.eye(len(regions), dtype=np.int32) if x is None else x), var=var)


@pytest.fixture(scope="module")
def atac():
    return linked_multiome(60, binary=False, mean_open=0.5)["atac"]


def test_overlapping_peaks_are_merged_and_touching_ones_are_not():
    regions = [("chr2", 0, 100), ("chr1", 50, 120), ("chr1", 0, 300), ("chr1", 250, 260), ("chr1", 300, 400)]
    x = np.array([[1, 2, 0, 3, 4], [0, 0, 5, 0, 0]], dtype=np.int32)
    shifted = shifted_peaks(peaks(regions, x), shift=0)
    assert shifted.var_names.tolist() == ["chr2:0-100", "chr1:0-300", "chr1:300-400"]
    assert shifted.var["n_merged"].tolist() == [1, 3, 1]
    assert shifted.uns["simulation"]["column"].tolist() == [0, 1, 1, 1, 2]
    assert shifted.X.toarray().tolist() == [[1, 5, 4], [0, 5, 0]]
    assert shifted.X.dtype == np.int32
    apart = shifted_peaks(peaks(regions, x), shift=0, merge=False)
    assert apart.var_names.tolist() == ["chr2:0-100", "chr1:0-300", "chr1:50-120", "chr1:250-260", "chr1:300-400"]
    assert apart.X.toarray()[0].tolist() == [1, 0, 2, 3, 4]


@pytest.mark.parametrize("dtype", [bool, np.int8, np.float32])
def test_binary_stays_binary(dtype):
    x = np.array([[1, 1, 1], [0, 1, 0]], dtype=dtype)
    shifted = shifted_peaks(peaks([("chr1", 0, 10), ("chr1", 5, 15), ("chr1", 14, 20)], x), shift=0)
    assert shifted.X.dtype == dtype
    assert shifted.X.toarray().tolist() == [[1], [1]]


@settings(max_examples=40, deadline=None)
@given(
    regions=st.lists(
        st.tuples(st.sampled_from(["chrB", "chrA"]), st.integers(0, 900), st.integers(1, 200)), min_size=2, max_size=15
    ),
    shift=st.integers(0, 150),
    seed=st.integers(0, 20),
)
def test_new_peaks_are_separate_and_hold_the_old_ones(regions, shift, seed):
    adata = peaks([(chrom, start, start + width) for chrom, start, width in regions])
    shifted = shifted_peaks(adata, shift=shift, seed=seed)
    record = shifted.uns["simulation"]
    column = record["column"]
    # each peak lies within its new one, no further off than the shift
    new = shifted.var.iloc[column]
    width = (adata.var["end"] - adata.var["start"]).to_numpy()
    assert (new["chrom"].astype(str).to_numpy() == adata.var["chrom"].astype(str).to_numpy()).all()
    assert (new["start"].to_numpy() <= adata.var["start"].to_numpy() + shift).all()
    assert (new["end"].to_numpy() >= adata.var["end"].to_numpy() - shift).all()
    assert ((new["end"] - new["start"]).to_numpy() >= width).all()
    alone = (new["n_merged"] == 1).to_numpy()
    assert ((new["end"] - new["start"]).to_numpy()[alone] == width[alone]).all()
    assert (np.abs(new["start"].to_numpy() - adata.var["start"].to_numpy())[alone] <= shift).all()
    assert np.bincount(column).tolist() == shifted.var["n_merged"].tolist()
    # none of the new ones overlap
    for _, of_chrom in shifted.var.groupby("chrom", observed=True):
        assert (of_chrom["start"].to_numpy()[1:] >= of_chrom["end"].to_numpy()[:-1]).all()
    assert (shifted.var["start"] >= 0).all()
    np.testing.assert_array_equal(shifted.X.toarray(), np.eye(shifted.n_vars)[column])


@settings(max_examples=40, deadline=None)
@given(
    regions=st.lists(
        st.tuples(st.integers(0, 1), st.integers(0, 400), st.integers(1, 60)), min_size=2, max_size=15, unique=True
    )
)
def test_merged_peaks_are_the_components_of_the_overlaps(regions):
    chrom, start, width = np.array(regions).T
    end = start + width
    overlap = (chrom[:, None] == chrom) & (start[:, None] < end) & (start < end[:, None])
    n, component = connected_components(sparse.csr_matrix(overlap))
    shifted = shifted_peaks(peaks([(f"chr{c}", s, e) for c, s, e in zip(chrom, start, end, strict=True)]), shift=0)
    column = shifted.uns["simulation"]["column"]
    assert shifted.n_vars == n
    assert len(set(zip(column.tolist(), component.tolist(), strict=True))) == n
    for new in range(n):
        assert shifted.var["start"].iloc[new] == start[column == new].min()
        assert shifted.var["end"].iloc[new] == end[column == new].max()


def test_without_shift_separate_peaks_stay_as_they_are(atac):
    same = shifted_peaks(atac, shift=0)
    assert same.var_names.tolist() == atac.var_names.tolist()
    np.testing.assert_array_equal(same.X.toarray(), atac.X.toarray())
    pd.testing.assert_frame_equal(same.obs, atac.obs)
    assert same.uns["simulation"]["simulator"] == "shifted_peaks"


def test_shifts_are_uniform_and_counts_are_kept(atac):
    shifted = shifted_peaks(atac, shift=100, merge=False)
    moved = shifted.var["start"].to_numpy()[shifted.uns["simulation"]["column"]] - atac.var["start"].to_numpy()
    assert np.abs(moved).max() <= 100
    assert abs(moved.mean()) < 4 * 58 / np.sqrt(500)
    assert moved.std() == pytest.approx(np.sqrt((201**2 - 1) / 12), rel=0.07)
    far = shifted_peaks(atac, shift=5000)
    assert far.n_vars < 500
    assert far.X.max() > atac.X.max()
    np.testing.assert_array_equal(far.X.sum(axis=1), atac.X.sum(axis=1))


def test_same_seed_same_peaks_and_input_is_left_alone(atac):
    before = atac.X.copy(), atac.var.copy()
    first, again, other = (shifted_peaks(atac, seed=seed) for seed in (3, 3, 4))
    assert first.var.equals(again.var)
    np.testing.assert_array_equal(first.X.toarray(), again.X.toarray())
    assert first.var_names.tolist() != other.var_names.tolist()
    assert (before[0] != atac.X).nnz == 0
    pd.testing.assert_frame_equal(before[1], atac.var)


def test_dense_input_and_duplicate_entries_give_the_same():
    regions = [("chr1", 0, 10), ("chr1", 5, 15), ("chr1", 50, 60)]
    dense = np.array([[1, 2, 0], [0, 0, 3]], dtype=np.int32)
    adata = peaks(regions)[:2].copy()
    adata.X = dense
    expected = shifted_peaks(peaks(regions, dense), shift=0).X.toarray()
    np.testing.assert_array_equal(shifted_peaks(adata, shift=0).X.toarray(), expected)
    twice = sparse.csr_matrix((np.array([1, 1, 1, 3]), np.array([0, 1, 1, 2]), np.array([0, 3, 4])), shape=(2, 3))
    np.testing.assert_array_equal(shifted_peaks(peaks(regions, twice), shift=0).X.toarray(), expected)


ONE = [("chr1", 0, 10)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shift": -1}, "shift=-1 is not valid"),
        ({"shift": 1.5}, r"shift=1\.5 is not valid"),
        ({"seed": None}, "seed=None is not valid"),
        ({"merge": "yes"}, "merge='yes' is not valid: give True or False"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        shifted_peaks(peaks(ONE), **arguments)


def change(**columns):
    adata = peaks([("chr1", 0, 10), ("chr1", 20, 30)])
    adata.var = adata.var.assign(**columns)
    return adata


def without(key):
    adata = change()
    del adata.var[key]
    return adata


@pytest.mark.parametrize(
    ("adata", "message"),
    [
        (np.eye(2), "AnnData"),
        (AnnData(shape=(2, 2), layers={"counts": np.eye(2)}), "adata.X is missing, and layers are not read"),
        (AnnData(np.ones((2, 0))), "zero features"),
        (without("start"), "start"),
        (change(chrom=["chr1", None]), "Peak 'p1' has no chromosome"),
        (change(start=[0.5, 20.0]), "are float64 and int64: give whole numbers"),
        (change(start=[-1, 20]), "Peak 'p0' runs from -1 to 10"),
        (change(end=[10, 20]), "Peak 'p1' runs from 20 to 20"),
    ],
)
def test_bad_data_are_refused(adata, message):
    with pytest.raises(DataError, match=message):
        shifted_peaks(adata)


def test_equal_places_are_refused_unless_merged():
    adata = peaks([("chr1", 5, 10), ("chr1", 5, 10)])
    with pytest.raises(DataError, match="two peaks lie at chr1:5-10: set merge=True"):
        shifted_peaks(adata, shift=0, merge=False)
    assert shifted_peaks(adata, shift=0).X.toarray().tolist() == [[1], [1]]
