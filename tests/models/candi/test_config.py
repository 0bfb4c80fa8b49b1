from __future__ import annotations

import json

import pytest

from epivi._errors import ConfigError
from epivi.models.candi.config import SIZES, CandiConfig
from epivi.train.config import TrainingConfig

BAD = {
    "n_bins": (100, "n_bins=100 is not a multiple of 2\\^n_stages = 8. Take 96 or 104"),
    "n_stages": (0, "n_stages=0"),
    "expansion": (1.5, "expansion=1.5"),
    "n_heads": (0, "n_heads=0"),
    "n_layers": (0, "n_layers=0"),
    "bin_size_bp": (0, "bin_size_bp=0"),
    "dropout_rate": (1.0, "below 1"),
    "head": ("papr", "Did you mean 'paper'"),
    "dispersion": ("assay_bin", "Did you mean 'assay-bin'"),
    "position": ("bais", "Did you mean 'bias'"),
    "max_distance": (0, "max_distance=0"),
    "upsampling": ("transpose", "Did you mean 'transposed'"),
    "missing": ("literals", "Did you mean 'literal'"),
    "squeeze_excitation": (2, "squeeze_excitation=2"),
    "locus_prior": ("yes", "locus_prior='yes'"),
    "skip": (None, "skip=None"),
    "input": ("count", "Did you mean 'counts'"),
    "thin_each_assay": (1, "thin_each_assay=1"),
    "hide_all_rate": (1.5, "at most 1"),
    "loss_weighting": ("equals", "Did you mean 'equal'"),
}


@pytest.mark.parametrize("name", BAD)
def test_values_outside_their_range_are_named(name):
    value, match = BAD[name]
    with pytest.raises(ConfigError, match=match):
        CandiConfig(**{name: value})


@pytest.mark.parametrize("thinning", [(), 2, "124"])
def test_thinning_is_a_list_of_factors(thinning):
    with pytest.raises(ConfigError, match="thinning must be one factor or more"):
        CandiConfig(thinning=thinning)
    with pytest.raises(ConfigError, match="thinning=0"):
        CandiConfig(thinning=(1, 0))


def test_a_window_shorter_than_a_latent_position_is_refused():
    with pytest.raises(ConfigError, match=r"n_bins=5 is not a multiple of 2\^n_stages = 8. Take 8 or 8"):
        CandiConfig(n_bins=5)


def test_the_paper_head_has_no_place_for_a_prior():
    with pytest.raises(ConfigError, match="head='paper' normalises over assays and cannot start from a prior"):
        CandiConfig(head="paper", locus_prior=True)
    assert CandiConfig().has_depth_offset
    assert not CandiConfig(head="paper").has_depth_offset


def test_unknown_sizes_and_choices_name_the_nearest():
    with pytest.raises(ConfigError, match=r"size='papr' is not valid. Did you mean 'paper'"):
        CandiConfig.chosen({}, size="papr")
    with pytest.raises(ConfigError, match=r"CANDI has no choice 'n_head'. Did you mean 'n_heads'"):
        CandiConfig.chosen({"n_head": 2})


@pytest.mark.parametrize("size", SIZES)
def test_every_choice_of_a_size_can_be_made_differently(size):
    assert CandiConfig.chosen({"n_layers": None, "head": None}, size=size) == CandiConfig(**SIZES[size])
    other = {"n_bins": 800, "n_layers": 3, "upsampling": "nearest", "max_distance": 5}
    found = CandiConfig.chosen(other, size=size).summary()
    assert {name: found[name] for name in other} == other


def test_the_width_is_a_multiple_of_the_heads():
    assert CandiConfig.chosen({}, size="pilot").width(5) == 135
    with pytest.raises(ConfigError, match=r"n_heads=5 does not divide the width 64 = 8 assays x 2\^3. .*: 1, 2, 4, 8"):
        CandiConfig(n_heads=5).width(8)


@pytest.mark.parametrize(
    ("size", "n_assays", "channels"),
    [
        ("paper", 35, (4, 12, 36, 106, 317, 945)),
        ("tutorial", 8, (4, 7, 12, 21, 37, 64)),
        ("test", 6, (4, 6, 10, 15, 24)),
    ],
)
def test_channels_of_the_dna_are_those_of_the_table(size, n_assays, channels):
    assert CandiConfig.chosen({}, size=size).dna_channels(n_assays) == channels


@pytest.mark.parametrize(("bin_size_bp", "factors"), [(25, (5, 5)), (200, (10, 20)), (7, (1, 7)), (1, (1, 1))])
def test_pools_of_the_dna_lead_from_base_pairs_to_latent_positions(bin_size_bp, factors):
    config = CandiConfig(bin_size_bp=bin_size_bp)
    assert config.dna_pools == (2, 2, 2, *factors)
    assert config.window_bp == config.n_positions * config.scale * bin_size_bp == 240 * bin_size_bp


def test_a_summary_gives_the_same_configuration_through_json_too():
    config = CandiConfig(n_bins=400, locus_prior=True, max_distance=3, thinning=(1, 8))
    assert CandiConfig(**config.summary()) == config
    assert CandiConfig(**json.loads(json.dumps(config.summary()))) == config
    assert hash(config) == hash(CandiConfig(**json.loads(json.dumps(config.summary()))))


def test_training_starts_from_the_choices_of_the_specification():
    found = CandiConfig().training_defaults(100)
    assert (found["optimizer"], found["lr"], found["batch_size"], found["max_epochs"]) == ("AdamW", 3e-4, 32, 20)
    assert (found["weight_decay"], found["gradient_clip_norm"], found["lr_warmup_share"]) == (0.01, 1.0, 0.05)
    assert found["lr_schedule"] == "cosine"
    assert set(found) <= set(TrainingConfig.__dataclass_fields__)
