from __future__ import annotations

import logging

import mudata as md
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import epivi
from epivi._errors import ConfigError, DataError


@pytest.fixture(scope="module")
def latent(pretrained):
    return pretrained.get_latent_representation()


def test_each_cell_is_the_vector_of_cls(pretrained, latent):
    batch = pretrained._encoding(pretrained.adata, targets=False)(
        pretrained.adata_manager.create_torch_dataset()[np.array([17])]
    )
    np.testing.assert_allclose(pretrained._cells(batch).detach().numpy()[0], latent[17], atol=1e-6)
    assert latent.shape == (60, 32)
    assert latent.dtype == np.float32
    assert np.abs(latent - latent.mean(0)).max() > 1e-3


def test_repeats_chunks_and_orders_give_the_same(pretrained, latent):
    np.testing.assert_array_equal(pretrained.get_latent_representation(), latent)
    order = np.random.default_rng(0).permutation(60)
    for size in (1, 7, 60):
        np.testing.assert_allclose(pretrained.get_latent_representation(batch_size=size), latent, atol=1e-6)
        shuffled = pretrained.get_latent_representation(indices=order, batch_size=size)
        np.testing.assert_allclose(shuffled, latent[order], atol=1e-6)
    mask = np.arange(60) % 5 == 0
    np.testing.assert_allclose(pretrained.get_latent_representation(indices=mask), latent[mask], atol=1e-6)
    assert pretrained.get_latent_representation(indices=[]).shape == (0, 32)


def test_other_cells_and_their_order_change_nothing(pretrained, latent, peaks):
    order = np.random.default_rng(1).permutation(60)[:23]
    found = pretrained.get_latent_representation(peaks[order].copy())
    np.testing.assert_allclose(found, latent[order], atol=1e-6)


def test_the_order_of_columns_does_not_matter(pretrained, latent, mdata):
    order = np.random.default_rng(2).permutation(80)
    data = md.MuData({"atac": mdata["atac"][:, order].copy(), "rna": mdata["rna"]})
    np.testing.assert_array_equal(pretrained.get_latent_representation(data), latent)


def test_counts_stored_zeros_duplicates_and_dense_values_are_the_same_cells(pretrained, latent, peaks, messy):
    binary = peaks.copy()
    binary.X = sparse.csr_matrix((peaks.X.toarray() > 0).astype(np.int8))
    untidy = peaks.copy()
    untidy.X = messy(peaks.X)
    assert not untidy.X.has_canonical_format
    dense = peaks.copy()
    dense.X = peaks.X.toarray().astype(bool)
    columns = peaks.copy()
    columns.X = sparse.csc_matrix(peaks.X)
    for data in (peaks, binary, untidy, dense, columns):
        np.testing.assert_array_equal(pretrained.get_latent_representation(data), latent)
    doubled = peaks.copy()
    doubled.X = peaks.X * 3
    np.testing.assert_array_equal(pretrained.get_latent_representation(doubled), latent)


def test_training_on_untidy_values_is_the_same(simulated, make, learn, same_weights, messy):
    first = learn(make(simulated.copy()))
    data = simulated.copy()
    for part in data.mod.values():
        part.X = messy(part.X)
    assert same_weights(learn(make(data)), first)


def test_counts_matter_where_that_is_asked_for(simulated, make, learn):
    model = learn(make(simulated.copy(), count_levels=True))
    peaks = simulated["atac"].copy()
    latent = model.get_latent_representation(peaks)
    more, most = peaks.copy(), peaks.copy()
    more.X, most.X = peaks.X * 3, peaks.X * 7
    z = model.get_latent_representation(more)
    assert np.abs(z - latent).max() > 1e-4
    # 3 and more are one level
    np.testing.assert_array_equal(model.get_latent_representation(most), z)


def test_one_open_peak_more_or_less_changes_the_cell_alone(pretrained, latent, peaks):
    x = peaks.X.toarray()
    x[3, np.flatnonzero(x[3])[0]] = 0
    peaks.X = sparse.csr_matrix(x)
    found = pretrained.get_latent_representation(peaks)
    assert np.abs(found[3] - latent[3]).max() > 1e-4
    np.testing.assert_allclose(np.delete(found, 3, 0), np.delete(latent, 3, 0), atol=1e-6)


