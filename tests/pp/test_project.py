"""Projection of peaks: exact toy genomes, loops over peaks, permutations, refusals, real peaks."""

from __future__ import annotations

import os
import time
from pathlib import Path

import anndata as ad
import hypothesis.strategies as st
import mudata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData
from hypothesis import given, settings

from epivi._errors import ConfigError, DataError
from epivi.pp import peak_names, project_peaks

# anndata 0.13 asks pandas 3 for options that pandas deprecates; not ours to mend
pytestmark = pytest.mark.filterwarnings("ignore:.*option is deprecated:DeprecationWarning")

DATA = Path(os.environ.get("EPIVI_TEST_DATA", "../shared/data"))
CONTAINERS = [np.asarray, sp.csr_matrix, sp.csr_array, sp.csc_matrix, sp.csc_array]

# Query: a overlaps T0 by 50 and T1 by 10 bp; b touches T1; c lies in T2, as d does; e is on a contig of its own.
QUERY = ["chr1:50-110", "chr1:200-250", "HLA-A*01:10-20", "HLA-A*01:20-60", "chrUn-KI2:0-9"]
TARGET = ["chr1-0-100", "chr1-100-200", "HLA-A*01-0-100", "chr2-0-100"]
X = np.array([[1, 5, 2, 3, 4], [2, 0, 0, 1, 0], [0, 1, 0, 0, 0]])


def query(x=X, names=QUERY, **kwargs):
    return AnnData(x, var=pd.DataFrame(index=names), **kwargs)


def target(names=TARGET):
    return pd.DataFrame({"number": range(len(names))}, index=names)


def run(adata, peaks, **options):
    return project_peaks(adata, peaks, **{"min_share": 0, **options})


TOY = [
    ({}, [[1, 1, 3, 0], [2, 2, 1, 0], [0, 0, 0, 0]]),
    ({"reduce": "sum"}, [[1, 1, 5, 0], [2, 2, 1, 0], [0, 0, 0, 0]]),
    ({"how": "reciprocal"}, [[1, 0, 3, 0], [2, 0, 1, 0], [0, 0, 0, 0]]),
    ({"min_overlap": 11}, [[1, 0, 3, 0], [2, 0, 1, 0], [0, 0, 0, 0]]),
    ({"min_overlap": 10, "reduce": "sum"}, [[1, 1, 5, 0], [2, 2, 1, 0], [0, 0, 0, 0]]),
    ({"min_overlap": 0.4}, [[1, 0, 3, 0], [2, 0, 1, 0], [0, 0, 0, 0]]),  # d shares 40 of 100 bp, the bound is kept
    ({"min_overlap": 0.1, "reduce": "sum"}, [[1, 1, 5, 0], [2, 2, 1, 0], [0, 0, 0, 0]]),
    ({"min_overlap": 0.51}, [[0] * 4] * 3),
]


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize(("options", "wanted"), TOY)
def test_toy_genome(options, wanted, container):
    adata = query(container(X))
    result = run(adata, target(), **options)
    assert result.X.toarray().tolist() == wanted
    assert result.X.format == "csr"
    assert result.X.has_canonical_format
    assert result.X.nnz == np.count_nonzero(wanted)
    assert result.var_names.tolist() == TARGET
    assert result.var["number"].tolist() == [0, 1, 2, 3]


def test_report(caplog, tmp_path):
    caplog.set_level("INFO")
    result = run(query(), target())
    report = result.uns["projection"]
    # a, c, d of five peaks; 5 of 8 entries (b twice and e once are lost); T0, T1, T2 of four; a has a choice
    assert {key: report[key] for key in report if key != "share_by_chance"} == {
        "n_query_peaks": 5,
        "n_target_peaks": 4,
        "share_peaks_used": 0.6,
        "share_entries_kept": 0.625,
        "share_targets_hit": 0.75,
        "n_ambiguous": 1,
        "n_contigs_unknown": 1,
        "how": "any",
        "reduce": "max",
        "min_overlap": 1,
    }
    assert "60.0 % of 5 query peaks and 62.5 % of the open entries are used, 75.0 % of 4 target peaks" in caplog.text
    assert "1 query peaks overlap several targets" in caplog.text
    assert "1 chromosomes of the query are not in the target: 'chrUn-KI2'" in caplog.text
    assert run(query(), target(), how="reciprocal").uns["projection"]["n_ambiguous"] == 1
    assert run(query(), target(), min_overlap=11).uns["projection"]["n_ambiguous"] == 0
    result.write_h5ad(tmp_path / "a.h5ad")
    again = ad.read_h5ad(tmp_path / "a.h5ad").uns["projection"]
    assert again == report
    closed = run(query(np.zeros((2, 5))), target())
    assert closed.X.nnz == 0
    assert closed.X.shape == (2, 4)
    assert np.isnan(closed.uns["projection"]["share_entries_kept"])
    assert closed.uns["projection"]["share_peaks_used"] == 0.6


