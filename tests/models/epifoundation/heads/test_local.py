"""Expression read off the peaks near each gene: against dense products, and invariant to what does not matter."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from epivi.models.epifoundation.heads.local import Links, LocalReadout, near_links, registered_links

N_PEAKS, N_GENES = 7, 5


@pytest.fixture
def links():
    # gene 3 has no peak, peak 6 no gene
    return Links(np.array([0, 0, 1, 2, 2, 2, 4, 5]), np.array([0, 2, 1, 0, 1, 4, 2, 4]))


@pytest.fixture
def readout(links):
    rng = np.random.default_rng(0)
    module = LocalReadout(links, N_PEAKS, N_GENES).double()
    module.start(rng.normal(size=8), rng.random(8), is_used=True)
    return module


@pytest.fixture
def is_open():
    return np.random.default_rng(1).random((6, N_PEAKS)) < 0.5


def tokens_of(is_open, *, seed=None, n_pads=0, n_strange=0):
    """[CLS], the open peaks in any order, peaks outside the vocabulary, and pads."""
    rows = [np.flatnonzero(row) + 2 for row in is_open]
    rng = np.random.default_rng(seed)
    rows = [np.concatenate([row, np.zeros(n_strange, dtype=int)]) for row in rows]
    if seed is not None:
        rows = [rng.permutation(row) for row in rows]
    width = 1 + max(map(len, rows)) + n_pads
    return torch.tensor([[1, *row, *[0] * (width - 1 - len(row))] for row in rows])


def dense(readout, links):
    weight, mean = np.zeros((N_PEAKS, N_GENES)), np.zeros((N_PEAKS, N_GENES))
    weight[links.peak_l, links.gene_l] = readout.weight.detach().numpy()
    mean[links.peak_l, links.gene_l] = readout.mean.numpy()
    return weight, mean


def test_the_readout_is_the_product_of_the_centred_peaks_and_the_weights(readout, links, is_open):
    weight, mean = dense(readout, links)
    expected = is_open @ weight - (weight * mean).sum(0)
    np.testing.assert_allclose(readout(tokens_of(is_open)).detach(), expected, atol=1e-12)
    assert not expected[:, 3].any()


def test_order_pads_and_peaks_outside_the_vocabulary_change_nothing(readout, is_open):
    expected = readout(tokens_of(is_open))
    for seed in range(3):
        found = readout(tokens_of(is_open, seed=seed, n_pads=seed, n_strange=2))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    for cell in range(6):
        torch.testing.assert_close(readout(tokens_of(is_open[[cell]])), expected[[cell]], rtol=0, atol=1e-12)


def test_a_cell_without_peaks_lies_below_the_mean_by_all_of_it(readout, links):
    weight, mean = dense(readout, links)
    found = readout(torch.tensor([[1, 0], [1, 0]])).detach().numpy()
    np.testing.assert_allclose(found, np.tile(-(weight * mean).sum(0), (2, 1)), atol=1e-12)


def test_peaks_that_the_data_do_not_have_add_nothing(readout, links, is_open):
    weight, mean = dense(readout, links)
    absent = np.array([2, 4])
    is_open[:, absent] = False
    weight[absent] = 0.0
    expected = is_open @ weight - (weight * mean).sum(0)
    found = readout(tokens_of(is_open), torch.from_numpy(absent)).detach()
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_gradients_are_those_of_the_dense_form(readout, links, is_open):
    upstream = np.random.default_rng(2).normal(size=(6, N_GENES))
    (readout(tokens_of(is_open)) * torch.from_numpy(upstream)).sum().backward()
    _, mean = dense(readout, links)
    expected = [upstream[:, gene] @ (is_open[:, peak] - mean[peak, gene]) for peak, gene in zip(*links, strict=True)]
    np.testing.assert_allclose(readout.weight.grad, expected, atol=1e-12)


def test_a_gene_tells_nothing_to_peaks_that_are_not_near_it(readout, links, is_open):
    readout(tokens_of(is_open))[:, 2].sum().backward()
    assert (readout.weight.grad.numpy()[links.gene_l != 2] == 0).all()
    assert (readout.weight.grad.numpy()[links.gene_l == 2] != 0).all()


def test_it_starts_at_zero_and_stays_there_where_it_is_not_used(links, is_open):
    fresh = LocalReadout(links, N_PEAKS, N_GENES)
    assert not fresh(tokens_of(is_open)).any()
    fresh.start(np.zeros(8), np.full(8, 0.3), is_used=False)
    optimizer = torch.optim.AdamW(fresh.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        (fresh(tokens_of(is_open)) - 1.0).square().sum().backward()
        optimizer.step()
    assert not fresh.weight.any()
    assert set(fresh.state_dict()) == {"weight", "mean", "is_used"}


def test_what_each_peak_adds_to_a_gene_sums_up(readout, links, is_open):
    tokens = tokens_of(is_open, seed=1, n_strange=1)
    weight, mean = dense(readout, links)
    for gene in range(N_GENES):
        found = readout.of_gene(tokens, gene).detach()
        assert not found[tokens < 2].any()
        expected = readout(tokens)[:, gene].detach() + (weight * mean).sum(0)[gene]
        torch.testing.assert_close(found.sum(1), expected, rtol=0, atol=1e-12)
        at = (tokens == 4).nonzero()
        np.testing.assert_allclose(found[at[:, 0], at[:, 1]], weight[2, gene])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, 120))
def test_links_against_all_pairs(seed, window_bp):
    rng = np.random.default_rng(seed)
    n_peaks, n_genes = rng.integers(0, 12, 2)
    peak_chrom, gene_chrom = rng.integers(-1, 3, n_peaks), rng.integers(-1, 4, n_genes)
    middle, start = rng.integers(0, 500, n_peaks), rng.integers(0, 500, n_genes)
    end = start + rng.integers(1, 80, n_genes)
    links = near_links(peak_chrom, middle, gene_chrom, start, end, window_bp=window_bp)
    expected = []
    for peak in range(n_peaks):
        for gene in range(n_genes):
            distance = max(start[gene] - middle[peak], middle[peak] - end[gene], 0)
            if peak_chrom[peak] == gene_chrom[gene] >= 0 and distance <= window_bp:
                expected.append((peak, gene))
    assert [*zip(links.peak_l.tolist(), links.gene_l.tolist(), strict=True)] == expected


def test_links_follow_what_was_registered():
    peaks = {
        "chrom_names": np.array(["chr1", "chr2"]),
        "chrom_codes": np.array([0, 0, 1, -1]),
        "positions": [5, 90, 5, 5],
    }
    genes = {
        "chrom": np.array(["chr2", "chr1", "chrX", "chr1"]),
        "start": np.array([10, 10, 0, -1]),
        "end": np.array([20, 20, 9, -1]),
    }
    links = registered_links(peaks, genes, 5)
    assert (links.peak_l.tolist(), links.gene_l.tolist()) == ([0, 2], [1, 0])
    assert registered_links(peaks, {"chrom": genes["chrom"]}, 5) is None
    assert registered_links(peaks | {"chrom_names": np.array([])}, genes, 5) is None
