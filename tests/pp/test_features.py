"""Coordinates and order of peaks against hand-made answers."""

from __future__ import annotations

import os
from pathlib import Path

import anndata as ad
import hypothesis.strategies as st
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData
from hypothesis import given, settings

from epivi._errors import DataError
from epivi.pp import natural_chromosome_order, order_by_chromosome, peak_coordinates, peak_names

# anndata 0.13 asks pandas 3 for options that pandas deprecates; not ours to mend
pytestmark = pytest.mark.filterwarnings("ignore:.*option is deprecated:DeprecationWarning")

DATA = Path(os.environ.get("EPIVI_TEST_DATA", "../shared/data"))


def peaks(names, **columns):
    return AnnData(np.ones((2, len(names)), dtype="float32"), var=pd.DataFrame(columns, index=names))


def dense(matrix):
    return matrix.toarray() if sp.issparse(matrix) else np.asarray(matrix)


@pytest.fixture
def on_disk(tmp_path):
    adata = AnnData(sp.csr_matrix(np.array([[2, 0, 4], [2, 2, 0], [0, 0, 0]], dtype="float32")))
    adata.var_names = ["chr2:1-5", "chr1:7-9", "chr1:2-3"]
    adata.write_h5ad(tmp_path / "a.h5ad")
    backed = ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
    yield backed
    backed.file.close()


# ---------------------------------------------------------------- coordinates


@given(
    chrom=st.sampled_from(["chr1", "X", "chr1_KI270706v1_random", "chrUn-GL.1", "HLA:A*01", "2L"]),
    start=st.integers(0, 10**9),
    width=st.integers(1, 10**6),
    form=st.sampled_from(["{}:{}-{}", "{}-{}-{}", "{}_{}_{}"]),
)
@settings(deadline=None, max_examples=40)
def test_names_are_parsed(chrom, start, width, form):
    name = form.format(chrom, start, start + width)
    regions = peak_coordinates(peaks([name]))
    assert regions.loc[name].tolist() == [chrom, start, start + width]
    assert regions[["start", "end"]].dtypes.tolist() == [np.int64, np.int64]
    assert peak_names(regions).tolist() == [f"{chrom}:{start}-{start + width}"]


def test_columns_win_over_names():
    adata = peaks(["chr1:1-2", "gene"], chrom=["chr5", "chr6"], start=[10, "20"], end=[11.0, 21.0])
    assert peak_coordinates(adata).to_numpy().tolist() == [["chr5", 10, 11], ["chr6", 20, 21]]
    adata.var = adata.var.rename(columns={"chrom": "seqnames"})
    regions = peak_coordinates(adata, chrom_key="seqnames")
    assert regions.columns.tolist() == ["chrom", "start", "end"]
    assert regions.index.equals(adata.var_names)
    adata.var["seqnames"] = adata.var["seqnames"].astype("category")
    assert peak_coordinates(adata, chrom_key="seqnames")["chrom"].tolist() == ["chr5", "chr6"]


def test_no_coordinates(caplog):
    assert peak_coordinates(peaks(["Gapdh", "RP11-34L1.2"])) is None
    assert not caplog.records
    assert peak_coordinates(peaks(["p0", "p1"], chrom=["chr1", "chr2"])) is None
    assert "has ['chrom'] but not ['start', 'end']" in caplog.text


BAD_COORDINATES = {
    "part": (lambda: peaks(["chr1:1-2", "gene", "x"]), "1 of 3 feature names .* 'gene' cannot"),
    "long": (lambda: peaks(["chr1:1-" + "9" * 20]), "'chr1:1-9+' cannot"),
    "reversed name": (
        lambda: peaks(["chr1:1-2", "chr1:9-5"]),
        r"'chr1:9-5' has a start which is not below its end: \[9, 5\)",
    ),
    "empty": (lambda: peaks(["chr1:5-5"]), "not below its end"),
    "no chromosome": (
        lambda: peaks(["a", "b"], chrom=["chr1", None], start=[1, 1], end=[2, 2]),
        "no chromosome for 'b'",
    ),
    "negative": (
        lambda: peaks(["a", "b"], chrom="chr1", start=[1, -4], end=[2, 2]),
        r"'b' has a negative start: \[-4, 2\)",
    ),
    "fraction": (lambda: peaks(["a"], chrom="chr1", start=[1.5], end=[2]), r"var\['start'\] of 'a' is .*1.5"),
    "nan": (lambda: peaks(["a"], chrom="chr1", start=[1], end=[np.nan]), r"var\['end'\] of 'a' is .*nan"),
    "huge": (lambda: peaks(["a"], chrom="chr1", start=[1], end=[1e300]), r"var\['end'\] of 'a' is"),
    "text": (lambda: peaks(["a"], chrom="chr1", start=["one"], end=[2]), r"var\['start'\] of 'a' is 'one'"),
}


