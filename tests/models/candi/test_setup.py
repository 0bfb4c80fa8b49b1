from __future__ import annotations

import logging

import anndata as ad
import numpy as np
import pandas as pd
import pytest

import epivi
from epivi._errors import ConfigError, DataError


def noise(data, key):
    data.obsm["counts"] = data.obsm["counts"].astype(np.float32)
    data.obsm[key][1, 2, 30] = np.nan


def no_assay(data):
    data.obsm["availability"][3] = False


def unequal(data):
    data.uns["bins"].loc[5, "end"] -= 1


REFUSED = [
    (lambda d: d.obsm.update(counts=d.obsm["counts"][:, :, :-1]), r"obsm\['counts'\] has the shape \(5, 4, 1039\)"),
    (lambda d: d.obsm.update(signal=d.obsm["signal"][:, :, :-1]), r"obsm\['signal'\] has the shape \(5, 4, 1039\)"),
    (lambda d: noise(d, "counts"), r"obsm\['counts'\] is nan for biosample 'biosample_1', assay 'H3K4me3', bin 30"),
    (lambda d: noise(d, "signal"), r"obsm\['signal'\] is nan for biosample 'biosample_1', assay 'H3K4me3', bin 30"),
    (no_assay, r"1 of 5 biosamples of adata have no available assay: 'biosample_3'"),
    (unequal, "bin 5 .* is 24 bp wide"),
    (lambda d: d.uns.update(dna=np.zeros(7, np.uint8)), r"uns\['dna'\] has the shape \(7,\), needed is \(26000,\)"),
    (lambda d: d.uns.pop("bins"), "bins"),
    (lambda d: [d.obsm.pop("counts"), d.obsm.pop("signal")], "neither counts nor signal"),
    (lambda d: d.obsm.update(depth=-d.obsm["depth"]), r"obsm\['depth'\] is -.* A depth is a number of reads"),
    (lambda d: d.obsm.update(run_type=d.obsm["run_type"] + 5), r"obsm\['run_type'\] is .* Codes go from 0 to 1"),
]


@pytest.mark.parametrize(("spoil", "match"), REFUSED)
def test_unfit_data_are_refused(adata, spoil, match):
    spoil(adata)
    with pytest.raises(DataError, match=match):
        epivi.CANDI.setup_anndata(adata)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"counts_key": "count"}, DataError, "count"),
        ({"counts_key": None, "signal_key": None}, ConfigError, "at least one of them is needed"),
        ({"covariates_key": ["depht"]}, DataError, "depht"),
        ({"split_key": "split"}, DataError, "split"),
        ({"validation_chroms": ["chr9"]}, ConfigError, "validation_chroms names 'chr9'"),
        ({"test_chroms": "chr1"}, ConfigError, "give a list of names of chromosomes"),
        ({"unseen": "drop"}, ConfigError, "unseen"),
        ({"covariate_key": ["depth"]}, ConfigError, "Unknown argument 'covariate_key'.*'covariates_key'"),
    ],
)
def test_unfit_arguments_are_refused(adata, arguments, error, match):
    with pytest.raises(error, match=match):
        epivi.CANDI.setup_anndata(adata, **arguments)


def test_a_view_is_refused(adata):
    with pytest.raises(DataError, match=r"adata is a view of another object: call .copy\(\)"):
        epivi.CANDI.setup_anndata(adata[:3])


def test_what_is_no_anndata_is_refused():
    with pytest.raises(DataError, match=r"adata is a builtins\.dict, an AnnData is needed"):
        epivi.CANDI.setup_anndata({"counts": 1}, covariates_key=["depth"])


def test_a_split_that_is_no_word_is_refused(adata):
    adata.obs["split"] = ["train", "train", "hold", "test", "test"]
    with pytest.raises(DataError, match=r"is 'hold' for biosample 'biosample_2'"):
        epivi.CANDI.setup_anndata(adata, split_key="split")


def test_covariates_are_numbers_or_levels_by_their_categories(adata, make):
    model = make(adata, setup={"covariates_key": ["run_type", "read_length"]})
    assert list(model.state["continuous"]) == ["read_length"]
    assert list(model.state["categories"]) == ["run_type"]
    none = make(adata.copy(), setup={"covariates_key": []})
    assert none.module.network.covariates.n_outputs == 0
    one = make(adata.copy(), setup={"covariates_key": "depth"})
    assert (list(one.state["continuous"]), one.module.depth_index, one.module.coverage_index) == (["depth"], 0, None)


@pytest.mark.parametrize(
    ("setup", "heads", "kind"),
    [
        ({}, ["counts", "signal"], "counts"),
        ({"signal_key": None}, ["counts"], "counts"),
        ({"counts_key": None}, ["signal"], "signal"),
    ],
)
def test_heads_are_built_for_what_the_data_hold(adata, make, setup, heads, kind):
    model = make(adata, setup=setup)
    assert list(model.module.network.heads) == heads
    assert model.module.input_kind == kind


def test_dna_comes_from_uns_from_a_file_or_not_at_all(make, tmp_path):
    data = epivi.simulate.bulk(3, 4, chrom_sizes=[320, 160], dna=True, seed=2)
    lines = [
        f">{chrom}\n" + "".join("ACGTN"[code] for code in data.uns["dna"][low * 25 : high * 25])
        for chrom, low, high in (("chr1", 0, 320), ("chr2", 320, 480))
    ]
    path = tmp_path / "genome.fa"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    stored = data.uns["dna"]
    hold = {"validation_chroms": ["chr2"], "test_chroms": None}
    assert make(data, setup=hold).module.network.dna_tower is not None
    without = make(data.copy(), setup=hold | {"sequence": None})
    assert without.module.network.dna_tower is None
    bare = data.copy()
    del bare.uns["dna"]
    assert make(bare.copy(), setup=hold).module.network.dna_tower is None
    model = make(bare, setup=hold | {"sequence": path})
    np.testing.assert_array_equal(bare.uns["dna"], stored)
    model.save(tmp_path / "model")
    again = data.copy()
    assert epivi.CANDI.load(tmp_path / "model", again).module.network.dna_tower is not None
    bare = data.copy()
    del bare.uns["dna"]
    with pytest.raises(DataError, match=r"missing\.fa"):
        epivi.CANDI.setup_anndata(bare, sequence="missing.fa")


def test_one_available_assay_is_mentioned(adata, caplog):
    adata.obsm["availability"][0] = [True, False, False, False]
    with caplog.at_level(logging.WARNING, logger="epivi"):
        epivi.CANDI.setup_anndata(adata)
    assert "1 biosamples of adata have one available assay: 'biosample_0'" in caplog.text


def test_a_query_is_matched_or_refused(trained, adata, on_bins):
    var = pd.DataFrame(index=[*adata.var_names, "CTCF"])
    obsm = {key: np.concatenate([value, value[:, :1]], axis=1) for key, value in adata.obsm.items()}
    extra = ad.AnnData(np.ones((5, 5)), obs=adata.obs[[]], var=var, obsm=obsm, uns=dict(adata.uns))
    with pytest.raises(DataError, match="has the assays 'CTCF', unknown to the trained model"):
        trained.denoise(adata=extra)
    wide = on_bins(adata, np.arange(1040) % 2 == 0)
    wide.uns["bins"]["end"] += 25
    with pytest.raises(DataError, match="bins of adata are 50 bp wide, those of the trained model 25 bp"):
        trained.denoise(adata=wide)
    adata.uns["categories"] = {"run_type": np.array(["single", "mixed"])}
    with pytest.raises(DataError, match=r"has the categories 'mixed', which no training experiment has"):
        trained.denoise(adata=adata)
