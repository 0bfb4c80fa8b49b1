"""Gene activity: hand-made strands, loops over peaks and genes, scanpy's normalisation, real links."""

from __future__ import annotations

import os
from pathlib import Path

import hypothesis.strategies as st
import mudata
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
import scipy.sparse as sp
from anndata import AnnData
from hypothesis import given, settings

from epivi._errors import ConfigError, DataError
from epivi.pp import read_genes
from epivi.tl import gene_activity

# anndata 0.13 asks pandas 3 for options that pandas deprecates; not ours to mend
pytestmark = pytest.mark.filterwarnings("ignore:.*option is deprecated:DeprecationWarning")

DATA = Path(os.environ.get("EPIVI_TEST_DATA", "../shared/data"))
CONTAINERS = [np.asarray, sp.csr_matrix, sp.csr_array, sp.csc_matrix, sp.csc_array]


def peaks(names, x=None, **kwargs):
    x = np.stack([2 ** np.arange(len(names)), np.arange(len(names)) + 1]) if x is None else x
    return AnnData(x, var=pd.DataFrame(index=names), **kwargs)


def genes(*rows):
    return pd.DataFrame(rows, columns=["name", "chrom", "start", "end", "strand"])


# five peaks around a gene on [1000, 2000): the first row of X tells by its bits which were added up
AROUND = ["chr1:800-900", "chr1:990-1000", "chr1:1500-1600", "chr1:2000-2010", "chr1:2100-2150"]


@pytest.mark.parametrize(
    ("strand", "upstream", "downstream", "bits"),
    [
        ("+", 0, 0, 0b00100),
        ("-", 0, 0, 0b00100),
        ("+", 1, 0, 0b00110),
        ("+", 100, 0, 0b00110),  # [900, 2000) does not hold position 899
        ("+", 101, 0, 0b00111),
        ("+", 2000, 0, 0b00111),  # cut off at zero
        ("-", 1, 0, 0b01100),
        ("-", 100, 0, 0b01100),
        ("-", 101, 0, 0b11100),
        ("+", 0, 101, 0b11100),
        ("-", 0, 101, 0b00111),
        ("-", 101, 1, 0b11110),
        (".", 101, 0, 0b00111),
    ],
)
def test_strands(strand, upstream, downstream, bits):
    table = genes(("A", "chr1", 1000, 2000, strand))
    result = gene_activity(peaks(AROUND), table, upstream=upstream, downstream=downstream, normalize=False)
    assert int(result.X.toarray()[0, 0]) == bits
    assert result.var.loc["A", "n_peaks"] == bits.bit_count()


@given(
    spans=st.lists(
        st.tuples(st.sampled_from(["chr1", "chrUn-1"]), st.integers(0, 60), st.integers(1, 20)),
        min_size=1, max_size=8, unique=True,
    ),
    rows=st.lists(
        st.tuples(
            st.sampled_from("ABCD"), st.sampled_from(["chr1", "chrUn-1"]),
            st.integers(0, 60), st.integers(1, 20), st.sampled_from("+-."),
        ),
        min_size=1, max_size=8,
    ),
    upstream=st.integers(0, 15),
    downstream=st.integers(0, 15),
    seed=st.integers(0, 99),
)  # fmt: skip
@settings(deadline=None, max_examples=60)
def test_equals_the_loop_in_any_order(spans, rows, upstream, downstream, seed):
    if not {chrom for chrom, *_ in spans} & {chrom for _, chrom, *_ in rows}:
        return
    rng = np.random.default_rng(seed)
    counts = rng.poisson(1.0, (3, len(spans)))
    counts[0, 0] += 1
    adata = peaks([f"{chrom}:{start}-{start + width}" for chrom, start, width in spans], counts)
    table = genes(*((name, chrom, start, start + width, strand) for name, chrom, start, width, strand in rows))
    names = list(dict.fromkeys(table["name"]))
    wanted = np.zeros((3, len(names)), dtype=int)
    for p, (chrom, start, width) in enumerate(spans):
        hit = set()
        for name, other, begin, length, strand in rows:
            before, behind = (downstream, upstream) if strand == "-" else (upstream, downstream)
            if chrom == other and start < begin + length + behind and begin - before < start + width:
                hit.add(name)
        for name in hit:  # once a gene, however many of its rows overlap
            wanted[:, names.index(name)] += counts[:, p]
    options = {"upstream": upstream, "downstream": downstream, "normalize": False}
    result = gene_activity(adata, table, **options)
    assert result.var_names.tolist() == names
    np.testing.assert_array_equal(result.X.toarray(), wanted)
    n, p, r = rng.permutation(3), rng.permutation(len(spans)), rng.permutation(len(rows))
    other = gene_activity(adata[n][:, p].copy(), table.iloc[r], **options)
    np.testing.assert_array_equal(other[:, names].X.toarray(), wanted[n])


