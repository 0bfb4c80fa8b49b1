from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from epivi._errors import DataError
from epivi.models.sailer.setup import check_atac, chromosome_of_peak, peak_blocks


def peaks(chromosomes, *, column="chrom"):
    var = pd.DataFrame({column: chromosomes}, index=[f"p{i}" for i in range(len(chromosomes))])
    return ad.AnnData(np.ones((2, len(chromosomes)), dtype=np.float32), var=var)


def test_a_view_or_a_missing_layer_is_refused():
    adata = peaks(["chr1"] * 3)
    with pytest.raises(DataError, match=r"view.*\.copy\(\)"):
        check_atac(adata[:, :2], where="adata", layer=None)
    with pytest.raises(DataError, match=r"layers.*'counts'"):
        check_atac(adata, where="adata", layer="counts")


def test_small_chromosomes_are_merged():
    found = chromosome_of_peak(peaks(["chr1"] * 40 + ["chrY"] * 31 + ["chr2"] * 32 + ["chrM"]), "chrom")
    assert found.tolist() == ["chr1"] * 40 + ["other"] * 31 + ["chr2"] * 32 + ["other"]


def test_chromosomes_that_are_all_small_stay_apart():
    assert set(chromosome_of_peak(peaks(["a"] * 5 + ["b"] * 4), "chrom")) == {"a", "b"}


def test_chromosomes_come_from_a_named_column_or_from_the_names_of_peaks():
    assert chromosome_of_peak(peaks(["1", "2"], column="seq"), "seq").tolist() == ["1", "2"]
    full = peaks(["chr1", "chr2"])
    full.var["start"], full.var["end"] = [5, 7], [9, 11]
    assert chromosome_of_peak(full, "chrom").tolist() == ["chr1", "chr2"]
    adata = peaks(["x"] * 3, column="other")
    assert chromosome_of_peak(adata, "chrom") is None
    adata.var_names = ["chr2:100-200", "chr1-5-9", "chrX:1-2"]
    assert chromosome_of_peak(adata, "chrom").tolist() == ["chr2", "chr1", "chrX"]


def test_a_missing_chromosome_or_column_is_refused():
    with pytest.raises(DataError, match=r"adata.var\['chrom'\] has 1 missing values, in 'p1'"):
        chromosome_of_peak(peaks(["chr1", None]), "chrom")
    with pytest.raises(DataError, match=r"adata.var has no entry 'sequence'"):
        chromosome_of_peak(peaks(["chr1", "chr2"]), "sequence")


def test_blocks_follow_the_first_appearance_of_chromosomes():
    blocks = peak_blocks("chromosome", 6, np.array(["b", "b", "a", "c", "a", "a"]))
    assert blocks.sizes == (2, 3, 1)
    assert blocks.rank.tolist() == [0, 1, 2, 5, 3, 4]
    assert peak_blocks("chromosome", 3, np.array(["z", "z", "a"])).is_ordered


def test_other_encoders_need_no_chromosomes():
    assert peak_blocks("dense", 10_000, None).sizes == (8192, 1808)
    with pytest.raises(DataError, match=r"var\['chrom'\].*encoder='dense'"):
        peak_blocks("chromosome", 10, None)
