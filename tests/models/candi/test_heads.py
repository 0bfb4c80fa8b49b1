from __future__ import annotations

import pytest
import torch
from torch.nn.functional import layer_norm, softplus

from epivi.models.candi.heads import (
    CountHead,
    PaperCountHead,
    PaperSignalHead,
    PriorSkip,
    SignalHead,
    prior_link,
)

B, L, A = 3, 8, 5


def x_bla(scale=1.0):
    return scale * torch.randn(B, L, A, generator=torch.Generator().manual_seed(0))


def prior():
    generator = torch.Generator().manual_seed(1)
    prior_bla = 0.1 + 4 * torch.rand(B, L, A, generator=generator)
    has_ba = torch.ones(B, A)
    has_ba[0, 1] = has_ba[2, 4] = 0.0
    return prior_bla, has_ba


def test_the_count_head_is_linear_with_a_dispersion_within_bounds():
    head = CountHead(A)
    log_mean, log_theta = head(x_bla())
    torch.testing.assert_close(log_mean, x_bla() @ head.mean.linear.weight.t() + head.mean.linear.bias)
    assert torch.equal(log_theta, torch.zeros(B, L, A))
    with torch.no_grad():
        head.log_theta.copy_(torch.tensor([-9.0, -5.0, 2.0, 10.0, 30.0]))
    assert head(x_bla())[1][1, 2].tolist() == [-5.0, -5.0, 2.0, 10.0, 10.0]
    by_bin = CountHead(A, per_bin=True)
    expected = (1e3 * x_bla() @ by_bin.theta.weight.t() + by_bin.theta.bias).clamp(-5, 10)
    torch.testing.assert_close(by_bin(1e3 * x_bla())[1], expected)


def test_the_signal_head_is_softplus_and_the_variance_floor_is_added():
    head = SignalHead(A)
    mean, variance = head(x_bla())
    torch.testing.assert_close(mean, softplus(head.mean.linear(x_bla())))
    torch.testing.assert_close(variance, softplus(head.variance.linear(x_bla())) + 1e-3)
    with torch.no_grad():
        head.variance.linear.bias.fill_(-100.0)
    variance = head(x_bla())[1]
    torch.testing.assert_close(variance, torch.full_like(variance, 1e-3))
    paper = PaperSignalHead(A)
    torch.testing.assert_close(paper(x_bla())[1] - softplus(paper.variance(x_bla())), torch.full((B, L, A), 1e-3))


def test_the_paper_heads_are_c5():
    head = PaperCountHead(A)
    log_mean, log_theta = head(x_bla())
    p = torch.sigmoid(layer_norm(head.success.linear(x_bla()), (A,)))
    n = softplus(layer_norm(head.number.linear(x_bla()), (A,)))
    torch.testing.assert_close(log_theta.exp(), n)
    torch.testing.assert_close(log_mean.exp(), n * (1 - p) / p, rtol=1e-5, atol=1e-6)
    signal = PaperSignalHead(A)
    torch.testing.assert_close(signal(x_bla())[0], softplus(layer_norm(signal.mean.linear(x_bla()), (A,))))


@pytest.mark.parametrize("kind", [PaperCountHead, PaperSignalHead])
def test_the_paper_heads_do_not_see_the_level(kind):
    """Hazard 1: the level of X is lost, and at unit gain no output exceeds softplus(sqrt(A - 1))."""
    torch.manual_seed(0)
    head = kind(A)
    for part in head.children():
        torch.nn.init.zeros_(part.linear.bias)
    first = head(x_bla(10.0))
    for other in (head(x_bla(100.0)), head(x_bla(1000.0))):
        for one, two in zip(first, other, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-3)
    if kind is PaperSignalHead:
        assert first[0].max() <= softplus(torch.tensor(A - 1.0).sqrt())


@pytest.mark.parametrize("kind", [CountHead, SignalHead])
def test_the_default_heads_see_the_level(kind):
    torch.manual_seed(0)
    head = kind(A)
    one, two = head(x_bla(10.0))[0], head(x_bla(100.0))[0]
    assert two.std() > 5 * one.std()


def test_the_link_of_a_prior_gives_it_back():
    prior_bla, has_ba = prior()
    link_bla = prior_link(prior_bla, has_ba)
    is_in = (has_ba > 0)[:, None].expand_as(link_bla)
    torch.testing.assert_close(softplus(link_bla)[is_in], prior_bla[is_in])
    torch.testing.assert_close(link_bla.exp().log1p()[is_in], prior_bla[is_in])
    assert (link_bla[~is_in] == 0).all()
    low = prior_link(torch.tensor([[[0.0], [0.05]]]), torch.ones(1, 1))
    torch.testing.assert_close(softplus(low).flatten(), torch.tensor([0.05, 0.05]))
    assert prior_link(torch.full((1, 2, 1), torch.nan), torch.zeros(1, 1)).abs().sum() == 0.0


def test_heads_start_from_the_prior_where_there_is_one():
    prior_bla, has_ba = prior()
    link_bla = prior_link(prior_bla, has_ba)
    is_in = (has_ba > 0)[:, None].expand_as(link_bla)
    mean, _ = SignalHead(A, prior_start=1.0)(x_bla(), link_bla, has_ba)
    assert (mean - prior_bla)[is_in].abs().mean() < 0.1
    assert torch.corrcoef(torch.stack([mean[is_in], prior_bla[is_in]]))[0, 1] > 0.98
    log_mean, _ = CountHead(A, prior_start=1.0)(x_bla(), link_bla, has_ba)
    assert (log_mean.exp().log1p() - prior_bla)[is_in].abs().mean() < 0.1
    other = CountHead(A, prior_start=0.0)
    torch.testing.assert_close(other(x_bla(), link_bla, has_ba)[0], other.mean.linear(x_bla()))
    # elsewhere the prior has no influence
    head = SignalHead(A, prior_start=1.0)
    assert torch.equal(head(x_bla(), link_bla, has_ba)[0][~is_in], head(x_bla(), 0 * link_bla, 0 * has_ba)[0][~is_in])


def test_the_prior_term_is_a_line_for_each_assay():
    skip, (prior_bla, has_ba) = PriorSkip(A, start=1.0), prior()
    with torch.no_grad():
        skip.weight.copy_(torch.arange(1.0, A + 1))
        skip.bias.fill_(0.5)
    link_bla = prior_link(prior_bla, has_ba)
    expected = (link_bla * torch.arange(1.0, A + 1) + 0.5) * has_ba[:, None]
    torch.testing.assert_close(skip(link_bla, has_ba), expected)