def test_empty_cells_are_refused_or_all_alike(pretrained, latent, peaks, with_row):
    peaks.X = with_row(with_row(peaks.X, 4, []), 9, [])
    with pytest.raises(DataError, match=r"2 of 60 cells .* no open peak \(first: \['cell_4', 'cell_9'\]\).*'zero'"):
        pretrained.get_latent_representation(peaks)
    pretrained.prepare_query(peaks, empty_cells="zero")
    found = pretrained.get_latent_representation(peaks, n_subsamples=3)
    np.testing.assert_allclose(found[4], found[9], atol=1e-6)
    rest = np.setdiff1d(np.arange(60), [4, 9])
    np.testing.assert_allclose(found[rest], latent[rest], atol=1e-6)
    assert np.isfinite(found).all()
    assert peaks.obs["_epivi_n_open"].eq(0).sum() == 2


def test_cells_with_one_peak_are_told_apart(pretrained, peaks, with_row):
    peaks.X = with_row(with_row(with_row(peaks.X, 0, [5]), 1, [5]), 2, [6])
    found = pretrained.get_latent_representation(peaks)
    np.testing.assert_allclose(found[0], found[1], atol=1e-6)
    assert np.abs(found[0] - found[2]).max() > 1e-4


@pytest.fixture(scope="module")
def limited(simulated, make, learn):
    """A model that reads 12 peaks of a cell."""
    return learn(make(simulated.copy(), max_peaks=12))


def test_cells_at_the_limit_are_read_whole_and_above_it_in_part(limited, peaks, with_row):
    for row, n in enumerate((11, 12, 13)):
        peaks.X = with_row(peaks.X, row, np.arange(n))
    first, second = (limited.get_latent_representation(peaks, n_subsamples=n) for n in (1, 2))
    np.testing.assert_allclose(second[:2], first[:2], atol=1e-6)
    assert np.abs(second[2] - first[2]).max() > 1e-5
    # the 13th peak took the place of another, or was left out
    x = peaks.X.toarray()
    without = []
    for column in range(13):
        one = x.copy()
        one[2, column] = 0
        data = peaks.copy()
        data.X = sparse.csr_matrix(one)
        without.append(limited.get_latent_representation(data, indices=[2])[0])
    differences = np.abs(np.array(without) - first[2]).max(1)
    assert (differences < 1e-6).sum() == 1


def test_subsamples_are_averaged(limited, peaks):
    latent = limited.get_latent_representation(peaks, n_subsamples=3)
    rows = np.flatnonzero(peaks.X.getnnz(1) > 12)[:4]
    draws = np.zeros((3, rows.size, 32))
    for draw in range(3):
        for at, batch in limited._read(peaks, rows, None, draw=draw):
            draws[draw, at] = limited._cells(batch).detach().numpy()
    np.testing.assert_allclose(latent[rows], draws.mean(0), atol=1e-6)
    assert np.abs(draws[0] - draws[1]).max() > 1e-5


def test_what_is_read_of_a_long_cell_depends_on_its_name_alone(limited, peaks):
    latent = limited.get_latent_representation(peaks)
    np.testing.assert_array_equal(limited.get_latent_representation(peaks), latent)
    order = np.random.default_rng(0).permutation(60)
    columns = np.random.default_rng(1).permutation(80)
    moved = peaks[order][:, columns].copy()
    np.testing.assert_allclose(limited.get_latent_representation(moved, batch_size=5), latent[order], atol=1e-6)
    renamed = peaks.copy()
    renamed.obs_names = [f"other_{i}" for i in range(60)]
    changed = np.abs(limited.get_latent_representation(renamed) - latent).max(1) > 1e-5
    assert changed[peaks.X.getnnz(1) > 14].mean() > 0.9
    assert not changed[peaks.X.getnnz(1) <= 12].any()


def test_cells_above_the_limit_are_counted_in_the_log(limited, peaks, caplog):
    with caplog.at_level(logging.INFO, logger="epivi"):
        limited.get_latent_representation(peaks)
    n = int((peaks.X.getnnz(1) > 12).sum())
    assert f"{n} of 60 cells have more than 12 open peaks; of these so many are read" in caplog.text


def test_vectors_are_scaled_to_length_1(pretrained, latent):
    found = pretrained.get_latent_representation(l2_normalize=True)
    np.testing.assert_allclose(found, latent / np.linalg.norm(latent, axis=1, keepdims=True), rtol=1e-6)


def test_neither_batch_nor_label_enters_the_vector(pretrained, latent, mdata):
    mdata.obs["batch"] = pd.Categorical(["new"] * 60)
    mdata.obs["cell_type"] = pd.Categorical(["x"] * 30 + ["type_1"] * 30)
    np.testing.assert_array_equal(pretrained.get_latent_representation(mdata), latent)
    del mdata.obs["batch"], mdata.obs["cell_type"]
    again = md.MuData({"atac": mdata["atac"].copy()})
    np.testing.assert_array_equal(pretrained.get_latent_representation(again), latent)