@pytest.mark.parametrize("container", CONTAINERS)
def test_normalised_as_scanpy_does(container):
    x = np.random.default_rng(0).poisson(0.7, (20, 5))
    x[3] = 0  # a cell without counts stays zero
    x[4, :4] = 0  # and so does one without counts at any gene
    table = genes(("A", "chr1", 700, 1200, "+"), ("B", "chr1", 1100, 2050, "+"), ("none", "chr2", 0, 10, "-"))
    adata = peaks(AROUND, container(x), obsm={"X_lsi": np.ones((20, 2))})
    adata.obs["label"] = "a"
    sums = gene_activity(adata, table, upstream=0, normalize=False)
    result = gene_activity(adata, table, upstream=0)
    np.testing.assert_array_equal(sums.X.toarray(), x @ [[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 1, 0], [0, 0, 0]])
    expected = AnnData(sums.X.astype("float32"))[np.flatnonzero(sums.X.sum(axis=1))].copy()
    sc.pp.normalize_total(expected, target_sum=1e4)
    sc.pp.log1p(expected)
    np.testing.assert_array_equal(result.X[np.flatnonzero(sums.X.sum(axis=1))].toarray(), expected.X.toarray())
    assert not result.X[[3, 4]].toarray().any()
    assert sp.issparse(result.X)
    assert result.X.format == "csr"
    assert result.X.dtype == "float32"
    assert "log1p" in result.uns
    assert result.obs["label"].tolist() == ["a"] * 20
    np.testing.assert_array_equal(result.obsm["X_lsi"], adata.obsm["X_lsi"])
    np.testing.assert_array_equal(adata.X.toarray() if sp.issparse(adata.X) else adata.X, x)


def test_genes_without_peaks_are_zero_and_counted(caplog):
    caplog.set_level("INFO")
    table = genes(("far", "chr1", 10**6, 10**6 + 5, "+"), ("B", "chr1", 1500, 1501, "+"), ("other", "chr9", 1, 2, "-"))
    result = gene_activity(peaks(AROUND), table, normalize=False)
    assert result.var_names.tolist() == ["far", "B", "other"]
    assert result.var["n_peaks"].tolist() == [0, 3, 0]
    assert result.X.toarray()[:, [0, 2]].tolist() == [[0, 0], [0, 0]]
    assert "2 of 3 genes have no peak: their activity is zero in all cells" in caplog.text
    assert result.var["chrom"].tolist() == ["chr1", "chr1", "chr9"]
    assert "name" not in result.var


def test_genes_of_a_file(tmp_path):
    path = tmp_path / "genes.bed"
    path.write_text("chr1\t1000\t2000\tA\t0\t-\nchr1\t0\t810\tB\n")
    result = gene_activity(peaks(AROUND), read_genes(path), upstream=1, normalize=False)
    assert result.X.toarray()[0].tolist() == [0b01100, 0b00001]


def test_missing_strands_are_plus_and_said(caplog):
    table = genes(("A", "chr1", 1000, 2000, None), ("B", "chr1", 1000, 2000, "-"))
    result = gene_activity(peaks(AROUND), table, upstream=101, normalize=False)
    assert result.X.toarray()[0].tolist() == [0b00111, 0b11100]
    assert "1 genes have no strand and are taken to lie on +" in caplog.text
    caplog.clear()
    without = gene_activity(peaks(AROUND), table.drop(columns="strand"), upstream=101, downstream=101, normalize=False)
    assert without.X.toarray()[0].tolist() == [0b11111] * 2
    assert "no strand" not in caplog.text  # the same on either strand


# ---------------------------------------------------------------- links


def linked(values):
    adata = peaks(["p0", "p1", "p2", "p3", "p4"])  # no positions are needed
    adata.var["gene"] = values
    return adata


@pytest.mark.parametrize("dtype", [object, "category"])
def test_links(dtype):
    adata = linked(pd.Series(["b", "a", None, "b", " "], index=["p0", "p1", "p2", "p3", "p4"]).astype(dtype))
    result = gene_activity(adata, linked_key="gene", normalize=False)
    assert result.var_names.tolist() == ["a", "b"]  # sorted: the order of peaks does not matter
    assert result.X.toarray().tolist() == [[2, 9], [2, 5]]
    assert result.var["n_peaks"].tolist() == [1, 2]
    turned = gene_activity(adata[:, ::-1].copy(), linked_key="gene", normalize=False)
    assert turned.var.equals(result.var)
    assert turned.X.toarray().tolist() == result.X.toarray().tolist()


def test_links_to_the_genes_of_a_table(caplog):
    caplog.set_level("INFO")
    adata = linked(["b", "a", "c", "b", "b"])
    result = gene_activity(adata, pd.DataFrame({"name": ["z", "b", "a"], "kind": [1, 2, 3]}), linked_key="gene")
    assert result.var_names.tolist() == ["z", "b", "a"]
    assert result.var["kind"].tolist() == [1, 2, 3]
    np.testing.assert_allclose(np.expm1(result.X.toarray()[0]), np.array([0, 25, 2]) / 27 * 1e4, rtol=1e-5)
    assert "1 peaks are linked to genes that are not asked for" in caplog.text
    assert "1 of 3 genes have no peak" in caplog.text


