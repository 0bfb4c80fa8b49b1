from __future__ import annotations

import pytest
import torch

from epivi.models.candi.experiments import ExperimentEmbedding


def build(missing="learned", *, relu=False, n_assays=5):
    torch.manual_seed(0)
    return ExperimentEmbedding(n_assays, n_continuous=2, categories=(2, 3), relu=relu, missing=missing).double()


def covariates(b=4, n_assays=5):
    torch.manual_seed(1)
    return torch.randn(b, n_assays, 2, dtype=torch.float64), torch.randint(0, 2, (b, n_assays, 2))


def fields(embed, continuous, categorical):
    """Entry by entry; the fields side by side, each over all assays."""
    rows = []
    for b in range(len(continuous)):
        row = []
        for k in range(2):
            for value in continuous[b, :, k]:
                if value.isnan() and embed.missing is not None:
                    row.append(embed.missing[k])
                else:
                    row.append(value.nan_to_num(nan=-1.0) * embed.weight[k] + embed.bias[k])
        for k in range(2):
            n = embed.categories[k]
            row += [embed.tables[k].weight[n if code < 0 else code] for code in categorical[b, :, k]]
        rows.append(torch.cat(row))
    return torch.stack(rows)


@pytest.mark.parametrize("missing", ["learned", "literal"])
@pytest.mark.parametrize("relu", [False, True])
def test_the_embedding_is_the_formula(missing, relu):
    embed, (continuous, categorical) = build(missing, relu=relu), covariates()
    continuous[0, 1, 0] = continuous[2, 4, 1] = torch.nan
    categorical[1, 2, 1] = -1
    expected = embed.norm(embed.project(fields(embed, continuous, categorical)))
    torch.testing.assert_close(embed(continuous, categorical), expected.relu() if relu else expected)


@pytest.mark.parametrize("missing", ["learned", "literal"])
def test_what_a_mask_hides_is_unknown(missing):
    embed, (continuous, categorical) = build(missing), covariates()
    mask_ba = torch.ones(4, 5)
    mask_ba[0, 2] = mask_ba[3, 0] = 0.0
    hidden = mask_ba[:, :, None] == 0
    expected = embed(continuous.masked_fill(hidden, torch.nan), categorical.masked_fill(hidden, -1))
    for junk, code in ((torch.nan, -1), (torch.inf, 1), (1e30, 0)):
        found = embed(continuous.masked_fill(hidden, junk), categorical.masked_fill(hidden, code), mask_ba)
        assert torch.equal(found, expected)
    found.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in embed.parameters() if p.grad is not None)
    if missing == "learned":
        assert (embed.missing.grad != 0).any()


def test_the_unknown_is_not_a_value():
    embed, (continuous, categorical) = build(), covariates()
    for value in (-1.0, 0.0):
        known = embed(torch.full_like(continuous, value), categorical)
        assert not torch.allclose(known, embed(torch.full_like(continuous, torch.nan), categorical))
    literal = build("literal")
    assert torch.equal(
        literal(torch.full_like(continuous, -1.0), categorical),
        literal(torch.full_like(continuous, torch.nan), categorical),
    )


def test_few_assays_keep_a_width_and_no_covariates_give_nothing():
    small = ExperimentEmbedding(2, n_continuous=1, categories=())
    assert small.weight.shape == (1, 4)
    assert small(torch.zeros(3, 2, 1), None).shape == (3, 16)
    none = ExperimentEmbedding(5, n_continuous=0, categories=())
    assert none.n_outputs == sum(p.numel() for p in none.parameters()) == 0
    assert none(None, None) is None
