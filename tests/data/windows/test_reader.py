from __future__ import annotations

import numpy as np
import pytest
import torch
import zarr
from torch.utils.data import DataLoader

from epivi._errors import ConfigError, DataError
from epivi.data.windows import (
    ExperimentKeys,
    ExperimentsField,
    WindowDataset,
    fingerprint,
    mean_tracks,
    open_experiments,
    relative_counts,
    split_rows,
)
from epivi.data.windows.reader import cut

ITEMS = np.array([[0, 0], [1, 32], [3, 41], [4, 47], [1, 32], [2, 64], [1, 0], [3, 5]])
R, L = 5, 12


class Lazy:
    """What dask arrays show of themselves, with their chunks; every computation is written down."""

    def __init__(self, array, chunks, log):
        self.array, self.log = array, log
        self.shape, self.dtype, self.ndim = array.shape, array.dtype, array.ndim
        self.chunks = chunks

    def __getitem__(self, key):
        return Lazy(self.array[key], None, self.log)

    def compute(self, scheduler):
        self.log.append(self.array.shape)
        return self.array


def stored(array, tmp_path, name, **options):
    place = zarr.create_array(str(tmp_path / name), shape=array.shape, dtype=array.dtype, **options)
    place[:] = array
    return place


def registered(adata, **keys):
    field = ExperimentsField(ExperimentKeys(**keys))
    return field.register_field(adata)


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for key in wanted:
        torch.testing.assert_close(found[key], wanted[key], rtol=0, atol=0, equal_nan=True)


def stop_of(first):
    return min(first + L, next(stop for stop in (40, 47, 72) if first < stop))


def test_batches_hold_what_the_arrays_hold(adata):
    state = registered(adata)
    batch = WindowDataset(adata, state, L)[ITEMS]
    available = adata.obsm["availability"]
    assert batch["rows"].tolist() == ITEMS[:, 0].tolist()
    assert batch["window"].tolist() == ITEMS[:, 1].tolist()
    assert batch["bin_mask"].dtype == torch.bool
    with np.errstate(divide="ignore"):
        depth = np.where(available, adata.obsm["depth"], np.nan)
    reference = np.nanmedian(depth, axis=0)
    for i, (row, first) in enumerate(ITEMS):
        stop = stop_of(first)
        n = stop - first
        assert batch["bin_mask"][i].tolist() == [True] * n + [False] * (L - n)
        for key in ("counts", "signal"):
            wanted = np.zeros((L, 4), dtype=np.float32)
            wanted[:n] = adata.obsm[key][row, :, first:stop].T * available[row]
            np.testing.assert_array_equal(batch[key][i], wanted)
            np.testing.assert_array_equal(batch[f"available_{key}"][i], available[row].astype(np.float32))
        bases = np.full(L * R, 4, dtype=np.uint8)
        bases[: n * R] = adata.uns["dna"][first * R : stop * R]
        np.testing.assert_array_equal(batch["dna"][i], bases)
        np.testing.assert_allclose(batch["continuous"][i, :, 0], np.log2(depth[row]), rtol=1e-6)
        np.testing.assert_array_equal(batch["continuous"][i, :, 1], np.where(available[row], 50, np.nan))
        ratio = np.nan_to_num(np.log(depth[row] / reference))
        np.testing.assert_allclose(batch["log_depth_ratio"][i], ratio, rtol=1e-5, atol=1e-6)
        codes = np.where(available[row], adata.obsm["run_type"][row], -1)
        assert batch["categorical"][i, :, 0].tolist() == codes.tolist()
    assert batch["categorical"].dtype == torch.int64
    assert {v.dtype for k, v in batch.items() if k in ("counts", "signal", "continuous")} == {torch.float32}


def test_arrays_in_memory_and_on_disk_give_the_same_batches(make, tmp_path):
    adata = make()
    state = registered(adata)
    adata.varm["locus_prior"], _ = mean_tracks(adata, state, range(5))
    wanted = WindowDataset(adata, state, L, prior="signal")[ITEMS]
    sha = fingerprint(adata, state)
    options = {"small": {"chunks": (1, 1, 16)}, "mixed": {"chunks": (2, 3, 10)}}
    options["sharded"] = {"chunks": (1, 1, 8), "shards": (1, 1, 32)}
    for name, how in options.items():
        other = make()
        for key in ("counts", "signal"):
            other.obsm[key] = stored(other.obsm[key], tmp_path, f"{name}-{key}", **how)
        other.uns["dna"] = stored(other.uns["dna"], tmp_path, f"{name}-dna", chunks=(50,))
        found = registered(other)
        prior, _ = mean_tracks(other, found, range(5))
        np.testing.assert_array_equal(prior, adata.varm["locus_prior"])
        other.varm["locus_prior"] = stored(prior, tmp_path, f"{name}-prior", chunks=(1, 16))
        assert isinstance(other.obsm["counts"], zarr.Array)
        assert_same(WindowDataset(other, found, L, prior="signal")[ITEMS], wanted)
        np.testing.assert_allclose(found["statistics"]["mean_counts"], state["statistics"]["mean_counts"])
        assert fingerprint(other, found) == sha
    other = make()
    other.obsm["signal"] = other.obsm["signal"].astype(np.float16)
    assert WindowDataset(other, registered(other), L)[ITEMS]["signal"].dtype == torch.float32