def test_what_belongs_to_cells_is_kept():
    obs = pd.DataFrame({"label": pd.Categorical(["x", "y", "x"])}, index=["c0", "c1", "c2"])
    adata = query(obs=obs, obsm={"X_umap": np.eye(3)}, obsp={"graph": sp.eye_array(3).tocsr()}, layers={"bool": X > 0})
    result = run(adata, target())
    pd.testing.assert_frame_equal(result.obs, obs)
    np.testing.assert_array_equal(result.obsm["X_umap"], np.eye(3))
    assert (result.obsp["graph"] != adata.obsp["graph"]).nnz == 0
    result.obsm["X_umap"][:] = 0
    result.obs["label"] = "z"
    assert adata.obsm["X_umap"].any()
    assert adata.obs["label"].tolist() == ["x", "y", "x"]
    binary = run(adata, target(), layer="bool")
    assert binary.X.dtype == bool
    assert binary.X.toarray().tolist() == [[True, True, True, False], [True, True, True, False], [False] * 4]
    assert run(adata, target(), layer="bool", reduce="sum").X.toarray().tolist() == [
        [1, 1, 2, 0],
        [1, 1, 1, 0],
        [0] * 4,
    ]


@pytest.mark.parametrize(("dtype", "kept"), [("uint8", "int32"), ("int64", "int64"), ("float32", "float32")])
def test_dtypes(dtype, kept):
    adata = query((X * 40).astype(dtype))
    assert run(adata, target()).X.dtype == dtype
    result = run(adata, target(), reduce="sum")
    assert result.X.dtype == kept
    assert result.X.toarray()[0].tolist() == [40, 40, 200, 0]
    assert run(query((X * 100).astype("uint8")[:, :], QUERY), target()).X.dtype == "uint8"


def test_sums_do_not_overflow():
    x = np.full((2, 5), 200, dtype="uint8")
    assert run(query(x), target(), reduce="sum").X.toarray()[0].tolist() == [200, 200, 400, 0]


def test_target_forms():
    columns = pd.DataFrame({"chrom": ["chr1", "chr2"], "start": [0, 5], "end": [100, 9], "note": list("ab")})
    result = run(query(), columns)
    assert result.var_names.tolist() == ["chr1:0-100", "chr2:5-9"]  # a numbered table is named by its positions
    assert result.var["note"].tolist() == ["a", "b"]
    assert columns.index.tolist() == [0, 1]
    named = run(query(), columns.set_axis(["p", "q"], axis=0))
    assert named.var_names.tolist() == ["p", "q"]
    model = AnnData(np.zeros((1, 2)), var=columns.set_axis(["p", "q"], axis=0))
    assert run(query(), model).var.equals(model.var)
    assert all(r.X.toarray().tolist() == [[1, 0], [2, 0], [0, 0]] for r in (result, named, run(query(), model)))


def test_entries_stored_twice_or_as_zero():
    twice = sp.csr_matrix((np.array([1, 2, 0]), np.array([0, 0, 2]), np.array([0, 3, 3, 3])), shape=(3, 5))
    adata = query(twice)
    assert run(adata, target()).X.toarray().tolist() == [[3, 3, 0, 0], [0] * 4, [0] * 4]
    assert run(adata, target()).uns["projection"]["share_entries_kept"] == 1
    assert adata.X.nnz == 3


def test_query_on_disk(tmp_path):
    query(sp.csr_matrix(X)).write_h5ad(tmp_path / "a.h5ad")
    backed = ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
    assert run(backed, target()).X.toarray().tolist() == TOY[0][1]
    backed.file.close()


# ---------------------------------------------------------------- brute force and invariances

