"""Bins, hidden genes, normalisation of the observed entries, and what does not change them."""

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from scipy import sparse

from epivi import _keys as keys
from epivi.data.sparse import row_tensors
from epivi.models.expresser.config import ExpresserConfig
from epivi.models.expresser.encoding import (
    CellEncoding,
    hidden_number,
    relative_bins,
    residual_bins,
    smallest_of_rows,
)


def encode(counts, *, columns=None, names=None, draw=0, rows=None, factor=None, **choices):
    """Return what is encoded of a matrix, and the encoding."""
    counts = sparse.csr_matrix(counts)
    n, m = counts.shape
    rest = {key: choices.pop(key) for key in ("gene_mean", "measured", "is_lognorm") if key in choices}
    config = ExpresserConfig.chosen(choices, size="test")
    names = [f"c{i}" for i in range(n)] if names is None else names
    encoding = CellEncoding(names, np.arange(1, m + 1) if columns is None else columns, config, seed=3, **rest)
    rows = np.arange(n) if rows is None else np.asarray(rows)
    batch = row_tensors(counts[rows]) | {keys.BATCH_ROWS: torch.from_numpy(rows)}
    if factor is not None:
        batch["size_factor"] = torch.tensor(factor)[:, None]
    return encoding(batch, draw), encoding


def cell(encoded, i):
    """Return tokens, bins and values of a cell by gene, and the hidden genes."""
    n = encoded[keys.BATCH_LENGTH][i]
    tokens = encoded[keys.BATCH_TOKENS][i, :n].tolist()
    hidden = encoded[keys.BATCH_QUERY][i, : encoded[keys.BATCH_QUERY_LENGTH][i]]
    bins = dict(zip(tokens, encoded[keys.BATCH_BIN][i, :n].tolist(), strict=True))
    values = dict(zip(tokens, encoded[keys.BATCH_VALUE][i, :n].tolist(), strict=True))
    return bins, values, {tokens[j] for j in hidden.tolist()}


def test_numbers_of_hidden_genes() -> None:
    n = np.arange(21)
    expected = [0, 0] + [min(max(round(0.15 * p), 1), p - 1) for p in range(2, 21)]
    assert hidden_number(n, 0.15).tolist() == expected
    assert hidden_number(np.array([2, 3]), 0.5).tolist() == [1, 2]


def test_bin_rule_at_the_ends_of_intervals() -> None:
    k, top = 10, 3.7
    ends = top * np.arange(1, k + 1) / k
    assert relative_bins(ends, np.full(k, top), k).tolist() == list(range(1, k + 1))
    assert relative_bins(ends * (1 - 1e-6), np.full(k, top), k).tolist() == list(range(1, k + 1))
    assert relative_bins(ends[:-1] * (1 + 1e-6), np.full(k - 1, top), k).tolist() == list(range(2, k + 1))
    assert relative_bins(np.array([1e-12, top]), np.full(2, top), k).tolist() == [1, k]


@settings(max_examples=60, deadline=None)
@given(st.floats(1e-3, 1.0), st.floats(1e-2, 1e3), st.integers(1, 60))
def test_a_value_lies_in_its_bin(share, top, k) -> None:
    b = int(relative_bins(np.array([share * top]), np.array([top]), k)[0])
    assert 1 <= b <= k
    assert (b - 1) * top / k - 1e-6 * top <= share * top <= b * top / k + 1e-6 * top


def test_hidden_genes_take_no_part_in_sum_maximum_and_bins() -> None:
    counts = np.zeros((1, 30))
    counts[0, :20] = np.arange(1, 21)
    encoded, _ = encode(counts)
    bins, values, hidden = cell(encoded, 0)
    seen = [g for g in range(1, 21) if g not in hidden]
    total = sum(seen)
    assert len(hidden) == 3
    assert encoded[keys.BATCH_MAXIMUM].item() == pytest.approx(np.log1p(1e4 * max(seen) / total), rel=1e-6)
    assert {g: v for g, v in bins.items() if v == 0}.keys() == hidden
    for gene in range(1, 21):
        assert values[gene] == pytest.approx(np.log1p(1e4 * gene / total), rel=1e-6)