def test_data_set_up_anew_are_still_read_by_the_model(pretrained, latent, peaks):
    pretrained.get_latent_representation(peaks)
    epivi.SAILER.setup_anndata(peaks, batch_key="cell_type")
    np.testing.assert_array_equal(pretrained.get_latent_representation(peaks), latent)


def test_copies_of_data_that_were_read_are_data_of_their_own(pretrained, latent, mdata):
    for data in (mdata["atac"].copy(), mdata):
        whole = pretrained.get_latent_representation(data)
        np.testing.assert_array_equal(whole, latent)
        rows = np.random.default_rng(0).permutation(60)[:30]
        part = data[rows].copy()
        np.testing.assert_allclose(pretrained.get_latent_representation(part), latent[rows], atol=1e-6)
        # the original is read as before, and after it the copy
        np.testing.assert_array_equal(pretrained.get_latent_representation(data), latent)
        np.testing.assert_allclose(pretrained.get_latent_representation(part), latent[rows], atol=1e-6)
    copied = pretrained.adata.copy()
    np.testing.assert_array_equal(pretrained.get_latent_representation(copied), latent)
    np.testing.assert_array_equal(pretrained.get_latent_representation(), latent)


def test_views_are_refused(pretrained, peaks):
    pretrained.get_latent_representation(peaks)
    with pytest.raises(DataError, match=r"is a view .*\.copy\(\)"):
        pretrained.get_latent_representation(peaks[:10])


def test_a_copy_is_read_by_a_model_that_was_loaded_without_data(pretrained, latent, peaks, tmp_path):
    pretrained.save(tmp_path / "model")
    loaded = epivi.EpiFoundation.load(tmp_path / "model", adata=False)
    np.testing.assert_array_equal(loaded.get_latent_representation(peaks), latent)
    np.testing.assert_array_equal(loaded.get_latent_representation(peaks.copy()), latent)


def test_a_model_of_peaks_reads_a_mudata_and_the_other_way_round(simulated, make, learn, pretrained, latent):
    model = learn(make(simulated["atac"].copy()))
    expected = model.get_latent_representation()
    np.testing.assert_array_equal(model.get_latent_representation(simulated.copy()), expected)
    np.testing.assert_array_equal(pretrained.get_latent_representation(simulated["atac"].copy()), latent)


@pytest.fixture(scope="module")
def placed(simulated, make, learn):
    """A model that knows the bins of the genome."""
    return learn(make(simulated.copy(), positions="genome"))


def test_known_peaks_read_by_position_are_the_same_cells(placed, peaks):
    latent = placed.get_latent_representation()
    placed.prepare_query(peaks, new_peaks="position")
    np.testing.assert_allclose(placed.get_latent_representation(peaks), latent, atol=1e-6)
    # peaks may be missing then, and come in any order
    part = peaks[:, np.random.default_rng(0).permutation(80)[:70]].copy()
    x = peaks.X.toarray()
    x[:, ~peaks.var_names.isin(part.var_names)] = 0
    peaks.X = sparse.csr_matrix(x)
    placed.prepare_query(part, new_peaks="position")
    placed.prepare_query(peaks)
    np.testing.assert_allclose(
        placed.get_latent_representation(part), placed.get_latent_representation(peaks), atol=1e-6
    )


def test_moved_peaks_are_read_by_their_place(placed, simulated):
    latent = placed.get_latent_representation()
    query = epivi.simulate.shifted_peaks(simulated["atac"].copy(), shift=40, merge=False)
    placed.prepare_query(query, new_peaks="position")
    found = placed.get_latent_representation(query)
    assert np.isfinite(found).all()
    assert not np.allclose(found, latent, atol=1e-4)


def test_reading_by_position_needs_positions(pretrained, peaks):
    pretrained.prepare_query(peaks, new_peaks="position")
    with pytest.raises(ConfigError, match="only by a model with positions='genome'"):
        pretrained.get_latent_representation(peaks)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"n_subsamples": 0}, "n_subsamples=0"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"indices": [60]}, "indices holds 60"),
        ({"indices": [True, False]}, "mask in indices"),
    ],
)
def test_arguments_that_are_not_valid_are_refused(pretrained, options, match):
    with pytest.raises(ConfigError, match=match):
        pretrained.get_latent_representation(**options)


def test_data_without_the_peaks_are_refused(pretrained, peaks):
    with pytest.raises(DataError, match="adata has 50 of the 80 peaks"):
        pretrained.get_latent_representation(peaks[:, :50].copy())


def test_a_model_that_was_not_trained_says_so(mdata, make):
    with pytest.warns(UserWarning, match="untrained|not trained|trained"):
        make(mdata).get_latent_representation()
