"""A small object with counts, signal, DNA, covariates, two chromosomes and a gap."""

from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest

B, A, R = 5, 4, 5
RUNS = [("chr1", 0, 40), ("chr1", 300, 7), ("chr2", 10, 25)]


def build(seed=0, **more):
    rng = np.random.default_rng(seed)
    bins = pd.concat(
        [
            pd.DataFrame({"chrom": chrom, "start": start + R * np.arange(n), "end": start + R * np.arange(1, n + 1)})
            for chrom, start, n in RUNS
        ],
        ignore_index=True,
    )
    n_bins = len(bins)
    available = np.ones((B, A), dtype=bool)
    available[1, 2] = available[3, 0] = available[4, 3] = False
    depth = np.exp(rng.normal(13, 1, (B, A))).astype(np.float32)
    depth[2, 1] = np.nan
    adata = ad.AnnData(
        available.astype(np.float32),
        obs=pd.DataFrame(index=[f"b{i}" for i in range(B)]),
        var=pd.DataFrame(index=[f"a{i}" for i in range(A)]),
    )
    adata.obsm["counts"] = rng.poisson(3, (B, A, n_bins)).astype(np.uint16)
    adata.obsm["signal"] = rng.gamma(1, 1, (B, A, n_bins)).astype(np.float32)
    adata.obsm["availability"] = available
    adata.obsm["depth"] = depth
    adata.obsm["read_length"] = np.full((B, A), 50, dtype=np.float32)
    adata.obsm["run_type"] = rng.integers(0, 2, (B, A)).astype(np.int8)
    adata.uns |= {
        "bins": bins,
        "categories": {"run_type": np.array(["single", "paired"])},
        "signal_transform": "arcsinh",
        "dna": rng.integers(0, 5, n_bins * R).astype(np.uint8),
    }
    for key, value in more.items():
        adata.obsm[key] = value
    return adata


@pytest.fixture
def adata():
    return build()


@pytest.fixture
def make():
    return build