def test_a_mudata_and_a_layer():
    adata = linked(["a", "a", "b", "b", "b"])
    adata.layers["open"] = (adata.X > 1).astype("int8") * 100
    rna = AnnData(np.ones((2, 1)), obs=adata.obs, var=pd.DataFrame(index=["G"]))
    mdata = mudata.MuData({"atac": adata, "rna": rna})
    result = gene_activity(mdata, linked_key="gene", layer="open", normalize=False)
    assert result.X.toarray().tolist() == [[100, 300], [100, 300]]  # 300 does not fit int8
    other = gene_activity(mudata.MuData({"peaks": adata, "rna": rna}), linked_key="gene", modality="peaks")
    assert other.shape == (2, 2)
    with pytest.raises(DataError, match=r"mdata.mod has no entry 'atak'. Did you mean 'atac'"):
        gene_activity(mdata, linked_key="gene", modality="atak")


def test_refused():
    adata, table = peaks(AROUND), genes(("A", "chr1", 1000, 2000, "+"))
    with pytest.raises(ConfigError, match=r"gene_activity needs to know the genes.*linked_key"):
        gene_activity(adata)
    with pytest.raises(ConfigError, match="upstream=-1 is out of range"):
        gene_activity(adata, table, upstream=-1)
    with pytest.raises(ConfigError, match=r"downstream=0.5 .float. is not valid"):
        gene_activity(adata, table, downstream=0.5)
    for bad, words in (
        (["A"], "genes is a list, a pandas DataFrame"),
        (table.drop(columns="name"), "genes has no entry 'name'"),
        (table.drop(columns="end"), "genes has no entry 'end'"),
        (table[:0], "genes has no rows"),
        (table.assign(name=None), r"genes\['name'\] is empty in 1 rows, first in 0"),
        (table.assign(strand="x"), r"genes\['strand'\] of 'A' is 'x': . or - or . is needed"),
        (table.assign(end=5), r"table of genes cannot be used. The interval of 'A' has a start which is not below"),
        (table.assign(chrom="1"), r"No chromosome has the same name among the peaks .'chr1'. and the genes .'1'."),
    ):
        with pytest.raises(DataError, match=words):
            gene_activity(adata, bad)
    with pytest.raises(DataError, match="The features have no position"):
        gene_activity(linked("a"), table)
    with pytest.raises(DataError, match=r"adata.var has no entry 'gen'. Did you mean 'gene'"):
        gene_activity(linked("a"), linked_key="gen")
    with pytest.raises(DataError, match=r"adata.var\['gene'\] names no gene for any peak"):
        gene_activity(linked(None), linked_key="gene")
    with pytest.raises(DataError, match=r"None of the genes that adata.var\['gene'\] names .'a'. is among .*'A'"):
        gene_activity(linked("a"), table, linked_key="gene")
    with pytest.raises(DataError, match=r"adata.X: cell '0'.*log-normalised"):
        gene_activity(peaks(AROUND, np.log1p(np.ones((2, 5)))), table)
    with pytest.raises(DataError, match=r"is a pandas.* an AnnData is needed"):
        gene_activity(table, table)


# ---------------------------------------------------------------- real data


@pytest.mark.realdata
def test_real_links():
    path = DATA / "sc/snareseq_mouse_cortex.h5mu"
    if not path.exists():
        pytest.skip("test data not found: set EPIVI_TEST_DATA (missing sc/snareseq_mouse_cortex.h5mu)")
    mdata = mudata.read_h5mu(path)
    result = gene_activity(mdata, linked_key="linked_gene", normalize=False)
    atac = mdata["atac"]
    assert result.n_vars == atac.var["linked_gene"].nunique() == 1674
    assert result.X.sum() == atac.X.sum()  # every peak is linked to one gene
    gene = (atac.var["linked_gene"] == "Lsamp").to_numpy()
    np.testing.assert_array_equal(np.asarray(result[:, "Lsamp"].X.sum(axis=1)), np.asarray(atac.X[:, gene].sum(axis=1)))
    assert result.var["n_peaks"]["Lsamp"] == gene.sum() == 183
    # activity says more about the expression of its own gene than of others
    activity = gene_activity(mdata, linked_key="linked_gene").to_df().groupby(mdata["atac"].obs["cell_type"].to_numpy())
    rna = mdata["rna"].copy()
    sc.pp.normalize_total(rna, target_sum=1e4)
    sc.pp.log1p(rna)
    expression = rna.to_df().groupby(rna.obs["cell_type"].to_numpy()).mean()
    activity = activity.mean()
    shared = [g for g in activity.columns.intersection(expression.columns) if activity[g].std() and expression[g].std()]
    own = [np.corrcoef(activity[g], expression[g])[0, 1] for g in shared]
    other = [np.corrcoef(activity[g], expression[h])[0, 1] for g, h in zip(shared, shared[::-1], strict=True)]
    assert np.mean(own) > np.mean(other) + 0.1
