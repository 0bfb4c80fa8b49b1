from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import sparse
from scvi import REGISTRY_KEYS

from epivi import _keys as keys
from epivi.data.sparse import row_tensors
from epivi.models.epifoundation.config import EpiFoundationConfig
from epivi.models.epifoundation.encoding import CellEncoding, PeakColumns, Targets

N_CELLS, N_PEAKS, N_GENES = 7, 40, 10
COLUMNS = PeakColumns(np.arange(N_PEAKS) + 2, np.arange(N_PEAKS) % 3 - 1, 100 * np.arange(N_PEAKS))


@pytest.fixture(scope="module")
def cells():
    """Cells with 0, 1, few and all peaks open; and with none, one, half and all genes expressed."""
    rng = np.random.default_rng(0)
    x = (rng.random((N_CELLS, N_PEAKS)) < 0.3) * rng.integers(1, 6, (N_CELLS, N_PEAKS))
    y = rng.poisson(1.0, (N_CELLS, N_GENES))
    x[0], x[1], x[2] = 0, np.eye(N_PEAKS)[7], 1
    y[0], y[1], y[2], y[3] = 0, np.eye(N_GENES)[3], 2, np.arange(N_GENES) < 8
    return x, y


@pytest.fixture(scope="module")
def encode(cells):
    """Encode rows of the cells, with choices of the model."""

    def run(rows=None, *, targets=True, draw=0, seed=0, kind="counts", columns=COLUMNS, **choices):
        rows = np.arange(N_CELLS) if rows is None else np.asarray(rows)
        config = EpiFoundationConfig.chosen({"max_peaks": N_PEAKS} | choices, size="test")
        scored = Targets(N_GENES, kind, np.array([-1, 0, 1])) if targets else None
        encoding = CellEncoding([f"c{i}" for i in range(N_CELLS)], columns, config, seed=seed, targets=scored)
        x, y = (sparse.csr_matrix(part[rows]) for part in cells)
        batch = {
            keys.BATCH_ROWS: torch.from_numpy(rows),
            REGISTRY_KEYS.LABELS_KEY: torch.from_numpy(rows % 3)[:, None],
            **row_tensors(x),
            **row_tensors(y, prefix=keys.BATCH_RNA),
        }
        return encoding(batch, draw)

    return run


def test_tokens_against_a_loop(encode, cells):
    batch = encode(positions="genome", count_levels=True, targets=False)
    longest = N_PEAKS + 1
    names = (keys.BATCH_TOKENS, keys.BATCH_TOKEN_CHROM, keys.BATCH_TOKEN_POSITION, keys.BATCH_TOKEN_LEVEL)
    for cell, row in enumerate(cells[0]):
        opened = np.flatnonzero(row)
        pad = [longest - 1 - opened.size]
        expected = (
            [1, *(opened + 2), *np.repeat(0, pad)],
            [-1, *(opened % 3), *np.repeat(-1, pad)],
            [0, *(100 * opened), *np.repeat(0, pad)],
            [0, *np.minimum(row[opened], 3), *np.repeat(0, pad)],
        )
        for name, values in zip(names, expected, strict=True):
            assert batch[name][cell].tolist() == values
        assert batch[keys.BATCH_LENGTH][cell] == opened.size + 1


def test_only_what_the_model_reads_is_encoded(encode):
    batch = encode(targets=False)
    assert set(batch) == {
        keys.BATCH_ROWS,
        REGISTRY_KEYS.LABELS_KEY,
        keys.BATCH_TOKENS,
        keys.BATCH_TOKEN_CHROM,
        keys.BATCH_LENGTH,
    }


def test_the_longest_cell_of_the_minibatch_sets_the_width(encode):
    assert encode([0], targets=False)[keys.BATCH_TOKENS].tolist() == [[1]]
    assert encode([0, 1], targets=False)[keys.BATCH_TOKENS].tolist() == [[1, 0], [1, 9]]


def read_tokens(batch):
    lengths = batch[keys.BATCH_LENGTH].tolist()
    return [row[:n].tolist() for row, n in zip(batch[keys.BATCH_TOKENS], lengths, strict=True)]


