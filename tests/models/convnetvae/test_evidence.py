"""Likelihoods of models of tracks: noise by row, what is computed once, no cells, models that were not trained."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import epivi
from epivi.models.convnetvae import module as tracks_module

CHANNELS = ["H3K27ac", "ATAC", "H3K27me3"]


def test_the_noise_of_a_cell_does_not_depend_on_the_others(trained):
    order = np.random.default_rng(0).permutation(60)
    whole = trained.get_marginal_ll(n_mc_samples=3, return_mean=False)
    for indices, size in ((order, None), (order, 7), ([41, 3], None)):
        found = trained.get_marginal_ll(indices=indices, n_mc_samples=3, return_mean=False, batch_size=size)
        np.testing.assert_allclose(found, whole[indices], rtol=1e-5)
    assert trained.get_elbo(indices=order, batch_size=7) == pytest.approx(trained.get_elbo(), rel=1e-6)
    cells = [trained.get_elbo(indices=[row]) for row in range(60)]
    assert np.mean(cells) == pytest.approx(trained.get_elbo(), rel=1e-6)
    errors = [trained.get_reconstruction_error(indices=rows, batch_size=16) for rows in (None, order)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-6)
    sampled = {"use_z_mean": False, "return_numpy": True}
    np.testing.assert_allclose(
        trained.get_normalized_expression(indices=order, **sampled),
        trained.get_normalized_expression(**sampled)[order],
        rtol=1e-4,
    )


def test_what_does_not_depend_on_the_latent_is_computed_once(trained, monkeypatch):
    calls = {"poisson_constant": 0, "_columns": 0}

    def count(owner, name):
        real = getattr(owner, name)

        def counted(*args, **kwargs):
            calls[name] += 1
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, counted)

    count(tracks_module, "poisson_constant")
    count(trained.module, "_columns")
    trained.get_marginal_ll(n_mc_samples=9)
    # a group of channels, or one group for each; covariates of the encoder and of the decoder
    n_groups = len(trained.module.group_lengths)
    assert calls == {"poisson_constant": n_groups, "_columns": 2}


def test_the_likelihood_is_a_function_of_hidden_units(trained, entries, forward):
    tensors = entries(trained)
    outputs, hidden, _ = forward(trained.module, tensors)
    likelihood = trained.module.likelihood(outputs["groups"], outputs["mask_bc"])
    for scale in (1.0, 0.5):
        expected = trained.module.negative_log_likelihood(hidden * scale, outputs["groups"], outputs["mask_bc"])
        assert torch.equal(likelihood(hidden * scale), expected)


def test_no_cells_give_empty_results(trained, imputers_of):
    def numbers(**kwargs):
        return trained.get_normalized_expression(indices=[], **kwargs)

    assert trained.get_latent_representation(indices=[]).shape == (0, 4)
    assert trained.get_latent_representation(indices=[], modality="ATAC").shape == (0, 4)
    assert [part.shape for part in trained.get_latent_representation(indices=[], return_dist=True)] == [(0, 4)] * 2
    assert numbers().shape == (0, 360)
    assert numbers(return_numpy=True).dtype == np.float32
    assert numbers(threshold=0.1, return_numpy=True).shape == (0, 360)
    assert numbers(library_size="observed", use_z_mean=False, region_list="chr1:0-20000").shape == (0, 6)
    assert np.isnan(trained.get_elbo(indices=[]))
    assert np.isnan(trained.get_marginal_ll(indices=[], n_mc_samples=2))
    assert trained.get_marginal_ll(indices=[], n_mc_samples=2, return_mean=False).shape == (0,)
    errors = trained.get_reconstruction_error(indices=[])
    assert list(errors) == [*CHANNELS, "total"]
    assert np.isnan(list(errors.values())).all()
    if isinstance(trained, epivi.FCVAE):
        weights = trained.get_expert_weights(indices=[])
        assert weights.shape == (0, 4)
        assert weights.columns.tolist() == [*CHANNELS, "prior"]
    for cells in ("missing", "all"):
        found = imputers_of(trained).impute_modality("ATAC", indices=[], cells=cells)
        assert found.shape == (0, 120)
        assert found.var["channel"].unique().tolist() == ["ATAC"]


@pytest.fixture
def imputers_of(incomplete, make):
    """A model that may impute, of the kind of another one; not fitted, but taken for trained."""

    def build(model):
        other = make(type(model).__name__, incomplete, setup={})
        other.is_trained_ = True
        return other

    return build


@pytest.mark.parametrize(
    "call",
    [
        lambda m: m.get_latent_representation(),
        lambda m: m.get_latent_representation(modality="H3K27ac"),
        lambda m: m.get_normalized_expression(),
        lambda m: m.get_normalized_accessibility(),
        lambda m: m.impute_modality("ATAC"),
        lambda m: m.get_elbo(),
        lambda m: m.get_marginal_ll(n_mc_samples=1),
        lambda m: m.get_reconstruction_error(),
    ],
)
def test_a_model_that_was_not_trained_warns_once(kind, incomplete, make, call):
    model = make(kind, incomplete, setup={})
    with pytest.warns(UserWarning, match="inferred values from an untrained model") as caught:
        call(model)
    assert sum("untrained model" in str(warning.message) for warning in caught) == 1
