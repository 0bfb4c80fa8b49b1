import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse


def write_store(path, parts):
    """Write AnnData as the shards of a collection, as annbatch lays them out, or one of them as a plain store."""
    import zarr

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if isinstance(parts, ad.AnnData):
            parts.write_zarr(path)
            return path
        group = zarr.open_group(path, mode="w")
        for number, part in enumerate(parts):
            ad.io.write_elem(group, f"dataset_{number}", part)
    return path


@pytest.fixture(scope="session")
def write():
    return write_store


@pytest.fixture(scope="session")
def cells():
    """130 cells × 30 genes, some of them without counts."""
    rng = np.random.default_rng(0)
    x = rng.poisson(0.5, (130, 30)).astype(np.float32)
    x[[0, 40, 41, 129]] = 0
    obs = pd.DataFrame({"kind": pd.Categorical(np.repeat(["a", "b"], 65))}, index=[f"c{i}" for i in range(130)])
    return ad.AnnData(sparse.csr_matrix(x), obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(30)]))


@pytest.fixture(scope="session")
def store(cells, tmp_path_factory):
    """The cells in 11 shards of 12 cells, so that the tenth comes after the second."""
    path = tmp_path_factory.mktemp("store") / "cells.zarr"
    return write_store(path, [cells[start : start + 12].copy() for start in range(0, 130, 12)])
