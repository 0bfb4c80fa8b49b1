"""Modalities to tracks: values, masks, description, round trips, and every refusal."""

from __future__ import annotations

import anndata
import mudata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData
from mudata import MuData

from epivi._errors import ConfigError, DataError
from epivi.pp import fragments, stack_tracks

pytestmark = pytest.mark.filterwarnings("ignore:.*option is deprecated:DeprecationWarning")

BINS = pd.DataFrame({"chrom": ["chr1"] * 3 + ["chr2"] * 2, "start": [0, 10, 20, 0, 10], "end": [10, 20, 25, 10, 17]})
CELLS = {"k27ac": ["a", "b", "c"], "k27me3": ["d", "c", "a"], "atac": ["b", "d"]}


def modality(name, cells, counts=None, bins=BINS, **changes):
    rng = np.random.default_rng(len(cells) + len(name))
    if counts is None:
        counts = rng.poisson(1.0, (len(cells), len(bins)))
    bins = bins.assign(**changes)
    return AnnData(
        sp.csr_matrix(np.asarray(counts)) if not sp.issparse(counts) else counts,
        obs=pd.DataFrame(index=cells),
        var=bins.set_axis([f"{name}:{i}" for i in range(len(bins))]),
    )


def example(**changes):
    return MuData({name: modality(name, cells, **changes) for name, cells in CELLS.items()})


def expected(mdata, names):
    """Return the counts and the mask by loops over cells and modalities."""
    x = np.zeros((mdata.n_obs, len(names), len(BINS)), dtype=int)
    mask = np.zeros((mdata.n_obs, len(names)), dtype=bool)
    for i, cell in enumerate(mdata.obs_names):
        for c, name in enumerate(names):
            part = mdata.mod[name]
            if cell in part.obs_names:
                x[i, c] = np.asarray(part[cell].X.todense()).ravel()
                mask[i, c] = True
    return x, mask


# ---------------------------------------------------------------- values


@pytest.mark.parametrize("names", [None, ["atac", "k27ac", "k27me3"], ["k27me3", "k27ac", "atac"]])
def test_counts_and_mask_equal_a_loop(names):
    mdata = example()
    mdata.obs["batch"] = ["x", "y", "x", "y"]
    order = names or list(mdata.mod)
    x, mask = expected(mdata, order)
    dense, sparse = stack_tracks(mdata, names, dense=True), stack_tracks(mdata, names)
    np.testing.assert_array_equal(dense.obsm["tracks"], x)
    assert dense.obsm["tracks"].dtype == np.uint8
    np.testing.assert_array_equal(sparse.obsm["tracks"].toarray(), x.reshape(4, -1))
    assert sparse.obsm["tracks"].dtype == np.int32
    assert sparse.obsm["tracks"].format == "csr"
    assert sparse.obsm["tracks"].has_canonical_format
    for adata in (dense, sparse):
        np.testing.assert_array_equal(adata.obsm["tracks_mask"], mask)
        assert adata.obsm["tracks_mask"].dtype == bool
        assert adata.obs_names.tolist() == mdata.obs_names.tolist()
        assert adata.obs["batch"].tolist() == ["x", "y", "x", "y"]
        assert adata.X is None
        assert adata.n_vars == 0
        tracks = adata.uns["tracks"]
        assert list(tracks["channels"]) == order
        pd.testing.assert_frame_equal(tracks["bins"], BINS)
        assert (tracks["genome"], tracks["bin_size_bp"]) == ("", 10)


def test_other_key_layer_and_storage():
    mdata = example()
    wanted = expected(mdata, list(CELLS))[0].reshape(4, -1)
    for part in mdata.mod.values():
        part.layers["counts"] = sp.csc_matrix(part.X).astype(float)
        part.X = part.X.astype(np.float32) * 0.5
    adata = stack_tracks(mdata, ["k27ac", "k27me3", "atac"], key="marks", layer="counts")
    assert set(adata.obsm) == {"marks", "marks_mask"}
    assert set(adata.uns) == {"marks"}
    np.testing.assert_array_equal(adata.obsm["marks"].toarray(), wanted)
    for part in mdata.mod.values():
        part.X = part.layers["counts"].toarray()
    dense = stack_tracks(mdata)
    assert (dense.obsm["tracks"] != adata.obsm["marks"]).nnz == 0


def test_duplicates_and_zeros_are_summed_and_the_input_is_left_alone():
    counts = sp.csr_matrix((np.array([1, 2, 0, 3]), np.array([4, 4, 1, 0]), np.array([0, 3, 4])), shape=(2, 5))
    mdata = MuData({"m": modality("m", ["a", "b"], counts)})
    stored = mdata["m"].X.copy()
    adata = stack_tracks(mdata)
    assert adata.obsm["tracks"].toarray().tolist() == [[0, 0, 0, 0, 3], [3, 0, 0, 0, 0]]
    assert adata.obsm["tracks"].nnz == 2
    np.testing.assert_array_equal(mdata["m"].X.data, stored.data)