@pytest.mark.parametrize("limit", [1, 12, N_PEAKS - 1, N_PEAKS, N_PEAKS + 1])
def test_cells_above_the_limit_are_sampled_and_others_whole(encode, cells, limit):
    whole = read_tokens(encode(targets=False))
    for full, kept in zip(whole, read_tokens(encode(targets=False, max_peaks=limit)), strict=True):
        assert len(kept) == min(len(full), limit + 1)
        assert set(kept) <= set(full)
        assert kept == sorted(kept)
        if len(full) <= limit + 1:
            assert kept == full


def test_samples_depend_on_cell_seed_and_draw_alone(encode):
    whole = read_tokens(encode(targets=False, max_peaks=8))
    assert read_tokens(encode(targets=False, max_peaks=8)) == whole
    assert read_tokens(encode([4, 2, 6], targets=False, max_peaks=8)) == [whole[i] for i in (4, 2, 6)]
    assert read_tokens(encode(targets=False, max_peaks=8, draw=1))[2] != whole[2]
    assert read_tokens(encode(targets=False, max_peaks=8, seed=1))[2] != whole[2]


def test_every_peak_is_read_in_some_draw(encode):
    read = [set(read_tokens(encode([2], targets=False, max_peaks=8, draw=draw))[0]) for draw in range(40)]
    assert set().union(*read) == {1, *range(2, N_PEAKS + 2)}


def test_genes_are_half_expressed_and_half_silent(encode, cells):
    batch = encode(max_genes=6)
    genes, target = batch[keys.BATCH_GENES].numpy(), batch[keys.BATCH_GENE_TARGET].numpy()
    for cell, row in enumerate(cells[1]):
        n = int((row > 0).sum())
        half = min(3, n, N_GENES - n)
        drawn = genes[cell][genes[cell] >= 0]
        assert drawn.size == np.unique(drawn).size == 2 * half
        assert target[cell][genes[cell] >= 0].sum() == half
        np.testing.assert_array_equal(target[cell][genes[cell] >= 0], row[drawn] > 0)
        assert batch[keys.BATCH_N_EXPRESSED][cell, 0] == n
    # without RNA and with all genes expressed nothing is drawn; with 8 of 10, two of each kind
    assert [(genes[cell] >= 0).sum() for cell in (0, 2, 3)] == [0, 0, 4]


def test_genes_drawn_depend_on_cell_and_draw_alone(encode):
    whole, part, other = (encode(rows, max_genes=4, draw=draw) for rows, draw in ((None, 0), ([6, 4], 0), (None, 1)))
    for at, cell in enumerate((6, 4)):
        width = part[keys.BATCH_GENES].shape[1]
        assert torch.equal(part[keys.BATCH_GENES][at], whole[keys.BATCH_GENES][cell, :width])
    assert not torch.equal(whole[keys.BATCH_GENES], other[keys.BATCH_GENES])


def test_expression_is_log_normalised_to_ten_thousand(encode, cells):
    batch = encode(task="expression")
    y = cells[1]
    expected = np.log1p(1e4 * y / np.maximum(y.sum(1, keepdims=True), 1))
    np.testing.assert_allclose(batch[keys.BATCH_GENE_TARGET].numpy(), expected, rtol=1e-6)
    genes = batch[keys.BATCH_GENES].numpy()
    # a cell without RNA is not scored
    assert (genes[0] == -1).all()
    np.testing.assert_array_equal(genes[1:], np.tile(np.arange(N_GENES), (N_CELLS - 1, 1)))


def test_log_normalised_values_stay_as_they_are(encode, cells):
    batch = encode(task="expression", kind="lognorm")
    np.testing.assert_array_equal(batch[keys.BATCH_GENE_TARGET].numpy(), cells[1])


def test_levels_are_ranks_within_the_cell(encode, cells):
    batch = encode(task="expression", expression_target="level", n_levels=4)
    for cell, row in enumerate(cells[1]):
        values = np.log1p(1e4 * row[row > 0] / max(row.sum(), 1))
        level = np.zeros(N_GENES)
        if values.size:
            edges = np.quantile(values, np.linspace(0, 1, 3))
            level[row > 0] = (edges <= values[:, None]).sum(1)
        np.testing.assert_array_equal(batch[keys.BATCH_GENE_TARGET][cell].numpy(), level)


