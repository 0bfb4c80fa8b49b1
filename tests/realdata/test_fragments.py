"""Real fragment files against a count with pandas."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest

from epivi.pp import chrom_sizes, fragments

DATA = Path(os.environ.get("EPIVI_TEST_DATA", "../shared/data"))


def as_counter(adata):
    coo = adata.X.tocoo()
    chrom, start = adata.var["chrom"].to_numpy(dtype=object), adata.var["start"].to_numpy()
    found = zip(adata.obs_names[coo.row], chrom[coo.col], start[coo.col], coo.data, strict=True)
    return Counter({(cell, c, int(s)): int(n) for cell, c, s, n in found})


@pytest.mark.realdata
@pytest.mark.parametrize(
    ("name", "genome", "n_rows"), [("heart_multiome_25cells", "hg38", 452_428), ("pbmc_small_hg19", "hg19", 29_399)]
)
@pytest.mark.parametrize("rule", ["fragments", "insertions"])
def test_real_files_equal_a_count_with_pandas(name, genome, n_rows, rule):
    path = DATA / "fragments" / f"{name}.fragments.tsv.gz"
    blacklist = DATA / "annot" / f"{genome}-blacklist.v2.bed.gz"
    if not path.exists() or not blacklist.exists():
        pytest.skip(f"test data not found: set EPIVI_TEST_DATA (missing {path.name})")
    adata = fragments(path, genome, bin_size_bp=10_000, count=rule)
    table = pd.read_csv(path, sep="\t", header=None, names=["chrom", "start", "end", "barcode", "n"], comment="#")
    assert adata.uns["fragments"]["n_lines"] == len(table) == n_rows
    on_genome = table[table["chrom"].isin(chrom_sizes(genome))]
    assert adata.uns["fragments"]["n_unknown_chrom"] == len(table) - len(on_genome)
    assert adata.obs["n_fragments"].to_dict() == on_genome["barcode"].value_counts().to_dict()
    middle = (on_genome["start"] + on_genome["end"]) // 2
    sites = [middle] if rule == "fragments" else [on_genome["start"], on_genome["end"] - 1]
    parts = [on_genome[["barcode", "chrom"]].assign(low=site // 10_000 * 10_000) for site in sites]
    wanted = pd.concat(parts).value_counts().to_dict()
    assert as_counter(adata) == wanted
    without = fragments(path, genome, bin_size_bp=10_000, count=rule, blacklist=blacklist)
    pd.testing.assert_index_equal(without.obs_names, adata.obs_names)
    assert (without.X != adata[:, without.var_names].X).nnz == 0
    assert without.uns["fragments"]["n_blacklisted"] == adata.X.sum() - without.X.sum() > 0
