from __future__ import annotations

import logging
import re
import signal
import warnings

import mudata as md
import numpy as np
import pandas as pd
import pytest

import epivi
from epivi.cli import main
from epivi.train.plan import TrainingPlan

SMALL = ["--n-latent", "2", "--max-epochs", "2", "--batch-size", "16", "--accelerator", "cpu"]


@pytest.fixture(scope="module")
def multiome():
    """Three types, all cells with RNA."""
    atac = {"n_fg": 120, "n_bg": 80, "median": 60, "clip": (20, 200)}
    return epivi.simulate.multiome([24, 24, 16], n_genes=60, rna_dims=6, n_atac_only=6, atac_kwargs=atac, seed=1)


@pytest.fixture(scope="module")
def tracks():
    """Two types, two batches, two modalities of which some cells lack the second."""
    settings = {
        "n_bins": 60,
        "n_modalities": 2,
        "n_types": 2,
        "n_batches": 2,
        "batch_shift": 0.5,
        "missing": {"ATAC": 0.3},
    }
    return {name: epivi.simulate.tracks(48, as_mudata=name == "h5mu", seed=1, **settings) for name in ("h5ad", "h5mu")}


@pytest.fixture(scope="module")
def files(multiome, tracks, tmp_path_factory):
    """Good and bad files."""
    folder = tmp_path_factory.mktemp("files")
    labelled = multiome.copy()
    labelled.obs["has_one"] = "x"
    labelled.write(folder / "good.h5mu")
    multiome.mod["atac"].write(folder / "good.h5ad")
    whole = (folder / "good.h5mu").read_bytes()
    for name, raw in {
        "random": np.random.default_rng(0).bytes(5000),
        "cut": whole[: len(whole) // 2],
        "head": whole[:100],
        "empty": b"",
        "text": b"cells,peaks\n",
    }.items():
        (folder / f"{name}.h5mu").write_bytes(raw)
        (folder / f"{name}.h5ad").write_bytes(raw)
    damaged = bytearray((folder / "good.h5ad").read_bytes())
    for at in range(2000, len(damaged), 500):
        damaged[at] ^= 255
    (folder / "damaged.h5ad").write_bytes(damaged)
    (folder / "wrong.h5ad").write_bytes(whole)
    (folder / "wrong.h5mu").write_bytes((folder / "good.h5ad").read_bytes())
    (folder / "cells.csv").write_text("a,b\n")
    (folder / "folder.h5ad").mkdir()
    logs = multiome.mod["atac"].copy()
    logs.X = logs.X.log1p()
    logs.write(folder / "logs.h5ad")
    one = md.MuData({"other": multiome.mod["atac"].copy(), "third": multiome.mod["rna"].copy()})
    one.write(folder / "others.h5mu")
    unlabelled = multiome.copy()
    unlabelled.obs = unlabelled.obs[[]]
    unlabelled.write(folder / "unlabelled.h5mu")
    for ending, data in tracks.items():
        data.write(folder / f"tracks.{ending}")
    halves, undescribed = tracks["h5ad"].copy(), tracks["h5ad"].copy()
    halves.obsm["tracks"] = halves.obsm["tracks"] * 0.5
    halves.write(folder / "halves.h5ad")
    del undescribed.uns["tracks"]
    undescribed.write(folder / "undescribed.h5ad")
    return folder


def tree(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# words: what the only line of the error stream must hold
BAD = {
    "nothing": ([], "required: command"),
    "unknown command": (["fti"], "invalid choice: 'fti'"),
    "no model": (["fit"], "required: model, file, --out"),
    "unknown model": (["fit", "sayler", "{in}/good.h5ad", "--out", "{out}"], "invalid choice: 'sayler'"),
    "no out": (["fit", "sailer", "{in}/good.h5ad"], "required: --out"),
    "unknown option": (
        ["fit", "sailer", "{in}/good.h5ad", "--out", "{out}", "--deep"],
        "unrecognized arguments: --deep",
    ),
    "number in words": (["fit", "sailer", "{in}/good.h5ad", "--out", "{out}", "--max-epochs", "ten"], "invalid int"),
    "missing file": (["fit", "sailer", "{in}/nothing.h5ad", "--out", "{out}"], "nothing.h5ad does not exist"),
    "a folder": (["fit", "sailer", "{in}/folder.h5ad", "--out", "{out}"], "is no file"),
    "wrong ending": (["fit", "sailer", "{in}/cells.csv", "--out", "{out}"], "must be .h5ad or .h5mu"),
    "random bytes": (["fit", "sailer", "{in}/random.h5ad", "--out", "{out}"], "random.h5ad cannot be read"),
    "cut": (["fit", "sailerx", "{in}/cut.h5mu", "--out", "{out}"], "cut.h5mu cannot be read"),
    "head alone": (["fit", "sailerx", "{in}/head.h5mu", "--out", "{out}"], "head.h5mu cannot be read"),
    "empty": (["fit", "sailerx", "{in}/empty.h5mu", "--out", "{out}"], "empty.h5mu cannot be read"),
    "text": (["fit", "sailer", "{in}/text.h5ad", "--out", "{out}"], "text.h5ad cannot be read"),
    "damaged": (["fit", "sailer", "{in}/damaged.h5ad", "--out", "{out}"], "damaged.h5ad cannot be read"),
    "MuData as h5ad": (["fit", "sailer", "{in}/wrong.h5ad", "--out", "{out}"], "wrong.h5ad"),
    "AnnData as h5mu": (["fit", "sailerx", "{in}/wrong.h5mu", "--out", "{out}"], "wrong.h5mu"),
    "AnnData to sailerx": (["fit", "sailerx", "{in}/good.h5ad", "--out", "{out}"], "sailerx needs a MuData"),
    "no usual modality": (["fit", "sailer", "{in}/others.h5mu", "--out", "{out}"], "name one with --atac"),
    "unknown modality": (["fit", "sailerx", "{in}/good.h5mu", "--out", "{out}", "--atac", "atc"], "--atac atc"),
    "one modality twice": (
        ["fit", "sailerx", "{in}/good.h5mu", "--out", "{out}", "--atac", "rna"],
        "names 'rna' twice",
    ),
    "unknown batch": (
        ["fit", "sailer", "{in}/good.h5ad", "--out", "{out}", "--batch-key", "bacth"],
        "Did you mean 'batch'",
    ),
    "unknown layer": (["fit", "sailer", "{in}/good.h5ad", "--out", "{out}", "--layer", "raw"], "no entry 'raw'"),
    "unknown reference": (
        ["fit", "sailerx", "{in}/good.h5mu", "--out", "{out}", "--reference-key", "X_pcs"],
        "Did you mean 'X_pca'",
    ),
    "unknown encoder": (
        ["fit", "sailer", "{in}/good.h5ad", "--out", "{out}", "--encoder", "dens"],
        "Did you mean 'dense'",
    ),
    "no epochs": (["fit", "sailer", "{in}/good.h5ad", "--out", "{out}", "--max-epochs", "0"], "max_epochs=0"),
    "small batches": (["fit", "sailer", "{in}/good.h5ad", "--out", "{out}", "--batch-size", "1"], "batch_size=1"),
    "learning rate": (["fit", "sailer", "{in}/good.h5ad", "--out", "{out}", "--lr", "-1"], "lr=-1.0"),
    "no steps": (["fit", "sailer", "{in}/good.h5ad", "--out", "{out}", "--save-every-n-steps", "0"], "at least 1"),
    "no latent": (["fit", "sailer", "{in}/good.h5ad", "--out", "{out}", "--n-latent", "0"], "n_latent=0"),
    "seed": (["fit", "sailer", "{in}/good.h5ad", "--out", "{out}", "--seed", "-1"], "seed=-1"),
    "accelerator": (["fit", "sailer", "{in}/good.h5ad", "--out", "{out}", "--accelerator", "gpuu"], "'gpuu'"),
    "log-normalised": (["fit", "sailer", "{in}/logs.h5ad", "--out", "{out}"], "not a whole number"),
    "out is a file": (["fit", "sailer", "{in}/good.h5ad", "--out", "{in}/cells.csv"], "cells.csv' is a file"),
    "out below a file": (["fit", "sailer", "{in}/good.h5ad", "--out", "{in}/cells.csv/x"], "cells.csv' is a file"),
    "encoder of tracks": (
        ["fit", "convnetvae", "{in}/tracks.h5ad", "--out", "{out}", "--encoder", "auto"],
        "--encoder is no option of convnetvae, which has --tracks-key, --modalities",
    ),
    "kernel of experts": (
        ["fit", "fcvae", "{in}/tracks.h5ad", "--out", "{out}", "--kernel-size", "5"],
        "--kernel-size is no option of fcvae",
    ),
    "tracks of sailer": (
        ["fit", "sailer", "{in}/good.h5ad", "--out", "{out}", "--tracks-key", "tracks"],
        "--tracks-key is no option of sailer",
    ),
    "RNA of sailer": (["fit", "sailer", "{in}/good.h5mu", "--out", "{out}", "--rna", "rna"], "--rna is no option of"),
    "stride above kernel": (
        ["fit", "convnetvae", "{in}/nothing.h5ad", "--out", "{out}", "--kernel-size", "5", "--stride", "6"],
        "kernel_size (5) is smaller than stride (6)",
    ),
    "likelihood": (
        ["fit", "fcvae", "{in}/nothing.h5ad", "--out", "{out}", "--likelihood", "poison"],
        "Did you mean 'poisson'",
    ),
    "no tracks": (["fit", "convnetvae", "{in}/good.h5ad", "--out", "{out}"], "no entry 'tracks'"),
    "other tracks": (
        ["fit", "convnetvae", "{in}/tracks.h5ad", "--out", "{out}", "--tracks-key", "track"],
        "Did you mean 'tracks'",
    ),
    "tracks without bins": (["fit", "fcvae", "{in}/undescribed.h5ad", "--out", "{out}"], "adata.uns"),
    "halves": (["fit", "convnetvae", "{in}/halves.h5ad", "--out", "{out}"], "not a whole number"),
    "unknown mark": (
        ["fit", "convnetvae", "{in}/tracks.h5mu", "--out", "{out}", "--modalities", "H3K27ac", "ATACC"],
        "Did you mean 'ATAC'",
    ),
    "mark twice": (
        ["fit", "fcvae", "{in}/tracks.h5mu", "--out", "{out}", "--modalities", "ATAC", "ATAC"],
        "'ATAC' twice",
    ),
    "modalities of an AnnData": (
        ["fit", "fcvae", "{in}/tracks.h5ad", "--out", "{out}", "--modalities", "ATAC"],
        "tracks.h5ad holds an AnnData (its obsm is read: --tracks-key)",
    ),
    "array of a MuData": (
        ["fit", "fcvae", "{in}/tracks.h5mu", "--out", "{out}", "--tracks-key", "tracks"],
        "tracks.h5mu holds a MuData (its modalities are read)",
    ),
    "peaks and genes as tracks": (["fit", "convnetvae", "{in}/good.h5mu", "--out", "{out}"], "mdata['rna']"),
    "tracks: batch": (
        ["fit", "convnetvae", "{in}/tracks.h5mu", "--out", "{out}", "--batch-key", "bacth"],
        "Did you mean 'batch'",
    ),
    "tracks: seed": (["fit", "fcvae", "{in}/tracks.h5ad", "--out", "{out}", "--seed", "-1"], "seed=-1"),
    "tracks: cut": (["fit", "convnetvae", "{in}/cut.h5mu", "--out", "{out}"], "cut.h5mu cannot be read"),
    "demo: missing file": (["demo", "--data", "{in}/nothing.h5mu", "--out", "{out}"], "does not exist"),
    "demo: random bytes": (["demo", "--data", "{in}/random.h5mu", "--out", "{out}"], "cannot be read"),
    "demo: AnnData": (["demo", "--data", "{in}/good.h5ad", "--out", "{out}"], "needs a MuData"),
    "demo: out is a file": (["demo", "--data", "{in}/good.h5mu", "--out", "{in}/cells.csv"], "is a file"),
    "demo: modality": (["demo", "--data", "{in}/good.h5mu", "--out", "{out}", "--rna", "gex"], "--rna gex"),
    "demo: one label": (
        ["demo", "--data", "{in}/good.h5mu", "--out", "{out}", "--labels-key", "has_one"],
        "'has_one'] has 1 types",
    ),
    "demo: labels": (["demo", "--data", "{in}/good.h5mu", "--out", "{out}", "--labels-key", "typ"], "--labels-key typ"),
    "demo: no labels": (["demo", "--data", "{in}/unlabelled.h5mu", "--out", "{out}"], "name it with --labels-key"),
    "demo: batch": (["demo", "--data", "{in}/good.h5mu", "--out", "{out}", "--batch-key", "lib"], "--batch-key lib"),
    "demo: epochs": (["demo", "--data", "{in}/good.h5mu", "--out", "{out}", "--max-epochs", "0"], "max_epochs=0"),
    "demo: seed": (["demo", "--data", "{in}/good.h5mu", "--out", "{out}", "--seed", "-1"], "seed"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_done_is_said_in_one_line(name, files, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("epivi.models.base_training._fit", lambda *args: pytest.fail("training started"))
    monkeypatch.chdir(tmp_path)
    arguments, words = BAD[name]
    before = tree(tmp_path), tree(files)
    code = main([word.format(**{"in": files, "out": tmp_path / "out"}) for word in arguments])
    printed = capsys.readouterr()
    # what a setup chose by itself may have been logged before
    lines = [line for line in printed.err.splitlines() if not line.startswith("INFO: ")]
    assert code == 2, printed.err
    assert len(lines) == 1
    assert lines[0].startswith("epivi: error: ")
    assert words in lines[0]
    assert (tree(tmp_path), tree(files)) == before
    assert not (tmp_path / "out").exists()


def test_help_is_no_error(capsys):
    with pytest.raises(SystemExit) as caught:
        main(["fit", "--help"])
    assert caught.value.code == 0
    assert "--save-every-n-steps" in capsys.readouterr().out


def test_doctor_prints_versions_and_devices(capsys):
    assert main(["doctor"]) == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    assert f"epivi {epivi.__version__}\n" in printed.out
    for name in ("python 3.", "torch 2.", "scvi-tools 1.", "anndata 0.", "CPU threads", "CUDA devices"):
        assert name in printed.out


def test_doctor_names_what_is_missing(capsys, monkeypatch):
    monkeypatch.setattr("epivi.cli.PACKAGES", ("epivi", "no-such-package"))
    assert main(["doctor"]) == 0
    assert "no-such-package not installed" in capsys.readouterr().out


def test_logging_and_warnings_stay_as_they_were():
    logger = logging.getLogger("epivi")
    before = logger.level, list(logger.handlers), list(logging.getLogger().handlers), list(warnings.filters)
    main(["doctor"])
    main(["fit", "sailer", "nothing.h5ad", "--out", "x"])
    after = logger.level, list(logger.handlers), list(logging.getLogger().handlers), list(warnings.filters)
    assert after == before


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("sailer", "good.h5ad"),
        ("sailerx", "good.h5mu"),
        ("convnetvae", "tracks.h5ad"),
        ("convnetvae", "tracks.h5mu"),
        ("fcvae", "tracks.h5mu"),
    ],
)
def test_fit_writes_model_latent_and_history_once(model, name, files, multiome, tracks, capsys, tmp_path):
    arguments = ["fit", model, str(files / name), "--out", str(tmp_path / "out"), "--batch-key", "batch", *SMALL]
    assert main(arguments) == 0
    assert "Wrote" in capsys.readouterr().out
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == ["history.csv", "latent.csv", "model"]
    kinds = {"sailer": epivi.SAILER, "sailerx": epivi.SAILERX, "convnetvae": epivi.ConvNetVAE, "fcvae": epivi.FCVAE}
    data = tracks[name.split(".")[1]] if "tracks" in name else multiome.mod["atac"] if model == "sailer" else multiome
    data = data.copy()
    loaded = kinds[model].load(out / "model", data)
    assert loaded.summary_stats.n_batch == 2
    latent = pd.read_csv(out / "latent.csv", index_col=0)
    assert latent.index.tolist() == data.obs_names.tolist()
    assert latent.columns.tolist() == ["latent_0", "latent_1"]
    np.testing.assert_allclose(latent.to_numpy(), loaded.get_latent_representation(), rtol=1e-5, atol=1e-7)
    history = pd.read_csv(out / "history.csv", index_col="epoch")
    assert history.index.tolist() == [0, 1]
    assert {"train_loss", "kl_weight", "elbo_train"} <= set(history)
    before = tree(out)
    assert main(arguments) == 0
    assert "is finished" in capsys.readouterr().out
    # nor does an error touch what is there
    assert main(["fit", model, str(files / "random.h5ad"), "--out", str(out)]) == 2
    assert main([*arguments[:-2], "--accelerator", "gpuu"]) == 2
    assert tree(out) == before


def test_fit_hands_the_options_of_tracks_on(files, tmp_path):
    out = tmp_path / "out"
    chosen = ["--kernel-size", "5", "--stride", "4", "--n-layers", "2", "--likelihood", "nb", "--seed", "7"]
    chosen += ["--modalities", "ATAC", "H3K27ac"]
    assert main(["fit", "convnetvae", str(files / "tracks.h5mu"), "--out", str(out), *chosen, *SMALL]) == 0
    model = epivi.ConvNetVAE.load(out / "model", adata=False)
    assert (model.config.kernel_size, model.config.stride, model.config.n_layers) == (5, 4, 2)
    assert (model.config.likelihood, model.config.n_latent, model.seed) == ("nb", 2, 7)
    assert model.layout.channels == ("ATAC", "H3K27ac")


def test_fit_takes_a_modality_of_a_multiome(files, tmp_path):
    out = tmp_path / "out"
    assert main(["fit", "sailer", str(files / "others.h5mu"), "--atac", "other", "--out", str(out), *SMALL]) == 0
    assert epivi.SAILER.load(out / "model", adata=False).config.n_latent == 2


def test_something_else_in_the_place_of_the_model_is_kept(files, capsys, tmp_path):
    (tmp_path / "out" / "model").mkdir(parents=True)
    (tmp_path / "out" / "model" / "notes.txt").write_text("mine")
    before = tree(tmp_path)
    assert main(["fit", "sailer", str(files / "good.h5ad"), "--out", str(tmp_path / "out"), *SMALL]) == 2
    assert "is no model of epivi" in capsys.readouterr().err
    assert tree(tmp_path) == before


@pytest.mark.parametrize(("model", "name"), [("sailer", "good.h5ad"), ("convnetvae", "tracks.h5mu")])
def test_an_interrupted_fit_goes_on_by_itself(model, name, files, capsys, tmp_path, monkeypatch):
    arguments = ["fit", model, str(files / name), *SMALL, "--max-epochs", "4", "--save-every-n-steps", "1"]
    assert main([*arguments, "--out", str(tmp_path / "whole")]) == 0
    before = TrainingPlan.on_train_batch_end
    with monkeypatch.context() as patch:

        def press(plan, *args):
            before(plan, *args)
            if plan.step == 6:
                signal.raise_signal(signal.SIGINT)

        patch.setattr(TrainingPlan, "on_train_batch_end", press)
        capsys.readouterr()
        assert main([*arguments, "--out", str(tmp_path / "out")]) == 130
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("epivi: interrupted. The run is kept in ")
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["run"]
    steps = []
    monkeypatch.setattr(
        TrainingPlan, "on_train_batch_end", lambda plan, *a: (steps.append(plan.step), before(plan, *a))
    )
    # other arguments do not fit the run that was begun
    assert main([*arguments, "--out", str(tmp_path / "out"), "--lr", "0.5"]) == 2
    assert re.search(r"lr: 0\.\d+ then, 0\.5 now", capsys.readouterr().err)
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 0
    assert steps[0] == 7
    weights = [tmp_path / name / "model" / "weights.safetensors" for name in ("whole", "out")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    for name in ("latent.csv", "history.csv"):
        assert (tmp_path / "whole" / name).read_text() == (tmp_path / "out" / name).read_text()


def test_a_loss_that_is_not_finite_ends_with_code_3(files, capsys, tmp_path):
    arguments = ["fit", "sailer", str(files / "good.h5ad"), "--out", str(tmp_path / "out"), *SMALL]
    assert main([*arguments, "--lr", "1e30", "--max-epochs", "20"]) == 3
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("epivi: error: The ")
    assert "not finite" in line
    assert not (tmp_path / "out" / "model").exists()


@pytest.mark.filterwarnings("ignore")
def test_demo_on_a_file_writes_data_table_and_picture(files, multiome, capsys, tmp_path):
    out = tmp_path / "out"
    assert main(["demo", "--data", str(files / "good.h5mu"), "--out", str(out), "--max-epochs", "2"]) == 0
    printed = capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == ["demo.h5mu", "metrics.csv", "metrics.md", "umap.png"]
    table = pd.read_csv(out / "metrics.csv", index_col=0)
    assert table.index[:3].tolist() == ["LSI of ATAC", "PCA of RNA", "SAILERX"]
    assert table.loc["SAILERX", "cells"] == multiome.n_obs
    # six cells without RNA have too few neighbours to be judged by themselves
    assert len(table) == 3
    assert table["ari"].between(-1, 1).all()
    assert "LSI of ATAC" in printed
    written = md.read_h5mu(out / "demo.h5mu")
    assert written.obsm["X_sailerx"].shape == (multiome.n_obs, 50)
    assert written.obsm["X_umap"].shape == (multiome.n_obs, 2)
    assert (out / "umap.png").read_bytes()[:4] == b"\x89PNG"
    assert (out / "metrics.md").read_text().count("\n") == len(table) + 2
    before = tree(out)
    assert main(["demo", "--data", str(files / "cut.h5mu"), "--out", str(out)]) == 2
    assert main(["demo", "--data", str(files / "good.h5mu"), "--out", str(out), "--max-epochs", "0"]) == 2
    assert tree(out) == before
