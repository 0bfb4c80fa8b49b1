from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from epivi._errors import ConfigError
from epivi.data.masking import draw_thinning, drop_covariates, hide_assays, mix_pairs, partners, swap_assays


@given(st.integers(0, 2**31 - 1), st.integers(1, 6), st.integers(1, 7), st.one_of(st.none(), st.integers(1, 8)))
def test_each_sample_hides_what_was_asked_and_keeps_one(seed, n_samples, n_assays, n_hidden):
    torch.manual_seed(seed)
    available_ba = (torch.rand(n_samples, n_assays) < 0.6).float()
    hidden_ba = hide_assays(available_ba, n_hidden)
    assert bool((hidden_ba <= available_ba).all())
    n_hidden_b, n_available_b = hidden_ba.sum(1), available_ba.sum(1)
    assert bool((n_hidden_b[n_available_b > 0] < n_available_b[n_available_b > 0]).all())
    if n_hidden is not None:
        assert torch.equal(n_hidden_b, (n_available_b - 1).clamp(min=0, max=n_hidden))


def test_numbers_and_assays_are_uniform():
    torch.manual_seed(0)
    n, counts, per_assay = 4000, torch.zeros(5), torch.zeros(4)
    for _ in range(n):
        hidden_a = hide_assays(torch.ones(1, 4))[0]
        counts[int(hidden_a.sum())] += 1
        per_assay += hidden_a
    assert counts[0] == 0
    assert counts[4] == 0
    # k ~ U{1, 2, 3}; an assay is hidden with probability E[k] / 4 = 1/2
    assert torch.allclose(counts[1:4] / n, torch.full((3,), 1 / 3), atol=0.03)
    assert torch.allclose(per_assay / n, torch.full((4,), 0.5), atol=0.03)


def test_one_number_holds_for_the_whole_minibatch():
    torch.manual_seed(1)
    for _ in range(20):
        assert hide_assays(torch.ones(8, 6)).sum(1).unique().numel() == 1


def test_thinning_factors_are_drawn_evenly():
    torch.manual_seed(0)
    drawn = draw_thinning((6000, 1), (1, 2, 4), torch.device("cpu"))
    values, counts = drawn.unique(return_counts=True)
    assert values.tolist() == [1.0, 2.0, 4.0]
    assert torch.allclose(counts / 6000, torch.full((3,), 1 / 3), atol=0.03)


@pytest.mark.parametrize("bad", [0, 1.5, -2])
def test_bad_thinning_factors_are_refused(bad):
    with pytest.raises(ConfigError, match="thinning factor"):
        draw_thinning((1,), (1, bad), torch.device("cpu"))