@pytest.mark.parametrize(("largest", "dtype"), [(255, np.uint8), (256, np.uint16), (1 << 16, np.uint32)])
def test_dense_type_holds_the_largest_count(largest, dtype):
    counts = np.eye(2, 5, dtype=int) * largest
    x = stack_tracks(MuData({"m": modality("m", ["a", "b"], counts)}), dense=True).obsm["tracks"]
    assert x.dtype == dtype
    assert x.max() == largest


def test_bin_size_is_zero_where_widths_differ():
    assert stack_tracks(example(end=[10, 20, 25, 5, 17])).uns["tracks"]["bin_size_bp"] == 0
    assert stack_tracks(example(end=[10, 20, 30, 10, 20])).uns["tracks"]["bin_size_bp"] == 10


def test_from_fragment_files(tmp_path):
    for name, rows in {"x": ["chr1 0 9 A", "chr1 0 9 B", "chr2 150 160 B"], "y": ["chr2 5 9 B", "chr2 5 9 C"]}.items():
        (tmp_path / name).write_text("\n".join(rows).replace(" ", "\t"))
    files = {name: tmp_path / name for name in "xy"}
    mdata = fragments(files, {"chr1": 150, "chr2": 200}, bin_size_bp=100)
    adata = stack_tracks(mdata, dense=True)
    assert adata.obs_names.tolist() == ["A", "B", "C"]
    assert adata.obsm["tracks"].tolist() == [
        [[1, 0, 0, 0], [0, 0, 0, 0]],
        [[1, 0, 0, 1], [0, 0, 1, 0]],
        [[0, 0, 0, 0], [0, 0, 1, 0]],
    ]
    assert adata.obsm["tracks_mask"].tolist() == [[True, False], [True, True], [False, True]]
    assert adata.uns["tracks"]["bin_size_bp"] == 100


def test_genome_is_that_of_the_files():
    mdata = example()
    mdata["k27ac"].uns["fragments"] = {"genome": "hg38"}
    assert stack_tracks(mdata).uns["tracks"]["genome"] == "hg38"
    mdata["atac"].uns["fragments"] = {"genome": "mm10"}
    with pytest.raises(DataError, match=r"different genomes: {'k27ac': 'hg38', 'atac': 'mm10'}"):
        stack_tracks(mdata)


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("form", ["h5ad", "zarr", "h5mu"])
@pytest.mark.parametrize("dense", [False, True])
def test_round_trip(tmp_path, form, dense):
    adata = stack_tracks(example(), dense=dense)
    path = tmp_path / f"tracks.{form}"
    if form == "h5mu":
        MuData({"tracks": adata, "k27ac": modality("k27ac", ["a", "b"])}).write_h5mu(path)
        again = mudata.read_h5mu(path).mod["tracks"]
    else:
        getattr(adata, f"write_{form}")(path)
        again = getattr(anndata, f"read_{form}")(path)
    x, y = adata.obsm["tracks"], again.obsm["tracks"]
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(x if dense else x.toarray(), y if dense else y.toarray())
    np.testing.assert_array_equal(adata.obsm["tracks_mask"], again.obsm["tracks_mask"])
    assert again.obsm["tracks_mask"].dtype == bool
    tracks = again.uns["tracks"]
    assert list(tracks["channels"]) == list(CELLS)
    assert tracks["bins"]["chrom"].tolist() == BINS["chrom"].tolist()
    np.testing.assert_array_equal(tracks["bins"][["start", "end"]].to_numpy(), BINS[["start", "end"]].to_numpy())
    assert tracks["bins"]["start"].dtype == np.int64
    assert tracks["genome"] == ""
    assert tracks["bin_size_bp"] == 10
    assert again.X is None


def test_modality_on_disk(tmp_path):
    mdata = MuData({"m": modality("m", ["a", "b"])})
    wanted = stack_tracks(mdata).obsm["tracks"]
    for name, matrix in (("sparse", mdata["m"].X), ("dense", mdata["m"].X.toarray())):
        part = modality("m", ["a", "b"], mdata["m"].X)
        part.X = matrix
        part.write_h5ad(tmp_path / f"{name}.h5ad")
        backed = anndata.read_h5ad(tmp_path / f"{name}.h5ad", backed="r")
        assert (stack_tracks(MuData({"m": backed})).obsm["tracks"] != wanted).nnz == 0
        backed.file.close()


# ---------------------------------------------------------------- refusals