@pytest.mark.parametrize("case", BAD_COORDINATES)
def test_coordinates_refused(case):
    make, words = BAD_COORDINATES[case]
    with pytest.raises(DataError, match=words):
        peak_coordinates(make())


def test_coordinates_named_column_must_exist():
    with pytest.raises(DataError, match=r"adata.var has no entry 'chromosom'. Did you mean 'chrom'?"):
        peak_coordinates(peaks(["chr1:1-2"], chrom=["chr1"]), chrom_key="chromosom")
    with pytest.raises(DataError, match="no entry 'end'"):
        peak_names(pd.DataFrame({"chrom": [], "start": []}))


# ---------------------------------------------------------------- order


def test_order_by_chromosome():
    names = ["chrX:1-2", "chr10:5-9", "chr2:7-9", "chr2:7-8", "chr1_KI1_random:1-2", "chr2:1-3", "chrM:1-2"]
    wanted = ["chr2:1-3", "chr2:7-8", "chr2:7-9", "chr10:5-9", "chrX:1-2", "chrM:1-2", "chr1_KI1_random:1-2"]
    adata = AnnData(sp.csr_matrix(np.arange(14.0).reshape(2, 7)), var=pd.DataFrame({"i": range(7)}, index=names))
    before = adata.copy()
    result = order_by_chromosome(adata, copy=True)
    assert adata.var_names.tolist() == names
    assert "chrom" not in adata.var
    assert order_by_chromosome(adata) is None
    for done in (adata, result):
        assert done.var_names.tolist() == wanted
        assert peak_names(done.var).tolist() == wanted
        np.testing.assert_array_equal(dense(done.X), dense(before[:, wanted].X))
        assert done.var["i"].tolist() == before.var.loc[wanted, "i"].tolist()
    again = order_by_chromosome(adata, copy=True)
    assert again.var.equals(adata.var)


def test_order_of_a_view_and_refusals(on_disk):
    adata = peaks(["chr2:1-2", "chr1:1-2", "chr3:1-2"])
    view = adata[:, :2]
    order_by_chromosome(view)
    assert view.var_names.tolist() == ["chr1:1-2", "chr2:1-2"]
    assert adata.var_names.tolist() == ["chr2:1-2", "chr1:1-2", "chr3:1-2"]
    with pytest.raises(DataError, match=r"features have no position.*'gene'"):
        order_by_chromosome(peaks(["gene"]))
    with pytest.raises(DataError, match=r"on disk .backed. and cannot be changed in place"):
        order_by_chromosome(on_disk)
    assert order_by_chromosome(on_disk, copy=True).var_names.tolist() == ["chr1:2-3", "chr1:7-9", "chr2:1-5"]


# ---------------------------------------------------------------- real data


def data_file(name):
    path = DATA / name
    if not path.exists():
        pytest.skip(f"test data not found: set EPIVI_TEST_DATA (missing {name})")
    return path


@pytest.mark.realdata
def test_real_coordinates():
    adata = ad.read_h5ad(data_file("sc/chromvar_example_atac.h5ad"))
    by_columns = peak_coordinates(adata)
    adata.var = adata.var.drop(columns=["chrom", "start", "end"])
    by_names = peak_coordinates(adata)
    pd.testing.assert_frame_equal(by_columns, by_names)
    assert (by_names["end"] - by_names["start"]).unique().tolist() == [499]  # 500 bp, 1-based and closed in the source
    ordered = order_by_chromosome(adata, copy=True)
    chroms = ordered.var["chrom"]
    assert chroms.drop_duplicates().tolist() == natural_chromosome_order(chroms)
    assert all(part.is_monotonic_increasing for _, part in ordered.var.groupby("chrom")["start"])
    assert ordered.X.sum() == adata.X.sum()
