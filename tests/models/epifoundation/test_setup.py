from __future__ import annotations

import mudata as md
import numpy as np
import pytest
from scvi import REGISTRY_KEYS

import epivi
from epivi._errors import ConfigError, DataError
from epivi._keys import BATCH_RNA

setup_anndata, setup_mudata = epivi.EpiFoundation.setup_anndata, epivi.EpiFoundation.setup_mudata


def registry_of(data):
    return epivi.EpiFoundation._get_most_recent_anndata_manager(data, required=True).registry


def state_of(data, key):
    return registry_of(data)["field_registries"][key]["state_registry"]


def test_a_setup_registers_peaks_genes_batches_and_labels(mdata):
    setup_mudata(mdata, batch_key="batch", labels_key="cell_type")
    assert list(state_of(mdata, REGISTRY_KEYS.X_KEY)["column_names"]) == list(mdata["atac"].var_names)
    assert state_of(mdata, BATCH_RNA)["column_names"].tolist() == list(mdata["rna"].var_names)
    assert list(state_of(mdata, REGISTRY_KEYS.BATCH_KEY)["categorical_mapping"]) == ["batch_0", "batch_1"]
    assert len(state_of(mdata, REGISTRY_KEYS.LABELS_KEY)["categorical_mapping"]) == 3
    arguments = registry_of(mdata)["setup_args"]
    assert arguments["rna_kind"] == "counts"
    assert "vocabulary" not in arguments


def test_peaks_alone_have_no_genes(peaks):
    setup_anndata(peaks, batch_key="batch")
    assert state_of(peaks, BATCH_RNA)["column_names"].size == 0


def test_layers_names_of_modalities_and_columns_of_the_peaks_obs(mdata):
    other = md.MuData({"open": mdata["atac"], "gex": mdata["rna"]})
    expected = other["open"].X.copy()
    other.mod["open"].layers["counts"] = other["open"].X.copy()
    other.mod["gex"].layers["counts"] = other["gex"].X.copy()
    for part in other.mod.values():
        part.X.data[:] = 1
    names = {"atac": "open", "rna": "gex"}
    setup_mudata(other, names, "counts", "counts", "batch", "cell_type")
    model = epivi.EpiFoundation(other, size="test")
    batch = model.adata_manager.create_torch_dataset()[np.arange(60)]
    np.testing.assert_array_equal(batch["x_values"].numpy(), expected.data)
    assert batch["rna_values"].max() > 1
    assert model.classes == ["type_0", "type_1", "type_2"]


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({"rna_kind": "count"}, ConfigError, "'counts'"),
        ({"empty_cells": "keep"}, ConfigError, "empty_cells"),
        ({"new_peaks": "positions"}, ConfigError, "'position'"),
        ({"batchkey": "batch"}, ConfigError, "Unknown argument 'batchkey' of setup_mudata.*'batch_key'"),
        ({"batch_key": "bacth"}, DataError, "'batch'"),
        ({"labels_key": "cell_types"}, DataError, "'cell_type'"),
        ({"atac_layer": "counts"}, DataError, r"mdata\['atac'\].layers"),
        ({"rna_layer": "counts"}, DataError, r"mdata\['rna'\].layers"),
        ({"modalities": {"atac": "peaks"}}, DataError, "no modality 'peaks'"),
        ({"unlabeled_category": "x"}, ConfigError, "needs labels_key"),
        ({"unlabeled_category": "type0", "labels_key": "cell_type"}, ConfigError, "Did you mean 'type_0'|type_0"),
    ],
)
def test_arguments_that_are_not_valid_are_refused(mdata, arguments, error, match):
    with pytest.raises(error, match=match):
        setup_mudata(mdata, **arguments)
    assert not any(key.startswith("_") for key in [*mdata.obs, *mdata["atac"].obs])


def test_an_anndata_and_a_mudata_are_told_apart(mdata, peaks):
    with pytest.raises(DataError, match="takes a MuData, found AnnData"):
        setup_mudata(peaks)
    with pytest.raises(DataError, match="AnnData"):
        setup_anndata(mdata)


def test_a_view_is_refused(peaks):
    with pytest.raises(DataError, match=r"adata is a view .*\.copy\(\)"):
        setup_anndata(peaks[:30])


def test_cells_without_peaks_are_refused_with_the_way_out(mdata):
    fewer = md.MuData({"atac": mdata["atac"][5:].copy(), "rna": mdata["rna"]})
    with pytest.raises(DataError, match=r"5 of 60 cells have no 'atac'.*cells are read by their peaks"):
        setup_mudata(fewer)


def test_cells_without_rna_are_taken(mdata):
    fewer = md.MuData({"atac": mdata["atac"], "rna": mdata["rna"][5:].copy()})
    setup_mudata(fewer)
    batch = epivi.EpiFoundation(fewer, size="test").adata_manager.create_torch_dataset()[
        fewer.obs_names.get_indexer(["cell_0", "cell_9"])
    ]
    assert np.diff(batch["rna_indptr"])[0] == 0 < np.diff(batch["rna_indptr"])[1]


def test_the_rna_must_be_there_at_setup(mdata):
    with pytest.raises(DataError, match="no modality 'rna'"):
        setup_mudata(md.MuData({"atac": mdata["atac"]}))