def test_some_genes_of_many_are_scored_with_their_own_targets(encode):
    whole, part, again, other = (
        encode(task="expression", max_genes=n, draw=draw) for n, draw in ((10, 0), (4, 0), (4, 0), (4, 1))
    )
    genes = part[keys.BATCH_GENES][1]
    assert genes.unique().numel() == 4
    assert torch.equal(part[keys.BATCH_GENE_TARGET], whole[keys.BATCH_GENE_TARGET][:, genes])
    assert torch.equal(part[keys.BATCH_GENES], again[keys.BATCH_GENES])
    assert not torch.equal(part[keys.BATCH_GENES], other[keys.BATCH_GENES])


@pytest.mark.parametrize("task", ["annotation", "batch_correction"])
def test_labels_are_classes_and_genes_are_not_scored(encode, task):
    batch = encode(task=task)
    assert batch[keys.BATCH_CLASS].tolist() == [-1, 0, 1, -1, 0, 1, -1]
    assert keys.BATCH_GENES not in batch


def hidden_of(batch):
    peaks, is_open = batch[keys.BATCH_HIDDEN_PEAKS].numpy(), batch[keys.BATCH_HIDDEN_IS_OPEN].numpy()
    return [
        (row[(row >= 0) & (o > 0)].tolist(), row[(row >= 0) & (o == 0)].tolist())
        for row, o in zip(peaks, is_open, strict=True)
    ]


def test_hidden_peaks_are_not_read_and_closed_ones_are_closed(encode, cells):
    batch = encode(masked_peak_weight=1.0, masked_peak_rate=0.4)
    for read, (opened, closed), row in zip(read_tokens(batch), hidden_of(batch), cells[0], strict=True):
        tokens = set((np.flatnonzero(row) + 2).tolist())
        assert set(read[1:]) | set(opened) == tokens
        assert not set(read) & set(opened)
        assert not tokens & set(closed)
        assert len(closed) <= len(opened)
        # a cell is never hidden whole
        assert len(read) > 1 or not tokens
    hidden = sum(len(opened) for opened, _ in hidden_of(batch))
    n = (cells[0] > 0).sum()
    assert abs(hidden - 0.4 * n) < 5 * np.sqrt(0.24 * n)
    # in the cell whose peaks are all open, no closed one is found
    assert hidden_of(batch)[2][1] == []


def test_what_is_hidden_depends_on_cell_and_draw_alone(encode):
    options = {"masked_peak_weight": 1.0, "masked_peak_rate": 0.4}
    whole = hidden_of(encode(**options))
    assert hidden_of(encode([5, 0, 3], **options)) == [whole[i] for i in (5, 0, 3)]
    assert hidden_of(encode(draw=1, **options)) != whole


def test_nothing_is_hidden_where_cells_are_read_or_the_task_is_another(encode):
    whole = read_tokens(encode(targets=False))
    assert read_tokens(encode(targets=False, masked_peak_weight=1.0)) == whole
    assert read_tokens(encode(task="annotation", masked_peak_weight=1.0)) == whole


def test_peaks_that_the_vocabulary_lacks_have_a_place_alone(encode):
    state = {
        "column_names": np.arange(N_PEAKS).astype(str),
        "query_rows": np.where(np.arange(N_PEAKS) % 2, -1, np.arange(N_PEAKS)),
        "query_chrom": COLUMNS.chrom,
        "query_position": COLUMNS.position,
    }
    columns = PeakColumns.of(state)
    batch = encode([1, 2], targets=False, columns=columns, positions="genome")
    # the one open peak of the first cell is column 7
    assert batch[keys.BATCH_TOKENS][0, :2].tolist() == [1, 0]
    assert batch[keys.BATCH_TOKEN_CHROM][0, :3].tolist() == [-1, 1, -1]
    assert batch[keys.BATCH_TOKEN_POSITION][0, :2].tolist() == [0, 700]
    assert batch[keys.BATCH_LENGTH].tolist() == [2, N_PEAKS + 1]
    assert batch[keys.BATCH_TOKENS][1, 1:].tolist() == [0 if i % 2 else i + 2 for i in range(N_PEAKS)]
    assert batch[keys.BATCH_ABSENT_PEAKS].tolist() == [*range(1, N_PEAKS, 2)]
    whole = PeakColumns.of(state | {"query_rows": np.arange(N_PEAKS)})
    assert keys.BATCH_ABSENT_PEAKS not in encode([1, 2], targets=False, columns=whole, positions="genome")
    own = PeakColumns.of({"column_names": np.arange(3), "chrom_codes": [0, 0, 1], "positions": [5, 6, 7]})
    assert own.token.tolist() == [2, 3, 4]