def test_containers_and_names():
    with pytest.raises(DataError, match=r"mdata is a anndata.*AnnData, a MuData is needed.*MuData\({'name': adata}\)"):
        stack_tracks(modality("m", ["a", "b"]))
    mdata = example()
    with pytest.raises(ConfigError, match="found the string 'atac'"):
        stack_tracks(mdata, "atac")
    with pytest.raises(ConfigError, match="names one of them twice"):
        stack_tracks(mdata, ["atac", "atac"])
    with pytest.raises(ConfigError, match="names none"):
        stack_tracks(mdata, [])
    with pytest.raises(DataError, match=r"mdata has no entry 'k27'. Did you mean 'k27ac'"):
        stack_tracks(mdata, ["k27"])
    with pytest.raises(
        DataError, match=r"1 cells have none of the modalities 'k27ac': 'd'. Remove them from mdata first"
    ):
        stack_tracks(mdata, ["k27ac"])
    with pytest.raises(DataError, match="has no entry 'counts'"):
        stack_tracks(mdata, layer="counts")
    shared = modality("m", ["a", "b"])
    other = shared.copy()
    other.obs_names = ["c", "d"]
    with pytest.raises(DataError, match=r"share features \(axis=1\), not cells"):
        stack_tracks(MuData({"m": shared, "n": other}, axis=1))


def test_cells_that_the_container_does_not_know():
    mdata = MuData({"m": modality("m", ["a", "b", "c"]), "n": modality("n", ["a", "b"])})
    mdata.mod["m"] = modality("m", ["a", "b", "z"])
    with pytest.raises(DataError, match=r"mdata\['m'\] has cells that mdata has not. Call mdata.update"):
        stack_tracks(mdata)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"start": [0, 20, 10, 0, 10], "end": [10, 25, 20, 10, 17]},
            r"bin chr1:10-20 \(number 2\) does not start after",
        ),
        (
            {"start": [0, 10, 10, 0, 10], "end": [10, 20, 21, 10, 17]},
            r"bin chr1:10-21 \(number 2\) does not start after",
        ),
        ({"start": [0, 10, 10, 0, 10], "end": [10, 20, 20, 10, 17]}, r"bin chr1:10-20 \(number 2\) occurs twice"),
        (
            {
                "chrom": ["chr1", "chr1", "chr2", "chr2", "chr1"],
                "start": [0, 10, 20, 30, 90],
                "end": [9, 19, 29, 39, 99],
            },
            r"bin chr1:90-99 \(number 4\) comes back to a chromosome",
        ),
        ({"start": [-1, 10, 20, 0, 10]}, "has a negative start"),
        ({"chrom": ["chr1", None, "chr1", "chr2", "chr2"]}, "has no chromosome for 'k27ac:1'"),
        ({"end": [10, 20.5, 25, 10, 17]}, "a whole number of bp is needed"),
    ],
)
def test_bins_that_cannot_be_used(changes, message):
    with pytest.raises(DataError, match=rf"mdata\['k27ac'\].*{message}"):
        stack_tracks(example(**changes))


def test_bins_that_differ_or_are_missing():
    mdata = MuData({"m": modality("m", ["a", "b"]), "n": modality("n", ["a", "b"], end=[10, 20, 30, 10, 17])})
    with pytest.raises(DataError, match="Bin number 2 is chr1:20-25 in 'm' and chr1:20-30 in 'n'"):
        stack_tracks(mdata)
    mdata = MuData({"m": modality("m", ["a", "b"]), "n": modality("n", ["a", "b"], bins=BINS.iloc[:4])})
    with pytest.raises(DataError, match="'m' has 5 bins and 'n' has 4"):
        stack_tracks(mdata)
    mdata = MuData({"m": modality("m", ["a", "b"]), "rna": modality("rna", ["a", "b"], bins=BINS[[]])})
    with pytest.raises(DataError, match=r"mdata\['rna'\] has no positions: .*modalities="):
        stack_tracks(mdata)
    assert stack_tracks(mdata, ["m"]).obsm["tracks_mask"].shape == (2, 1)


@pytest.mark.parametrize(
    ("value", "message"),
    [(-1.0, "a negative value"), (0.5, "not a whole number"), (np.nan, "NaN"), (np.inf, "infinite")],
)
def test_counts_that_are_none(value, message):
    counts = np.ones((2, 5))
    counts[1, 3] = value
    mdata = MuData({"m": modality("m", ["a", "b"], counts)})
    with pytest.raises(DataError, match=rf"mdata\['m'\].X: cell 'b' \(row 1\), column 3 holds .*{message}"):
        stack_tracks(mdata)


def test_boolean_and_empty_counts():
    with pytest.raises(DataError, match=r"mdata\['m'\].X is Boolean"):
        stack_tracks(MuData({"m": modality("m", ["a", "b"], np.ones((2, 5), dtype=bool))}))
    with pytest.raises(DataError, match="has no value above zero"):
        stack_tracks(MuData({"m": modality("m", ["a", "b"], np.zeros((2, 5)))}))
