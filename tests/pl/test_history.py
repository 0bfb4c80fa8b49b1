"""What the curves of a training history show."""

from types import SimpleNamespace

import matplotlib as mpl

mpl.use("Agg")

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt

from epivi import pl
from epivi._errors import ConfigError, DataError


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def frame(name, values, index=None):
    return pd.DataFrame({name: values}, index=pd.Index(range(len(values)) if index is None else index, name="epoch"))


RECORDED = {
    "train_loss_step": frame("train_loss_step", [9.0, 8.0, 7.0, 6.0]),
    "kl_weight": frame("kl_weight", [0.0, 0.5, 1.0]),
    "elbo_train": frame("elbo_train", [5.0, 4.0, 3.0]),
    "elbo_validation": frame("elbo_validation", [6.0, 4.5], index=[0, 2]),
}


def drawn(ax):
    return {line.get_label(): (line.get_xdata().tolist(), line.get_ydata().tolist()) for line in ax.lines}


def test_training_and_validation_loss_by_default():
    ax = pl.history(SimpleNamespace(history=RECORDED))
    assert drawn(ax) == {
        "elbo_train": ([0, 1, 2], [5.0, 4.0, 3.0]),
        "elbo_validation": ([0, 2], [6.0, 4.5]),
    }
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["elbo_train", "elbo_validation"]
    assert ax.get_xlabel() == "epoch"


def test_keys_are_drawn_in_the_order_given_on_the_given_axes():
    _, ax = plt.subplots()
    assert pl.history(RECORDED, keys=["kl_weight", "elbo_train"], ax=ax) is ax
    assert list(drawn(ax)) == ["kl_weight", "elbo_train"]


def test_one_key_names_the_axis():
    ax = pl.history(RECORDED, keys="train_loss_step")
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_legend()) == ("step", "train_loss_step", None)


def test_everything_by_epoch_where_no_loss_was_recorded():
    ax = pl.history({key: RECORDED[key] for key in ("train_loss_step", "kl_weight")})
    assert list(drawn(ax)) == ["kl_weight"]


def test_plain_sequences_and_object_columns_are_read():
    ax = pl.history({"a": [1, 2], "b": pd.DataFrame({"b": np.array([3.0, 4.0], dtype=object)})})
    assert drawn(ax) == {"a": ([0, 1], [1.0, 2.0]), "b": ([0, 1], [3.0, 4.0])}


def test_a_single_epoch_is_a_visible_point():
    (line,) = pl.history({"elbo_train": frame("elbo_train", [2.0])}).lines
    assert line.get_marker() == "."


@pytest.mark.parametrize(
    ("error", "model", "keys", "message"),
    [
        (DataError, SimpleNamespace(history=None), None, "SimpleNamespace has no training history: train the model"),
        (DataError, {}, None, "dict has no training history"),
        (ConfigError, RECORDED, ["elbo_trian"], "'elbo_trian' was not recorded. Did you mean 'elbo_train'"),
        (ConfigError, RECORDED, [], "keys is empty"),
        (DataError, {"a": pd.DataFrame({"x": [1, 2], "y": [3, 4]})}, None, r"history of 'a' has shape \(2, 2\)"),
        (DataError, {"a": ["low", "high"]}, None, "history of 'a' cannot be read as numbers"),
    ],
)
def test_bad_input_is_refused(error, model, keys, message):
    with pytest.raises(error, match=message):
        pl.history(model, keys=keys)
