"""What scvi.autotune is given: a constructor that takes its flag, embeddings of the weights that are kept, metrics."""

import inspect

import numpy as np
import pytest
from lightning.pytorch.callbacks import Callback
from torch import nn

import epivi
from epivi._errors import ConfigError
from epivi.train.plan import TrainingPlan
from epivi.train.schedules import Annealing, LearningRate
from epivi.train.tuning import FLAG, takes_flag

MODELS = ["SAILER", "SAILERX", "ConvNetVAE", "FCVAE", "CANDI", "EpiFoundation", "Expresser"]
TRAIN = {"enable_progress_bar": False, "accelerator": "cpu", "devices": 1}


class Reader(Callback):
    """Reads what the callbacks of scvi.autotune read, at the same moments."""

    def __init__(self):
        self.at_end, self.at_validation, self.losses, self.modes = None, [], [], []

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.losses.append(float(trainer.callback_metrics["validation_loss"]))
            self.at_validation.append(pl_module._validation_epoch_outputs)

    def on_train_end(self, trainer, pl_module):
        before = pl_module.module.training
        self.at_end = pl_module._training_epoch_outputs
        self.modes.append((before, pl_module.module.training))


@pytest.fixture
def adata():
    adata = epivi.simulate.accessibility([40, 40, 40], n_fg=200, n_bg=200, median=150, clip=(50, 500), seed=0)
    epivi.SAILER.setup_anndata(adata, batch_key="batch", labels_key="cell_type")
    return adata


def test_a_constructor_keeps_its_face():
    class Model:
        @takes_flag
        def __init__(self, width, *, depth=1):
            """Say something."""
            self.width, self.depth = width, depth

    model = Model(3, depth=2, extra_payload_autotune=True)
    assert (model.width, model.depth) == (3, 2)
    assert list(inspect.signature(Model).parameters) == ["width", "depth"]
    assert Model.__init__.__doc__ == "Say something."
    with pytest.raises(TypeError, match="unexpected keyword argument 'other'"):
        Model(3, other=1)


@pytest.mark.parametrize("name", MODELS)
def test_no_model_shows_the_flag_and_all_take_it(name):
    model = getattr(epivi, name)
    assert FLAG not in inspect.signature(model).parameters
    assert "seed" in inspect.signature(model).parameters
    # the flag is gone before anything else is looked at
    with pytest.raises(ConfigError, match=f"{name} needs data"):
        model(extra_payload_autotune=True)


@pytest.mark.filterwarnings("ignore:Trying to query inferred values")
def test_the_flag_is_not_stored(adata, tmp_path):
    model = epivi.SAILER(adata, n_latent=3, seed=1, extra_payload_autotune=True)
    assert FLAG not in model.init_arguments
    model.save(tmp_path / "model")
    loaded = epivi.SAILER.load(tmp_path / "model", adata)
    np.testing.assert_array_equal(loaded.get_latent_representation(), model.get_latent_representation())


@pytest.mark.filterwarnings("ignore:Trying to query inferred values")
def test_embeddings_are_those_of_the_trained_model(adata):
    reader = Reader()
    model = epivi.SAILER(adata, n_latent=3, seed=1)
    model.train(max_epochs=4, early_stopping=True, lr=0.05, callbacks=[reader], **TRAIN)
    rows = model.train_indices
    np.testing.assert_array_equal(reader.at_end["z"].numpy(), model.get_latent_representation(indices=rows))
    for key, column in (("batch", "batch"), ("labels", "cell_type")):
        codes = adata.obs[column].astype("category").cat.codes.to_numpy()[rows]
        np.testing.assert_array_equal(reader.at_end[key].numpy(), codes)
    assert len(reader.at_validation[-1]["z"]) == len(model.validation_indices)
    np.testing.assert_allclose(reader.losses, model.history["validation_loss"].to_numpy().ravel(), rtol=1e-6)
    assert reader.modes == [(True, True)]


def test_reading_changes_no_weights(adata):
    found = []
    for callbacks in ([Reader()], []):
        model = epivi.SAILER(adata, n_latent=3, seed=1)
        model.train(max_epochs=3, callbacks=callbacks, **TRAIN)
        found.append(model.get_latent_representation())
    np.testing.assert_array_equal(*found)


def test_scores_need_labels(adata):
    bare = adata.copy()
    epivi.SAILER.setup_anndata(bare)
    model = epivi.SAILER(bare, n_latent=3)
    with pytest.raises(ConfigError, match="scIB need cell types: give labels_key to the setup of SAILER"):
        model.train(max_epochs=1, callbacks=[Reader()], **TRAIN)


def test_a_plan_without_model_has_no_embeddings():
    plan = TrainingPlan(
        nn.Linear(1, 1),
        annealing=Annealing(steps_per_epoch=1, max_epochs=1),
        learning_rate=LearningRate(lr=1e-3, steps_per_epoch=1, max_epochs=1),
    )
    with pytest.raises(ConfigError, match="knows no model"):
        _ = plan._embeddings("training")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["SAILER", "EpiFoundation"])
def test_run_autotune(name, tmp_path, monkeypatch):
    """The search of the how-to page, two trials."""
    pytest.importorskip("hyperopt", reason="scvi.autotune needs hyperopt: uv sync --group benchmark")
    ray = pytest.importorskip("ray", reason="scvi.autotune needs ray: uv sync --group benchmark")
    from ray import tune
    from scvi.autotune import run_autotune

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # at the default the trials wait for everything else
    small = {"n_fg": 200, "n_bg": 200, "median": 150, "clip": (50, 500)}
    if name == "SAILER":
        data = epivi.simulate.accessibility([40, 40, 40], seed=0, **small)
        epivi.SAILER.setup_anndata(data, labels_key="cell_type")
        space = {"n_latent": tune.choice([3, 8])}
    else:
        data = epivi.simulate.multiome([40, 40, 40], seed=0, atac_kwargs=small, n_genes=50)
        epivi.EpiFoundation.setup_mudata(data, labels_key="cell_type")
        space = {"size": "test", "seed": tune.choice([0, 1])}
    try:
        found = run_autotune(
            getattr(epivi, name),
            data,
            metrics="Silhouette label",
            mode="max",
            search_space={"model_params": space, "train_params": {"max_epochs": 2, "accelerator": "cpu"}},
            num_samples=2,
            scheduler="fifo",
            searcher="random",
            seed=1,
            resources={"cpu": 1},
            solver="randomized",
            logging_dir=str(tmp_path),
        )
        scores = [result.metrics["Silhouette label"] for result in found.result_grid]
        assert not found.result_grid.errors
        assert len(scores) == 2
        assert all(0 <= score <= 1 for score in scores)
    finally:
        ray.shutdown()