def test_lazy_arrays_are_computed_window_by_window(make):
    adata, log = make(), []
    array = adata.obsm["counts"]
    lazy = Lazy(array, ((5,), (4,), (40, 32)), log)
    rows, first = ITEMS[:, 0], ITEMS[:, 1]
    stop = np.array([stop_of(at) for at in first])
    wanted = cut(array, rows, first, stop)
    found = cut(lazy, rows, first, stop)
    for one, two in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(one, two)
    # biosamples 0 and 1 share a locus and are computed together; a window that occurs twice is computed once
    assert sorted(log) == [(1, 4, 6), (1, 4, 8), (1, 4, 8), (1, 4, 12), (1, 4, 12), (2, 4, 12)]


def test_dask_arrays_give_the_same_batches(make):
    da = pytest.importorskip("dask.array")
    adata, other = make(), make()
    for key in ("counts", "signal"):
        other.obsm[key] = da.from_array(other.obsm[key], chunks=(2, 3, 16))
    batch = WindowDataset(other, registered(other), L)[ITEMS]
    assert_same(batch, WindowDataset(adata, registered(adata), L)[ITEMS])


def test_what_is_not_available_has_no_influence(make):
    adata, other = make(), make()
    absent = ~adata.obsm["availability"]
    other.obsm["counts"] = other.obsm["counts"].astype(np.float32)
    other.obsm["counts"][absent] = np.nan
    other.obsm["signal"][absent] = np.inf
    other.obsm["depth"][absent] = -7
    other.obsm["read_length"][absent] = np.inf
    other.obsm["run_type"][absent] = 99
    first, second = registered(adata), registered(other)
    np.testing.assert_equal(first["depth_ref"], second["depth_ref"])
    assert_same(WindowDataset(other, second, L)[ITEMS], WindowDataset(adata, first, L)[ITEMS])
    assert fingerprint(adata, first) == fingerprint(other, second)


@pytest.mark.parametrize("kind", ["signal", "counts"])
def test_the_prior_is_the_mean_over_the_other_training_biosamples(adata, kind):
    adata.obs["split"] = ["train", "train", "test", "train", "train"]
    adata.obsm["availability"][:, 3] = [False, False, True, True, False]
    state = registered(adata, split_key="split")
    rows = split_rows(adata, state)
    assert rows["train"].tolist() == [0, 1, 3, 4]
    assert (rows["validation"].tolist(), rows["test"].tolist()) == ([], [2])
    mean, n = mean_tracks(adata, state, rows["train"], kind=kind)
    adata.varm["locus_prior"] = mean
    available = adata.obsm["availability"]
    assert n.tolist() == available[[0, 1, 3, 4]].sum(0).tolist()
    batch = WindowDataset(adata, state, L, prior=kind)[ITEMS]
    values = adata.obsm[kind].astype(np.float64)
    if kind == "counts":
        depth = np.where(available, adata.obsm["depth"], np.nan)
        ratio = depth / np.asarray(state["depth_ref"])
        values = np.log1p(values / np.where(np.isnan(ratio), 1, ratio)[:, :, None])
    for i, (row, first) in enumerate(ITEMS):
        stop = stop_of(first)
        for a in range(4):
            others = [b for b in (0, 1, 3, 4) if b != row and available[b, a]]
            assert batch["has_prior"][i, a] == bool(others)
            wanted = np.zeros(L)
            if others:
                wanted[: stop - first] = values[others, a, first:stop].mean(axis=0)
            np.testing.assert_allclose(batch["prior"][i, :, a], wanted, atol=2e-6)
    for a in range(4):
        train = [b for b in (0, 1, 3, 4) if available[b, a]]
        np.testing.assert_allclose(mean[a], values[train, a].mean(axis=0), atol=1e-6)


