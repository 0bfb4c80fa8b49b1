"""Training from zarr stores through annbatch: the cells, their encoding and what is held in memory."""

import sys
import warnings

import anndata as ad
import numpy as np
import pytest
import torch

import epivi
from epivi._errors import ConfigError
from epivi.train.config import TrainingConfig

QUIET = {"enable_progress_bar": False, "accelerator": "cpu", "logger": False, "batch_size": 16}


@pytest.fixture(scope="module")
def stored(build, tmp_path_factory):
    """Cells in memory, and the folder of a store of the same in three shards."""
    import zarr

    pytest.importorskip("annbatch", reason="annbatch is not installed (extra 'large')")
    data, path = build(n_cells=150), tmp_path_factory.mktemp("disk") / "cells.zarr"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        group = zarr.open_group(path, mode="w")
        for number, start in enumerate((0, 60, 120)):
            ad.io.write_elem(group, f"dataset_{number}", data[start : start + 60].copy())
    return data, path


def opened(path):
    from epivi.data.disk import open_collection

    return open_collection(path)


def training(model, loader, block_size=40):
    model._loader, model._block_size = loader, block_size
    config = TrainingConfig.merged(model.config.training_defaults(10), {"seed": 0, "batch_size": 16})
    return model.training_data(config, 1)


def by_cell(batch):
    """Return what is encoded of each cell, without pads."""
    found = {}
    for i, row in enumerate(batch["rows"].tolist()):
        n, q = batch["length"][i], batch["query_length"][i]
        parts = [batch[key][i, :n] for key in ("tokens", "bin", "value")]
        parts += [batch["query"][i, :q], batch["maximum"][i : i + 1], batch["shift"][i : i + 1]]
        found[row] = tuple(part.numpy().tobytes() for part in parts)
    return found


def test_each_cell_once_an_epoch_and_encoded_bit_for_bit_as_from_memory(stored, make) -> None:
    data, path = stored
    disk, memory = make(opened(path), max_genes=16), make(data.copy(), max_genes=16)
    one, two = training(disk, "annbatch"), training(memory, "rows")
    assert np.array_equal(one.splits["train"], two.splits["train"])
    for epoch in (0, 3):
        encoded = []
        for given in (one, two):
            batches = [by_cell(given.dataset[drawn]) for drawn in given.make_sampler(0, 1).batches(epoch)]
            assert sum(map(len, batches)) == one.splits["train"].size
            encoded.append({row: cell for batch in batches for row, cell in batch.items()})
        assert encoded[0] == encoded[1]
        assert sorted(encoded[0]) == one.splits["train"].tolist()
    held = {row: cell for drawn in one.validation for row, cell in by_cell(one.dataset[drawn]).items()}
    assert held == {row: cell for drawn in two.validation for row, cell in by_cell(two.dataset[drawn]).items()}


@pytest.mark.parametrize("start", [{}, {"baseline": "additive"}, {"gene_init": "correlation"}])
def test_rows_in_memory_are_those_of_a_block(stored, make, monkeypatch, start) -> None:
    from epivi.data.disk import DiskRows
    from epivi.models.expresser.outputs import reading

    monkeypatch.setattr(reading, "ROWS_HELD", 40)
    data = opened(stored[1])
    model = make(data, **start)
    model.is_trained_ = False
    read, sizes = DiskRows._read, []

    def spied(self, rows):
        assert self.n_held == 0 or rows.size <= 16  # a block is let go before another is read
        sizes.append(rows.size)
        return read(self, rows)

    monkeypatch.setattr(DiskRows, "_read", spied)
    model.train(2, loader="annbatch", block_size=40, train_size=0.8, **QUIET)
    # 120 training cells: each is read once an epoch, and once for the start; 30 cells of validation
    passes = 2 + bool(start)
    assert max(sizes) <= 40
    assert sum(sizes) <= passes * 120 + 3 * 30
    model.get_latent_representation()
    assert max(sizes) <= 40
    assert model.is_trained_


def test_a_store_read_row_by_row_trains_the_same_weights_as_memory(stored, make) -> None:
    data, path = stored
    models = []
    for given in (opened(path), data.copy()):
        model = make(given)
        model.train(1, **QUIET)
        models.append(model)
    one, two = (torch.cat([p.detach().flatten() for p in m.module.parameters()]) for m in models)
    assert torch.equal(one, two)
    imputed = [m.impute(indices=[140, 3, 77], mode="all").X.toarray() for m in models]
    assert np.allclose(*imputed, atol=1e-5)


def test_training_from_blocks_is_determined_and_goes_on_where_it_was(stored, make, tmp_path) -> None:
    weights = []
    for run in (None, tmp_path / "run", tmp_path / "run"):
        model = make(opened(stored[1]))
        model.train(2, loader="annbatch", block_size=40, run_dir=run, **QUIET)
        weights.append(torch.cat([p.detach().flatten() for p in model.module.parameters()]))
    assert torch.equal(weights[0], weights[1])
    assert torch.equal(weights[0], weights[2])
    from epivi._errors import CheckpointError

    with pytest.raises(CheckpointError):
        make(opened(stored[1])).train(2, loader="annbatch", block_size=48, run_dir=tmp_path / "run", **QUIET)


def test_training_from_blocks_lowers_the_error(stored, make) -> None:
    model = make(opened(stored[1]))
    model.train(8, loader="annbatch", block_size=40, lr=3e-3, **QUIET)
    error = model.history["mse_validation"].to_numpy().ravel()
    assert error[-1] < 0.9 * error[0]


def test_data_that_annbatch_cannot_read_are_refused(counts, make, tmp_path) -> None:
    pytest.importorskip("annbatch", reason="annbatch is not installed (extra 'large')")
    with pytest.raises(ConfigError, match="the counts are in memory"):
        make(counts).train(1, loader="annbatch", **QUIET)
    counts.write_h5ad(tmp_path / "counts.h5ad")
    backed = ad.read_h5ad(tmp_path / "counts.h5ad", backed="r")
    with pytest.raises(ConfigError, match="in a file of kind hdf5"):
        make(backed).train(1, loader="annbatch", **QUIET)
    backed.file.close()


def test_bad_arguments_of_the_loader_are_refused(counts, make, monkeypatch) -> None:
    model = make(counts)
    with pytest.raises(ConfigError, match="loader='anbatch'"):
        model.train(1, loader="anbatch", **QUIET)
    with pytest.raises(ConfigError, match="block_size"):
        model.train(1, loader="annbatch", block_size=1, **QUIET)
    with pytest.raises(ConfigError, match="leave num_workers out"):
        model.train(1, loader="annbatch", num_workers=2, **QUIET)
    monkeypatch.setitem(sys.modules, "annbatch", None)
    with pytest.raises(ConfigError, match=r"pip install epivi\[large\]"):
        model.train(1, loader="annbatch", **QUIET)


def test_a_file_on_disk_is_never_loaded_whole(counts, make, tmp_path, monkeypatch) -> None:
    from epivi.data.sparse import SparseReader

    counts.write_h5ad(tmp_path / "counts.h5ad")
    backed = ad.read_h5ad(tmp_path / "counts.h5ad", backed="r")
    model = make(backed)
    take, sizes = SparseReader._take, []
    monkeypatch.setattr(SparseReader, "_take", lambda self, rows: sizes.append(len(rows)) or take(self, rows))
    monkeypatch.setattr(type(backed.X), "to_memory", lambda self: pytest.fail("the whole matrix was loaded"))
    model.train(2, **QUIET)
    assert max(sizes) <= QUIET["batch_size"] + 1
    assert epivi.Expresser is type(model)
    backed.file.close()