def test_leaky_normalisation_is_that_of_the_whole_cell() -> None:
    counts = np.arange(1, 21)[None]
    encoded, _ = encode(counts, leaky_normalization=True)
    assert encoded[keys.BATCH_MAXIMUM].item() == pytest.approx(np.log1p(1e4 * 20 / 210), rel=1e-6)


def test_a_size_factor_of_the_user_replaces_the_sum() -> None:
    encoded, _ = encode(np.arange(1, 21)[None], factor=[500.0])
    assert cell(encoded, 0)[1][7] == pytest.approx(np.log1p(1e4 * 7 / 500), rel=1e-6)


def test_no_leak_bit_for_bit() -> None:
    rng = np.random.default_rng(1)
    counts = rng.poisson(2.0, (5, 30)).astype(float) + 1
    encoded, _ = encode(counts)
    changed = counts.copy()
    for i in range(5):
        for gene in cell(encoded, i)[2]:
            changed[i, gene - 1] = 1000.0
    other, _ = encode(changed)
    for key in (keys.BATCH_TOKENS, keys.BATCH_BIN, keys.BATCH_MAXIMUM, keys.BATCH_QUERY, keys.BATCH_SHIFT):
        assert torch.equal(encoded[key], other[key])
    assert not torch.equal(encoded[keys.BATCH_VALUE], other[keys.BATCH_VALUE])


def test_columns_in_another_order_change_nothing() -> None:
    rng = np.random.default_rng(2)
    counts = rng.poisson(1.0, (6, 40)).astype(float)
    order = rng.permutation(40)
    one, _ = encode(counts, max_genes=12)
    two, _ = encode(counts[:, order], columns=order + 1, max_genes=12)
    for i in range(6):
        assert cell(one, i) == cell(two, i)


def test_other_cells_change_nothing_and_draws_do() -> None:
    rng = np.random.default_rng(3)
    counts = rng.poisson(1.0, (6, 40)).astype(float)
    every, encoding = encode(counts)
    alone, _ = encode(counts, rows=[4])
    assert cell(every, 4) == cell(alone, 0)
    hidden = [cell(encode(counts, draw=d)[0], 4)[2] for d in range(4)]
    assert len({tuple(sorted(h)) for h in hidden}) > 1
    assert encoding.seed == 3


@pytest.mark.parametrize("n", [0, 1, 2, 48, 49])
def test_cells_of_any_number_of_genes(n) -> None:
    counts = np.zeros((2, 60))
    counts[0, :n] = 1.0
    counts[1, :3] = 2.0
    encoded, _ = encode(counts)
    length, n_hidden = encoded[keys.BATCH_LENGTH][0].item(), encoded[keys.BATCH_QUERY_LENGTH][0].item()
    assert length == min(n, 48)
    assert n_hidden == hidden_number(np.array([min(n, 48)]), 0.15)[0]
    assert ((encoded[keys.BATCH_BIN][0] > 0).sum().item()) == length - n_hidden


def test_a_minibatch_of_empty_cells_has_a_shape() -> None:
    encoded, _ = encode(np.zeros((2, 5)))
    assert encoded[keys.BATCH_TOKENS].tolist() == [[0], [0]]
    assert encoded[keys.BATCH_QUERY].shape == (2, 0)


def test_count_bins_are_counts_at_any_depth() -> None:
    counts = np.array([[1, 2, 3, 30, 1, 1, 1, 1]])
    one, _ = encode(counts, binning="count", mask_rate=0.01)
    bins, _, hidden = cell(one, 0)
    expected = {1: 1, 2: 2, 3: 3, 4: 10, 5: 1, 6: 1, 7: 1, 8: 1}
    assert {g: b for g, b in bins.items() if g not in hidden} == {g: b for g, b in expected.items() if g not in hidden}
    deeper, _ = encode(np.hstack([counts, [[500]]]), binning="count", mask_rate=0.01)
    seen = set(expected) - hidden - cell(deeper, 0)[2]
    assert all(cell(deeper, 0)[0][g] == bins[g] for g in seen)