interval = st.tuples(st.sampled_from(["chr1", "chrUn-K.1", "HLA-A*01"]), st.integers(0, 40), st.integers(1, 25))
intervals = st.lists(interval, min_size=1, max_size=8, unique=True)


def loop(x, ours, theirs, min_overlap, how, reduce):
    """Values by the rules as written, peak by peak."""
    result = np.zeros((x.shape[0], len(theirs)), dtype=x.dtype)
    for p, (chrom, start, width) in enumerate(ours):
        fits = []
        for t, (other, begin, length) in enumerate(theirs):
            shared = min(start + width, begin + length) - max(start, begin)
            share = shared / max(width, length)
            if chrom == other and shared > 0 and (shared if isinstance(min_overlap, int) else share) >= min_overlap:
                fits.append((-share, begin, begin + length, t))
        for *_, t in sorted(fits)[: 1 if how == "reciprocal" else None]:
            result[:, t] = np.maximum(result[:, t], x[:, p]) if reduce == "max" else result[:, t] + x[:, p]
    return result


@given(
    ours=intervals,
    theirs=intervals,
    min_overlap=st.sampled_from([1, 3, 10, 0.1, 0.25, 0.5, 1.0]),
    how=st.sampled_from(["any", "reciprocal"]),
    reduce=st.sampled_from(["max", "sum"]),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=60)
def test_equals_the_loop_in_any_order(ours, theirs, min_overlap, how, reduce, seed):
    if not {chrom for chrom, *_ in ours} & {chrom for chrom, *_ in theirs}:
        return
    rng = np.random.default_rng(seed)
    x = rng.poisson(0.8, (3, len(ours)))
    options = {"min_overlap": min_overlap, "how": how, "reduce": reduce}
    names = [f"{chrom}:{start}-{start + width}" for chrom, start, width in ours]
    others = [f"{chrom}-{start}-{start + width}" for chrom, start, width in theirs]
    result = run(query(x, names), target(others), **options)
    np.testing.assert_array_equal(result.X.toarray(), loop(x, ours, theirs, **options))
    # cells, query peaks and target peaks in other orders
    n, p, t = (rng.permutation(size) for size in (3, len(ours), len(theirs)))
    shuffled = run(query(x, names)[n][:, p].copy(), target(others).iloc[t], **options)
    np.testing.assert_array_equal(shuffled.X.toarray(), result.X.toarray()[n][:, t])
    assert shuffled.var["number"].tolist() == t.tolist()
    assert shuffled.uns["projection"] == pytest.approx(result.uns["projection"], nan_ok=True)


@pytest.mark.parametrize("how", ["any", "reciprocal"])
@pytest.mark.parametrize("reduce", ["max", "sum"])
def test_onto_itself_is_exact(how, reduce):
    rng = np.random.default_rng(0)
    start = np.sort(rng.choice(5000, 300, replace=False)) * 100
    # peaks apart from one another; for the best match they may overlap as they like
    width = rng.integers(1, 100 if how == "any" else 3000, 300)
    regions = pd.DataFrame({"chrom": rng.choice(["chr1", "chrUn-1-2"], 300), "start": start, "end": start + width})
    adata = AnnData(sp.random(40, 300, 0.2, "csr", random_state=0), var=regions.set_axis(peak_names(regions), axis=0))
    result = project_peaks(adata, adata, how=how, reduce=reduce)
    assert (result.X != adata.X).nnz == 0
    assert result.var.equals(adata.var)
    report = result.uns["projection"]
    assert [report[f"share_{what}"] for what in ("peaks_used", "entries_kept", "targets_hit")] == [1, 1, 1]


def test_ties_go_to_the_first_start_then_the_first_name():
    # 20 of 100 bp with each of the two, in whichever order they are listed; then twice the same interval
    adata = query(np.ones((2, 1)), ["chr1:80-120"])
    for names in (["chr1:0-100", "chr1:100-200"], ["chr1:100-200", "chr1:0-100"]):
        result = run(adata, target(names), how="reciprocal")
        assert result.X.toarray()[0].tolist() == [float(name == "chr1:0-100") for name in names]
    same = pd.DataFrame({"chrom": "chr1", "start": 0, "end": 100}, index=["zeta", "alpha"])
    assert run(adata, same, how="reciprocal").X.toarray()[0].tolist() == [0, 1]


