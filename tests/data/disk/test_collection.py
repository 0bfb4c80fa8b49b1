"""Opening of stores: shards in order, obs and var of all, refusals by name."""

import warnings

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from epivi._errors import DataError
from epivi.data.disk import DiskRows, open_collection

pytest.importorskip("annbatch", reason="annbatch is not installed (extra 'large')")


def test_shards_are_one_data_set_in_the_order_of_their_numbers(store, cells) -> None:
    opened = open_collection(store)
    assert isinstance(opened.X, DiskRows)
    assert opened.obs_names.equals(cells.obs_names)
    assert opened.var_names.equals(cells.var_names)
    assert opened.obs["kind"].astype(str).tolist() == cells.obs["kind"].astype(str).tolist()
    assert (opened.X[:] != cells.X).nnz == 0


def test_categories_of_shards_are_united(store) -> None:
    kind = open_collection(store).obs["kind"]
    assert isinstance(kind.dtype, pd.CategoricalDtype)
    assert sorted(kind.cat.categories) == ["a", "b"]


def test_a_plain_store_with_layer_and_tables(cells, tmp_path, write) -> None:
    data = cells.copy()
    data.layers["counts"] = data.X * 2
    data.varm["measured"] = pd.DataFrame({"one": np.ones(30, bool)}, index=data.var_names)
    opened = open_collection(str(write(tmp_path / "plain.zarr", data)), layer="counts")
    assert (opened.X[:] != 2 * cells.X).nnz == 0
    assert opened.varm["measured"]["one"].all()


def test_a_collection_that_annbatch_shuffled(cells, tmp_path) -> None:
    import annbatch

    cells.write_h5ad(tmp_path / "cells.h5ad")
    collection = annbatch.DatasetCollection(tmp_path / "collection.zarr")
    with pytest.raises(DataError, match=r"annbatch\.DatasetCollection is empty"):
        open_collection(collection)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sizes = {"dataset_size": 80, "shuffle_chunk_size": 10, "n_obs_per_chunk": 16, "shard_size": 64}
        collection.add_adatas([tmp_path / "cells.h5ad"], rng=np.random.default_rng(0), **sizes)
    opened = open_collection(collection)
    assert len(opened.X.parts) == 2
    assert not opened.obs_names.equals(cells.obs_names)
    assert sorted(opened.obs_names) == sorted(cells.obs_names)
    assert (opened.X[:] != cells[opened.obs_names].X).nnz == 0
    assert open_collection(tmp_path / "collection.zarr").obs_names.equals(opened.obs_names)


def test_what_is_no_store_is_refused_by_name(cells, tmp_path, write) -> None:
    with pytest.raises(DataError, match="There is no zarr store at"):
        open_collection(tmp_path / "nothing")
    with pytest.raises(DataError, match="is no zarr store"):
        open_collection(tmp_path)
    write(tmp_path / "empty.zarr", [])
    with pytest.raises(DataError, match="neither an AnnData nor shards"):
        open_collection(tmp_path / "empty.zarr")
    plain = write(tmp_path / "plain.zarr", cells)
    with pytest.raises(DataError, match=r"has no 'layers/counts'. Its layers are \[\]"):
        open_collection(plain, layer="counts")
    dense = ad.AnnData(cells.X.toarray(), obs=cells.obs, var=cells.var)
    with pytest.raises(DataError, match="is stored as array, not row-compressed"):
        open_collection(write(tmp_path / "dense.zarr", dense))


def test_shards_that_do_not_fit_are_refused(cells, tmp_path, write) -> None:
    other = cells[60:, ::-1].copy()
    with pytest.raises(DataError, match=r"'/dataset_0' and '/dataset_1' have other genes, or another order"):
        open_collection(write(tmp_path / "order.zarr", [cells[:60].copy(), other]))
    with pytest.raises(DataError, match=r"holds cells twice: \['c59'"):
        open_collection(write(tmp_path / "twice.zarr", [cells[:60].copy(), cells[59:].copy()]))
    assert sparse.issparse(cells.X)