def test_log_normalised_values_give_what_counts_give() -> None:
    rng = np.random.default_rng(4)
    counts = rng.poisson(2.0, (4, 30)).astype(float) + 1
    lognorm = np.log1p(1e4 * counts / counts.sum(1, keepdims=True))
    one, _ = encode(counts)
    two, _ = encode(lognorm, is_lognorm=True)
    assert torch.equal(one[keys.BATCH_BIN], two[keys.BATCH_BIN])
    assert torch.allclose(one[keys.BATCH_VALUE], two[keys.BATCH_VALUE], atol=1e-5)


def test_folds_hide_every_gene_once_as_evenly_as_can_be() -> None:
    counts = np.zeros((3, 30))
    counts[0, :20], counts[1, :1], counts[2, :3] = 1, 1, 1
    _, encoding = encode(counts)
    batch = row_tensors(sparse.csr_matrix(counts)) | {keys.BATCH_ROWS: torch.arange(3)}
    cells = encoding.read(batch)
    fold_o = encoding.folds(cells)
    sizes = np.bincount(fold_o[:20], minlength=7)
    assert sizes.sum() == 20
    assert sizes.max() - sizes.min() <= 1
    assert fold_o[20] == -1
    assert sorted(fold_o[21:].tolist()) == [0, 1, 2]


def test_shift_is_the_mean_left_over_of_the_observed_genes() -> None:
    counts = np.arange(1, 21)[None].astype(float)
    mean = np.linspace(0.0, 2.0, 21)
    encoded, _ = encode(counts, gene_mean=mean)
    bins, values, hidden = cell(encoded, 0)
    expected = np.mean([values[g] - mean[g] for g in values if g not in hidden])
    assert encoded[keys.BATCH_SHIFT].item() == pytest.approx(expected, abs=1e-5)
    assert len(bins) == 20


def test_residual_bins_are_those_of_what_the_baseline_leaves() -> None:
    edges = np.linspace(-2.5, 2.5, 11)
    inside = (edges[:-1] + edges[1:]) / 2
    assert residual_bins(inside, 10).tolist() == list(range(1, 11))
    assert residual_bins(np.array([-2.5, 2.5, -99.0, 99.0]), 10).tolist() == [1, 10, 1, 10]
    counts = np.arange(1, 21)[None].astype(float)
    mean = np.linspace(5.0, 8.0, 21)
    encoded, _ = encode(counts, gene_mean=mean, baseline="additive", binning="residual")
    bins, values, hidden = cell(encoded, 0)
    shift = encoded[keys.BATCH_SHIFT].item()
    for gene, value in values.items():
        expected = residual_bins(np.array([value - mean[gene] - shift]), 10)[0]
        assert bins[gene] == (0 if gene in hidden else expected)


def test_zeros_are_measured_and_not_expressed() -> None:
    counts = np.zeros((4, 12))
    counts[:, :6] = 1.0
    measured = np.ones((2, 12), dtype=bool)
    measured[1, 8:] = False
    code = np.array([0, 1, 1, 0])
    encoded, _ = encode(counts, detection=True, mask_rate=0.5, measured=(measured, code))
    zeros = encoded[keys.BATCH_ZEROS]
    assert zeros.shape == (4, 3)
    assert all(7 <= z <= 12 for z in zeros[code == 0].flatten().tolist())
    assert all(z in (0, 7, 8) for z in zeros[code == 1].flatten().tolist())
    assert sorted(zeros[1].tolist()) == [0, 7, 8]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=6), st.integers(0, 5))
def test_smallest_of_rows_is_that_of_a_loop(lengths, most) -> None:
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    hashes = np.random.default_rng(0).permutation(int(indptr[-1]))
    n_b = np.minimum(lengths, most)
    chosen = smallest_of_rows(indptr, hashes, n_b)
    for row, n in enumerate(n_b):
        part = slice(indptr[row], indptr[row + 1])
        assert set(hashes[part][chosen[part]]) == set(np.sort(hashes[part])[:n])
