"""From BAM files to bigWig files: ingestion, training, prediction, export; the example of the model runs."""

from __future__ import annotations

import doctest
import os
import warnings
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import epivi

FOLDER = Path(os.environ.get("EPIVI_TEST_DATA", Path(__file__).parents[3] / "shared" / "data")) / "bulk" / "bam_small"
BIN_BP, SIZE = 200, 48_129_895


def test_the_example_of_candi_runs():
    import epivi.models.candi.model as module

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = doctest.testmod(module)
    assert found.attempted > 0
    assert found.failed == 0


@pytest.mark.realdata
def test_bam_files_become_bigwig_files(tmp_path):
    pytest.importorskip("pysam")
    pytest.importorskip("pyBigWig")
    marks = ["H3K36me3", "H3K4me3"]
    table = pd.DataFrame(
        {"biosample": "sample", "assay": marks, "bam": [str(FOLDER / "epicseg_chr21" / f"{m}.bam") for m in marks]}
    )
    for path in table["bam"]:
        if not Path(path).exists():
            pytest.skip(f"{path} is not there: set EPIVI_TEST_DATA to the folder of the test data")
    options = epivi.pp.bulk.StoreOptions(bin_size_bp=BIN_BP)
    adata = epivi.pp.bulk.ingest(table, tmp_path / "store.zarr", {"chr21": SIZE}, options=options, progress=False)
    starts = 20_000_000 + 40_000 * np.arange(24)
    loci = pd.DataFrame({"chrom": "chr21", "start": starts, "end": starts + 200})
    model = epivi.CANDI(adata, size="test", seed=0)
    model.train(
        2, loci=loci, batch_size=8, max_validation_windows=8, enable_progress_bar=False, accelerator="cpu", logger=False
    )
    assert np.isfinite(model.history["train_loss"].to_numpy()).all()
    region = "chr21:30,000,000-31,000,000"
    asked = {"region": region, "assays": "H3K4me3", "leave_one_out": True}
    paths = model.export_bigwig(tmp_path / "out", what=["mean", "upper"], progress=False, **asked)
    found = model.impute(**asked)
    for path, layer in zip(paths, ("mean", "upper"), strict=True):
        read = epivi.pp.bulk.read_bigwig(path, {"chr21": SIZE}, BIN_BP, transform="none", uncovered="nan").signal_l
        covered = np.flatnonzero(~np.isnan(read))
        assert covered.tolist() == list(range(150_000, 155_000))
        np.testing.assert_array_equal(read[covered], found.layers[layer][0])
    # arrays on disk and in memory give the same
    obsm = {key: np.asarray(value[:]) for key, value in adata.obsm.items()}
    memory = ad.AnnData(adata.X, obs=adata.obs, var=adata.var, obsm=obsm, uns=dict(adata.uns))
    again = model.impute(**asked, adata=memory)
    np.testing.assert_array_equal(again.layers["mean"], found.layers["mean"])
