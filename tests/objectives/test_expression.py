"""Masked means against loops, and the inverse of softplus."""

import numpy as np
import pytest
import torch

from epivi.objectives.expression import inverse_softplus, masked_cell_mean


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_masked_mean_is_that_of_a_loop(reduction) -> None:
    rng = np.random.default_rng(0)
    error, mask = rng.random((6, 5)), rng.random((6, 5)) < 0.5
    mask[2] = False
    cells = [getattr(np, reduction)(error[i, mask[i]]) for i in range(6) if mask[i].any()]
    loss, cell = masked_cell_mean(torch.tensor(error), torch.tensor(mask), reduction=reduction)
    assert loss.item() == pytest.approx(np.mean(cells))
    assert cell[2] == 0.0
    assert cell[mask.any(1)].numpy() == pytest.approx(cells)


def test_empty_mask_has_loss_and_gradient_zero() -> None:
    error = torch.full((3, 2), torch.nan, requires_grad=True)
    loss, _ = masked_cell_mean(error, torch.zeros(3, 2, dtype=torch.bool))
    loss.backward()
    assert loss.item() == 0.0
    assert (error.grad == 0).all()
    assert masked_cell_mean(torch.zeros(3, 0), torch.zeros(3, 0))[0].item() == 0.0


def test_what_is_not_masked_has_no_influence() -> None:
    error = torch.tensor([[1.0, 2.0]], requires_grad=True)
    masked_cell_mean(error, torch.tensor([[True, False]]))[0].backward()
    assert error.grad.tolist() == [[1.0, 0.0]]


def test_inverse_softplus_inverts_and_stays_finite() -> None:
    y = torch.tensor([1e-3, 0.1, 1.0, 30.0])
    assert torch.allclose(torch.nn.functional.softplus(inverse_softplus(y)), y, rtol=1e-4)
    assert torch.isfinite(inverse_softplus(torch.tensor([-1.0, 0.0]))).all()