def test_no_prior_is_left_where_the_own_experiment_cannot_be_taken_out(make):
    adata = make()
    field = ExperimentsField()
    state = field.register_field(adata)
    mean, _ = mean_tracks(adata, state, range(5))
    query = make()[:, ["a3", "a0", "a1"]].copy()
    query.uns["dna"] = adata.uns["dna"]
    query.obsm = {key: value[:, [3, 0, 1]] if value.ndim > 1 else value for key, value in make().obsm.items()}
    query.obsm["availability"][0, 1] = False  # a0 of b0 was in the mean
    query.varm["locus_prior"] = mean[[3, 0, 1]]
    batch = WindowDataset(query, field.transfer_field(state, query), L, prior="signal")[[[0, 0]]]
    assert batch["has_prior"].tolist() == [[0, 1, 0, 1]]
    assert not batch["prior"][0, :, [0, 2]].any()
    others = mean_tracks(adata, state, [1, 2, 3, 4])[0]
    np.testing.assert_allclose(batch["prior"][0, :, 1], others[1, :L], atol=2e-6)
    np.testing.assert_allclose(batch["prior"][0, :, 3], others[3, :L], atol=2e-6)
    # a biosample that the model has not seen gets the whole mean
    query.obs_names = [f"new{i}" for i in range(5)]
    batch = WindowDataset(query, field.transfer_field(state, query), L, prior="signal")[[[0, 0]]]
    assert batch["has_prior"].tolist() == [[1, 1, 0, 1]]
    np.testing.assert_array_equal(batch["prior"][0, :, 1], mean[1, :L])


def test_means_of_nothing_and_of_unknown_kinds(adata):
    state = registered(adata, counts_key=None)
    mean, n = mean_tracks(adata, state, [3])
    assert n.tolist() == [0, 1, 1, 1]
    assert not mean[0].any()
    with pytest.raises(ConfigError, match="kind='counts' is not valid"):
        mean_tracks(adata, state, [3], kind="counts")
    batch = WindowDataset(adata, state, L)[ITEMS]
    assert "counts" not in batch
    assert "available_counts" not in batch


def test_relative_counts_is_the_closed_form():
    counts = np.array([0.0, 3.0])
    np.testing.assert_allclose(relative_counts(counts, np.log(np.array([2.0]))), np.log1p(counts / 2), rtol=1e-6)


def test_fingerprints_see_every_part(make):
    def sha(change, **keys):
        adata = make()
        change(adata)
        state = ExperimentsField(ExperimentKeys(**keys)).register_field(adata)
        assert fingerprint(adata, state) == fingerprint(adata, state)
        return fingerprint(adata, state)

    def bins(adata):
        adata.uns["bins"].loc[47:, ["start", "end"]] += 5

    def value(adata):
        adata.obsm["counts"][0, 0, 3] += 1

    changes = [
        lambda _: None,
        bins,
        value,
        lambda adata: adata.obsm["availability"].__setitem__((0, 0), False),
        lambda adata: adata.obsm["read_length"].__setitem__((0, 0), 36),
        lambda adata: adata.obsm["run_type"].__setitem__((0, 0), 1 - adata.obsm["run_type"][0, 0]),
        lambda adata: setattr(adata, "obs_names", list("vwxyz")),
    ]
    assert len({sha(change) for change in changes}) == len(changes)


def test_refusals(adata):
    state = registered(adata)
    dataset = WindowDataset(adata, state, L)
    assert len(dataset) == 5
    for bad in ([5, 0], [-1, 0], [0, 72], [0, -1]):
        with pytest.raises(ConfigError, match=f"no window at biosample {bad[0]}, bin {bad[1]}: the data have 5"):
            dataset[[[0, 0], bad]]
    with pytest.raises(ConfigError, match="window=0"):
        WindowDataset(adata, state, 0)
    with pytest.raises(ConfigError, match="prior='x' is not valid"):
        WindowDataset(adata, state, L, prior="x")
    with pytest.raises(DataError, match=r"A prior is asked for, and varm\['locus_prior'\] is not there"):
        WindowDataset(adata, state, L, prior="signal")
    adata.varm["locus_prior"] = np.zeros((4, 71), dtype=np.float32)
    with pytest.raises(DataError, match=r"has the shape \(4, 71\), needed is \(4, 72\) = \(assays, bins\)"):
        WindowDataset(adata, state, L, prior="signal")
    state = registered(adata, dna_key=None)
    assert "dna" not in WindowDataset(adata, state, L)[ITEMS]
    with pytest.raises(DataError, match="DNA is asked for, and the data were set up without"):
        WindowDataset(adata, state, L, dna=True)


def test_workers_of_a_loader_give_the_same_batches(adata):
    dataset = WindowDataset(adata, registered(adata), L)
    parts = [ITEMS[:3], ITEMS[3:]]
    loader = DataLoader(dataset, sampler=parts, batch_size=None, num_workers=1)
    for items, batch in zip(parts, loader, strict=True):
        assert_same(batch, dataset[items])
    assert open_experiments(adata, registered(adata)).n_assays == 4