def test_many_peaks_take_a_second():
    rng = np.random.default_rng(0)
    n = 100_000
    start = np.arange(n) * 3000
    regions = pd.DataFrame({"chrom": np.repeat(["chr1", "chr2"], n // 2), "start": start, "end": start + 500})
    adata = AnnData(sp.random(100, n, 0.03, "csr", random_state=0), var=regions.set_axis(peak_names(regions), axis=0))
    shifted = regions.assign(start=start + 100, end=start + 600)
    shifted = shifted.set_axis(peak_names(shifted), axis=0).iloc[rng.permutation(n)]
    begin = time.perf_counter()
    result = project_peaks(adata, shifted)
    assert time.perf_counter() - begin < 10  # 0.4 s on an idle machine
    assert result.uns["projection"]["share_peaks_used"] == 1
    in_order = result[:, peak_names(regions.assign(start=start + 100, end=start + 600))].X
    assert (in_order != adata.X).nnz == 0


# ---------------------------------------------------------------- refusals


REFUSED_ARGUMENTS = [
    ({"how": "all"}, "how='all' is not valid. Valid are: 'any', 'reciprocal'"),
    ({"reduce": "mean"}, "reduce='mean' is not valid"),
    ({"min_overlap": 0}, "min_overlap=0 is out of range: an integer of at least 1"),
    ({"min_overlap": 0.0}, "min_overlap .a float, so a share.=0.0 is out of range"),
    ({"min_overlap": 2.0}, "min_overlap .a float, so a share.=2.0 is out of range.*at most 1"),
    ({"min_overlap": True}, "min_overlap=True .bool. is not valid"),
    ({"min_share": 5}, "min_share=5 is out of range"),
    ({"genome": "hg99"}, "'hg99' is neither a known genome nor a file"),
]


@pytest.mark.parametrize(("options", "words"), REFUSED_ARGUMENTS)
def test_arguments_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        run(query(), target(), **options)


def test_another_assembly_is_refused():
    with pytest.raises(DataError, match=r"No chromosome has the same name .*'HLA-A.*prefix 'chr' is added or removed"):
        run(query(), target(["1:0-100", "2:0-100"]))
    with pytest.raises(DataError, match=r"in the target \('chrX'\). Check the assemblies"):
        run(query(), target(["chrX:0-100"]))
    sizes = {"chr1": 200, "HLA-A*01": 100}
    with pytest.raises(DataError, match=r"1 of 5 query peaks end beyond .*'chr1:200-250': chr1 has 200 bp"):
        run(query(), target(), genome=sizes)
    with pytest.raises(DataError, match=r"1 of 4 target peaks end beyond .*'HLA-A\*01-0-100': HLA-A\*01 has 99 bp"):
        run(query(), target(), genome=sizes | {"chr1": 250, "HLA-A*01": 99})
    assert run(query(), target(), genome=sizes | {"chr1": 250}).n_vars == 4
    with pytest.raises(DataError, match=r"'chr1:248956422-248956423': chr1 has 248956422 bp"):
        run(query(np.ones((2, 1)), ["chr1:248956422-248956423"]), target(), genome="hg38")


def test_a_share_as_by_chance_is_refused(caplog):
    rng = np.random.default_rng(0)
    sizes = {"chr1": 10**7}

    def scattered(n, width=500):
        start = rng.choice(10**7 - width, n, replace=False)
        regions = pd.DataFrame({"chrom": "chr1", "start": start, "end": start + width})
        return regions.set_axis(peak_names(regions), axis=0)

    adata = AnnData(np.ones((2, 400), dtype="float32"), var=scattered(400))
    with pytest.raises(DataError, match=r"Only 1.00% of the 400 query peaks .* at least 5.00% .* by chance.*min_share"):
        project_peaks(adata, scattered(200), genome=sizes)
    # more targets reach more than 5 % by chance alone
    many = scattered(1000)
    with pytest.raises(DataError, match=r"Only 12.25% .* at least 19.01% are needed"):
        project_peaks(adata, many, genome=sizes)
    result = project_peaks(adata, many, genome=sizes, min_share=0.01)
    assert "Only 12.25 % of the query peaks are used: check that both sets are of one assembly" in caplog.text
    caplog.clear()
    # 1 - (1 - 999 / 10**7)**1000 of the places, and a standard error of 0.015
    assert result.uns["projection"]["share_by_chance"] == pytest.approx(0.095, abs=0.005)
    assert result.uns["projection"]["share_peaks_used"] == pytest.approx(0.095, abs=0.045)
    # a target that covers the genome is reached by right
    tiles = pd.DataFrame({"chrom": "chr1", "start": np.arange(0, 10**7, 5000), "end": np.arange(0, 10**7, 5000) + 5000})
    assert project_peaks(adata, tiles, genome=sizes).uns["projection"]["share_by_chance"] == 1
    assert project_peaks(adata, adata).uns["projection"]["share_peaks_used"] == 1
    assert not caplog.records


def test_data_refused():
    with pytest.raises(DataError, match=r"adata.var has no columns chrom, start, end, and names such as 'A'"):
        run(query(X[:, :2], ["A", "B"]), target())
    with pytest.raises(DataError, match=r"peaks has no columns chrom, start, end, and names such as 'A'"):
        run(query(), target(["A", "B"]))
    with pytest.raises(DataError, match=r"peaks.var has no columns"):
        run(query(), query(X[:, :2], ["A", "B"]))
    with pytest.raises(DataError, match="peaks is a list; an AnnData or a pandas DataFrame"):
        run(query(), TARGET)
    with pytest.raises(DataError, match="peaks is a MuData"):
        run(query(), mudata.MuData({"atac": query()}))
    with pytest.raises(DataError, match="peaks has no peaks"):
        run(query(), target([]))
    with pytest.raises(DataError, match="peaks: 1 names occur more than once, 'chr1:0-5'"):
        run(query(), target(["chr1:0-5", "chr1:0-5"]))
    with pytest.raises(DataError, match=r"peaks\['end'\] of 'a' is 'x'; a whole number"):
        run(query(), pd.DataFrame({"chrom": ["chr1"], "start": [1], "end": ["x"]}, index=["a"]))
    with pytest.raises(DataError, match=r"has a start which is not below its end: \[5, 5\).*1 intervals"):
        run(query(), target(["chr1:5-5"]))
    with pytest.raises(DataError, match="a MuData, an AnnData is needed"):
        run(mudata.MuData({"atac": query()}), target())
    with pytest.raises(DataError, match=r"adata.layers has no entry 'count'"):
        run(query(), target(), layer="count")
    for value in (-1.0, np.nan, np.inf):
        x = X.astype(float)
        x[1, 3] = value
        words = rf"adata.X: cell '1', peak 'HLA-A\*01:20-60' is {value}; finite values .* 1 are not"
        with pytest.raises(DataError, match=words):
            run(query(x), target())
    assert run(query(np.log1p(X)), target()).X.toarray()[0, 2] == np.log1p(3)  # "open" needs no counts


# ---------------------------------------------------------------- real data


@pytest.mark.realdata
@pytest.mark.parametrize("shift", [-100, 100])
def test_real_peaks_shifted(shift):
    path = DATA / "sc/snareseq_mouse_cortex.h5mu"
    if not path.exists():
        pytest.skip("test data not found: set EPIVI_TEST_DATA (missing sc/snareseq_mouse_cortex.h5mu)")
    adata = mudata.read_h5mu(path)["atac"]
    model = adata.var[["chrom", "start", "end"]].astype({"chrom": str})
    model["start"] += shift
    model["end"] += shift
    result = project_peaks(adata, model, genome="mm10")
    report = result.uns["projection"]
    wider = (adata.var["end"] - adata.var["start"] > 100).to_numpy()
    assert report["share_peaks_used"] >= wider.mean() > 0.8
    assert report["share_entries_kept"] >= adata.X[:, wider].nnz / adata.X.nnz > 0.8
    assert report["share_by_chance"] < 0.05
    itself = project_peaks(adata, adata, how="reciprocal")
    assert (itself.X != adata.X).nnz == 0
    assert itself.obs.equals(adata.obs)
    # the same peaks on another chromosome's positions: what a wrong assembly looks like
    elsewhere = model.assign(start=model["start"] + 10**6, end=model["end"] + 10**6)
    with pytest.raises(DataError, match=r"by chance. The assemblies probably differ"):
        project_peaks(adata, elsewhere)