def pairs(n=6, n_assays=3, n_bins=4, seed=0):
    """Windows of two biosamples at one locus, all assays measured; counts, signal, depth, one more number, levels."""
    generator = torch.Generator().manual_seed(seed)
    depth = torch.rand(n, n_assays, 1, generator=generator) * 4 + 20
    return {
        "window": torch.arange((n + 1) // 2).repeat_interleave(2)[:n],
        "counts": torch.randint(0, 2000, (n, n_bins, n_assays), generator=generator).float(),
        "signal": torch.rand(n, n_bins, n_assays, generator=generator),
        "available_counts": torch.ones(n, n_assays),
        "available_signal": torch.ones(n, n_assays),
        "continuous": torch.cat([depth, torch.rand(n, n_assays, 2, generator=generator)], dim=2),
        "categorical": torch.randint(0, 2, (n, n_assays, 1), generator=generator),
        "log_depth_ratio": (depth[:, :, 0] - 21) * 0.6931472,
        "prior": torch.rand(n, n_bins, n_assays, generator=generator),
        "has_prior": torch.ones(n, n_assays),
    }


def weights(batch, mixed):
    """The weight of a sample's own signal, from what came out."""
    own, other = batch["signal"], batch["signal"][torch.arange(len(batch["signal"])) ^ 1]
    return ((mixed["signal"] - other) / (own - other)).mean(dim=1)


def test_signals_priors_depths_and_reads_are_mixed_with_one_weight():
    torch.manual_seed(0)
    batch = pairs()
    mixed = mix_pairs(batch, 1.0, depth=0, coverage=2)
    weight_ba = weights(batch, mixed)
    other = torch.arange(6) ^ 1
    assert torch.allclose(weight_ba, weight_ba[:, :1].expand(-1, 3), atol=1e-4)
    assert torch.allclose(weight_ba[::2], weight_ba[1::2], atol=1e-4)
    assert bool((weight_ba >= 0.5 - 1e-4).all())
    w = weight_ba[:, None]
    assert torch.allclose(mixed["prior"], w * batch["prior"] + (1 - w) * batch["prior"][other], atol=1e-4)
    expected = w * batch["counts"] + (1 - w) * batch["counts"][other]
    # binomial: within six standard deviations
    assert bool(((mixed["counts"] - expected).abs() < 6 * (0.5 * expected + 1).sqrt()).all())
    assert bool((mixed["counts"] == mixed["counts"].round()).all())
    reads = batch["continuous"][:, :, 0].exp2()
    depth = weight_ba * reads + (1 - weight_ba) * reads[other]
    assert torch.allclose(mixed["continuous"][:, :, 0], depth.log2(), atol=1e-3)
    assert torch.allclose(mixed["log_depth_ratio"], (depth.log2() - 21) * 0.6931472, atol=1e-3)
    number = batch["continuous"][:, :, 1]
    assert torch.allclose(mixed["continuous"][:, :, 1], weight_ba * number + (1 - weight_ba) * number[other], atol=1e-4)
    assert bool(mixed["continuous"][:, :, 2].isnan().all())
    same = batch["categorical"] == batch["categorical"][other]
    assert torch.equal(mixed["categorical"], torch.where(same, batch["categorical"], -1))


def test_assays_that_one_of_the_two_lacks_and_the_last_sample_stay_as_they_are():
    torch.manual_seed(0)
    batch = pairs(n=5)
    batch["available_signal"][1, 2] = 0
    mixed = mix_pairs(batch, 1.0, depth=0, coverage=2)
    for key in ("counts", "signal", "prior"):
        assert torch.equal(mixed[key][4], batch[key][4])
        assert torch.equal(mixed[key][:2, :, 2], batch[key][:2, :, 2])
        assert not torch.equal(mixed[key][:2, :, 0], batch[key][:2, :, 0])
    for key in ("continuous", "categorical", "log_depth_ratio"):
        assert torch.equal(mixed[key][4], batch[key][4])
        assert torch.equal(mixed[key][:2, 2], batch[key][:2, 2])
    assert all(torch.equal(batch[key], pairs(n=5)[key]) for key in batch if key != "available_signal")


def test_pairs_of_different_loci_are_refused():
    with pytest.raises(ConfigError, match="one locus"):
        mix_pairs(pairs() | {"window": torch.arange(6)}, 1.0)


def test_covariates_are_unknown_one_by_one_and_together():
    torch.manual_seed(0)
    continuous, categorical = drop_covariates(torch.zeros(4000, 2, 3), torch.zeros(4000, 2, 1, dtype=torch.long), 0.2)
    assert categorical.dtype == torch.long
    unknown = torch.cat([continuous.isnan(), categorical == -1], dim=2)
    # 1 - 0.8 * 0.8 each; all four with 0.2 + 0.8 * 0.2^4
    assert torch.allclose(unknown.float().mean((0, 1)), torch.full((4,), 0.36), atol=0.03)
    assert float(unknown.all(2).float().mean()) == pytest.approx(0.2 + 0.8 * 0.2**4, abs=0.02)
    kept, codes = drop_covariates(torch.ones(5, 2, 1), torch.ones(5, 2, 1), 0.0)
    assert bool((kept == 1).all())
    assert bool((codes == 1).all())


def test_swapped_assays_are_shown_and_the_partner_has_them():
    torch.manual_seed(0)
    available = (torch.rand(4001, 5) < 0.8).float()
    shown = available * (torch.rand(4001, 5) < 0.7)
    partner = partners(torch.arange(2001).repeat_interleave(2)[:4001])
    swapped = swap_assays(shown, available, partner, 0.3)
    assert not swapped[-1].any()
    assert bool((shown[swapped] == 1).all())
    assert bool((available[partner][swapped] == 1).all())
    can = (shown[:-1] > 0) & (available[partner][:-1] > 0)
    assert float(swapped[:-1][can].float().mean()) == pytest.approx(0.3, abs=0.02)
