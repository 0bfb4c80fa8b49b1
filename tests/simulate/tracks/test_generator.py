from __future__ import annotations

import anndata as ad
import mudata as md
import numpy as np
import pytest
from scipy import sparse, stats

from epivi._errors import ConfigError, DataError
from epivi.data.tracks.field import MuDataTracksField, TracksField
from epivi.data.tracks.grids import TrackGrid, segments
from epivi.simulate import tracks
from epivi.simulate._arguments import stream

SMALL = {"n": 120, "n_bins": 120, "n_types": 3, "depth": 80}


def counts(adata, c=3):
    stored = adata.obsm["tracks"]
    dense = stored.toarray() if sparse.issparse(stored) else stored
    return dense.reshape(adata.n_obs, c, -1)


def truth(adata):
    return adata.uns["truth"]


def test_the_output_has_the_documented_form():
    adata = tracks(50, 125, 4, 3, domain=10, seed=2, n_batches=2)
    assert adata.n_obs == 50
    assert type(adata.obsm["tracks"]) is sparse.csr_matrix
    assert adata.obsm["tracks"].shape == (50, 4 * 120)
    assert adata.obsm["tracks"].has_canonical_format
    about = adata.uns["tracks"]
    assert about["channels"].tolist() == ["H3K27ac", "ATAC", "H3K27me3", "mark_3"]
    assert about["bins"].columns.tolist() == ["chrom", "start", "end"]
    assert segments(TrackGrid.from_frame(about["bins"], where="bins", bin_size_bp=about["bin_size_bp"]), "gap") == [120]
    assert adata.obs.columns.tolist() == ["cell_type", "batch", *(f"library_{name}" for name in about["channels"])]
    assert adata.obs.groupby(["batch", "cell_type"], observed=True).size().tolist() == [9, 8, 8] * 2
    assert truth(adata)["profiles"].shape == (3, 4, 120)
    assert truth(adata)["mask"].all()
    assert truth(adata)["hidden"].nnz == 0
    record = adata.uns["simulation"]
    assert (record["simulator"], record["depth"], record["chrom_sizes"]) == ("tracks", 150, {"chr1": 120})


def test_profiles_follow_the_formula_and_are_constant_in_domains():
    found = truth(tracks(**SMALL))
    profile = found["profiles"]
    np.testing.assert_allclose(profile.sum(-1), 1.0)
    first = profile[..., ::12]
    np.testing.assert_array_equal(np.repeat(first, 12, axis=-1), profile)
    assert found["domain"].tolist() == np.repeat(np.arange(10), 12).tolist()
    # the base weights have a stream of their own
    base = np.stack([stream(0, 3, 0, m).gamma(0.7, 1.0, 10) for m in range(3)])
    signs = np.array([1, 1, -1])
    weight = base * np.exp(signs[:, None] * found["shared_effect"][:, None] + found["own_effect"]) + 0.001
    np.testing.assert_allclose(first * 12, weight / weight.sum(-1, keepdims=True))


def test_effects_are_shared_with_sign_as_often_as_asked():
    found = truth(tracks(60, 60_000, 2, 6, domain=12, depth=50))
    shared, own = found["shared_effect"], found["own_effect"]
    assert (shared != 0).mean() == pytest.approx(0.15, abs=0.01)
    assert (own != 0).mean() == pytest.approx(0.15, abs=0.01)
    for values in (shared[shared != 0], own[own != 0]):
        assert stats.kstest(values / 0.9, "norm").pvalue > 0.001


def test_counts_are_poisson_of_library_and_profile():
    adata = tracks(3000, 24, 2, 2, domain=4, depth=30, log_sd=0.3, seed=4)
    found = counts(adata, 2)
    library = np.stack([adata.obs[f"library_{name}"] for name in adata.uns["tracks"]["channels"]], axis=1)
    assert library.min() >= 6
    assert np.median(library) == pytest.approx(30, rel=0.03)
    assert np.log(library).std() == pytest.approx(0.3, rel=0.05)
    kind = adata.obs["cell_type"].cat.codes.to_numpy()
    rate = library[..., None] * truth(adata)["profiles"][kind]
    residual = (found - rate) / np.sqrt(rate)
    assert residual.mean(0) == pytest.approx(0, abs=5 / np.sqrt(3000))
    assert (residual**2).mean() == pytest.approx(1, abs=0.02)
    # bins are independent given type and library
    correlation = np.corrcoef(residual.reshape(3000, -1).T)
    assert np.abs(correlation[~np.eye(48, dtype=bool)]).max() < 5 / np.sqrt(3000)


def test_seeds_decide_everything():
    one, same, other = tracks(**SMALL), tracks(**SMALL), tracks(**SMALL, seed=1)
    assert (one.obsm["tracks"] != same.obsm["tracks"]).nnz == 0
    assert one.obs.equals(same.obs)
    assert (one.obsm["tracks"] != other.obsm["tracks"]).nnz > 0
    cells = tracks(**SMALL, seed=1, profile_seed=0)
    np.testing.assert_array_equal(truth(cells)["profiles"], truth(one)["profiles"])
    assert (cells.obsm["tracks"] != one.obsm["tracks"]).nnz > 0
    # profiles do not depend on the number of cells, nor a modality on that of modalities
    np.testing.assert_array_equal(truth(tracks(**SMALL | {"n": 30}))["profiles"], truth(one)["profiles"])
    np.testing.assert_array_equal(counts(tracks(**SMALL, n_modalities=2), 2), counts(one)[:, :2])


def test_unordered_bins_are_a_permutation_of_the_ordered_ones():
    ordered, shuffled = tracks(**SMALL), tracks(**SMALL, ordered=False)
    order = truth(shuffled)["permutation"]
    assert sorted(order) == list(range(120))
    assert (order != np.arange(120)).any()
    np.testing.assert_array_equal(counts(shuffled), counts(ordered)[..., order])
    for key in ("profiles", "domain"):
        np.testing.assert_array_equal(truth(shuffled)[key], truth(ordered)[key][..., order])
    assert shuffled.obs.equals(ordered.obs)
    assert shuffled.obsm["tracks"].has_sorted_indices


def test_every_storage_holds_the_same_counts():
    plain, dense = tracks(**SMALL), tracks(**SMALL, dense=True)
    assert dense.obsm["tracks"].dtype == np.uint16
    assert dense.obsm["tracks"].shape == (120, 3, 120)
    np.testing.assert_array_equal(counts(dense), counts(plain))
    mdata = tracks(**SMALL, as_mudata=True)
    assert mdata.obs_names.tolist() == plain.obs_names.tolist()
    for m, name in enumerate(plain.uns["tracks"]["channels"]):
        assert type(mdata[name].X) is sparse.csr_matrix
        np.testing.assert_array_equal(mdata[name].X.toarray(), counts(plain)[:, m])
        assert mdata[name].var["end"].tolist() == plain.uns["tracks"]["bins"]["end"].tolist()
    assert mdata.obs["cell_type"].tolist() == plain.obs["cell_type"].tolist()


def test_missing_modalities_are_hidden_and_the_counts_stay_those_drawn():
    missing = {"H3K27ac": 0.5, "ATAC": 0.5, 2: 0.5}
    whole, holed = tracks(**SMALL), tracks(**SMALL, missing=missing)
    mask = holed.obsm["tracks_mask"]
    assert mask.dtype == bool
    np.testing.assert_array_equal(truth(holed)["mask"], mask)
    assert mask.any(axis=1).all()
    # a half is lost, an eighth of the cells got one of the three back
    assert (~mask).mean() == pytest.approx(0.5 - 1 / 24, abs=0.06)
    np.testing.assert_array_equal(counts(holed), counts(whole) * mask[..., None])
    hidden = truth(holed)["hidden"].toarray().reshape(counts(whole).shape)
    np.testing.assert_array_equal(counts(holed) + hidden, counts(whole))
    np.testing.assert_array_equal(hidden, counts(whole) * ~mask[..., None])
    assert holed.obs.equals(whole.obs)
    one = tracks(**SMALL, missing={"ATAC": 0.3})
    assert (~one.obsm["tracks_mask"]).mean(0)[[0, 2]].tolist() == [0, 0]
    assert tracks(**SMALL, missing={"ATAC": 1.0}).obsm["tracks_mask"][:, 1].sum() == 0


def test_a_mudata_lacks_the_cells_of_missing_modalities():
    missing = {"H3K27ac": 0.4, "ATAC": 0.4}
    plain, mdata = tracks(**SMALL, missing=missing), tracks(**SMALL, missing=missing, as_mudata=True)
    at = plain.obs_names.get_indexer(mdata.obs_names)
    mask = plain.obsm["tracks_mask"][at]
    np.testing.assert_array_equal(truth(mdata)["mask"], mask)
    assert (truth(mdata)["hidden"] != truth(plain)["hidden"][at]).nnz == 0
    for m, name in enumerate(plain.uns["tracks"]["channels"]):
        np.testing.assert_array_equal(mdata.obs_names.isin(mdata[name].obs_names), mask[:, m])
        rows = plain.obs_names.get_indexer(mdata[name].obs_names)
        np.testing.assert_array_equal(mdata[name].X.toarray(), counts(plain)[rows, m])
    assert mdata.obs["library_ATAC"].tolist() == plain.obs["library_ATAC"].iloc[at].tolist()


def test_batches_share_profiles_and_differ_by_the_shift():
    adata = tracks(4000, 120, n_types=1, depth=200, batch_shift=0.5, seed=1)
    assert adata.obs["batch"].cat.categories.tolist() == ["batch_0", "batch_1"]
    shift, profile = truth(adata)["batch_shift"], truth(adata)["profiles"][0]
    assert shift.std() == pytest.approx(0.5, rel=0.25)
    for b in range(2):
        seen = counts(adata)[adata.obs["batch"] == f"batch_{b}"].sum(0)
        wanted = profile * np.exp(np.repeat(shift[b], 12, axis=-1))
        wanted /= wanted.sum(-1, keepdims=True)
        z = (seen - seen.sum(-1, keepdims=True) * wanted) / np.sqrt(seen.sum(-1, keepdims=True) * wanted)
        assert (z**2).mean() == pytest.approx(1, abs=0.3)
    # without a shift nothing is added, whatever the number of batches
    calm = tracks(**SMALL, n_batches=3)
    assert not truth(calm)["batch_shift"].any()
    np.testing.assert_array_equal(truth(calm)["profiles"], truth(tracks(**SMALL))["profiles"])


def test_low_signal_leaves_nothing_in_the_first_modality():
    adata = tracks(900, 12_000, low_signal=True)
    found = truth(adata)
    assert not found["shared_effect"].any()
    assert (found["own_effect"] != 0).mean((0, 2)) == pytest.approx([0, 0.06, 0.12], abs=0.01)
    profile = found["profiles"]
    np.testing.assert_array_equal(profile[:, 0], np.tile(profile[0, 0], (6, 1)))
    library = adata.obs.filter(like="library_").to_numpy()
    assert np.median(library) == pytest.approx(60, rel=0.05)
    assert library.min() >= 20
    # what is given wins over the setting
    assert adata.uns["simulation"]["depth"] == 60
    assert tracks(30, 240, low_signal=True, depth=90).uns["simulation"]["depth"] == 90


def test_domains_never_cross_chromosomes():
    adata = tracks(30, chrom_sizes={"chrA": 50, "chrB": 30}, n_types=2)
    bins = adata.uns["tracks"]["bins"]
    grid = TrackGrid.from_frame(bins, where="bins")
    assert segments(grid, "chromosome") == segments(grid, "gap") == [48, 24]
    domain = truth(adata)["domain"]
    assert bins.groupby(domain)["chrom"].nunique().eq(1).all()
    table = truth(adata)["domains"]
    assert table["chrom"].tolist() == ["chrA"] * 4 + ["chrB"] * 2
    assert table["start"].tolist() == bins["start"].iloc[::12].tolist()
    assert table["end"].tolist() == bins["end"].iloc[11::12].tolist()
    assert tracks(30, chrom_sizes=[24, 36]).uns["tracks"]["bins"]["chrom"].unique().tolist() == ["chr1", "chr2"]


def test_boundaries_carry_opposite_signals():
    found = truth(tracks(60, n_types=4, chrom_sizes=[60, 36, 48], boundary_signal=True))
    assert found["boundaries"].tolist() == [[4, 5], [7, 8]]
    profile = found["profiles"][..., ::12]
    for left, right in found["boundaries"]:
        ratio = np.log((profile[..., left]) / profile[..., right])
        sign = np.sign(found["shared_effect"][:, left])
        assert sorted(sign) == [-1, -1, 1, 1]
        np.testing.assert_array_equal(found["shared_effect"][:, left], -found["shared_effect"][:, right])
        # e^2 against e^-2, on equal bases; the repressive mark the other way round
        expected = np.log((np.exp(2) + 0.001) / (np.exp(-2) + 0.001)) * sign[:, None] * np.array([1, 1, -1])
        np.testing.assert_allclose(ratio, expected)


def test_empty_cells_appear_only_on_request():
    shallow = {"n": 300, "n_bins": 24, "n_modalities": 1, "depth": 1, "clip": (0.1, 3), "n_batches": 2, "n_types": 2}
    sums = counts(tracks(**shallow), 1).sum((1, 2))
    assert sums.min() == 1
    adata = tracks(**shallow, allow_empty=True)
    sums = counts(adata, 1).sum((1, 2))
    last = [np.flatnonzero(adata.obs["batch"] == name)[-1] for name in adata.obs["batch"].cat.categories]
    assert sums[last].tolist() == [0, 0]
    assert adata.obs["library_H3K27ac"].iloc[last].tolist() == [0, 0]
    assert (sums == 0).sum() > 2  # shallow cells are not filled up either
    deep = tracks(**SMALL, allow_empty=True)
    assert np.flatnonzero(counts(deep).sum((1, 2)) == 0).tolist() == [119]
    np.testing.assert_array_equal(counts(deep)[:80], counts(tracks(**SMALL))[:80])


@pytest.mark.parametrize("form", [{}, {"dense": True}, {"as_mudata": True}])
def test_files_keep_counts_and_truth(form, tmp_path):
    data = tracks(**SMALL, missing={"ATAC": 0.3}, chrom_sizes=[60, 60], boundary_signal=True, ordered=False, **form)
    if form.get("as_mudata"):
        data.write(tmp_path / "a.h5mu")
        again = md.read_h5mu(tmp_path / "a.h5mu")
        assert (again["ATAC"].X != data["ATAC"].X).nnz == 0
    else:
        data.write_h5ad(tmp_path / "a.h5ad")
        again = ad.read_h5ad(tmp_path / "a.h5ad")
        np.testing.assert_array_equal(counts(again), counts(data))
        np.testing.assert_array_equal(again.obsm["tracks_mask"], data.obsm["tracks_mask"])
    assert truth(again).keys() == truth(data).keys()
    for key, value in truth(data).items():
        if key == "domains":
            assert truth(again)[key].equals(value)
        elif key == "hidden":
            assert (truth(again)[key] != value).nnz == 0
        else:
            np.testing.assert_array_equal(truth(again)[key], value)
    assert again.uns["simulation"]["missing"] == {"ATAC": 0.3}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dense": True, "missing": {"ATAC": 0.5, "H3K27ac": 0.5, "H3K27me3": 0.5}},
        {"as_mudata": True, "missing": {0: 0.6, 1: 0.6}},
        {"ordered": False, "batch_shift": 0.5, "chrom_sizes": [60, 60]},
        {"low_signal": True, "allow_empty": True},
    ],
)
def test_every_output_passes_the_checks_of_registration(options):
    data = tracks(**SMALL | options)
    if options.get("as_mudata"):
        state = MuDataTracksField("X").register_field(data)
        assert len(state["grids"]) == 1
    else:
        state = TracksField("X", "tracks", mask_key="tracks_mask" if "missing" in options else None).register_field(
            data
        )
    assert state["genome"] == "simulated"
    assert state["n_bins"] == [120] * 3
    assert state["n_measured"] == truth(data)["mask"].sum(0).tolist()
    assert state["grids"][0]["bin_size_bp"] == 10_000


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "n=0 is not valid: give a whole number of at least 1"),
        ({"n_bins": 5}, "Chromosome 'chr1' has 5 bins, a domain 12: give more bins or smaller domains"),
        ({"n_bins": 1.5}, "n_bins=1.5 is not valid"),
        ({"domain": 0}, "domain=0 is not valid"),
        ({"n_modalities": 0}, "n_modalities=0 is not valid"),
        ({"n_types": True}, "n_types=True is not valid"),
        ({"depth": 0.5}, "depth=0.5 is not valid: give a finite number of at least 1"),
        ({"log_sd": -1}, "log_sd=-1 is not valid"),
        ({"clip": (9, 1)}, r"clip=\(9, 1\) is reversed"),
        ({"shared": 1.1}, "shared=1.1 is not valid: give a finite number between 0 and 1"),
        ({"own": [0.1, 0.2]}, "own has 2 entries for 3 modalities: give one number, or one a modality"),
        ({"own": [0.1, 0.2, 2]}, r"own\[2\]=2 is not valid"),
        ({"signs": ()}, r"signs=\(\) is not valid: give a number for each modality"),
        ({"signs": (1, "x")}, r"signs\[1\]='x' is not valid"),
        ({"effect_sd": np.nan}, "effect_sd=nan is not valid"),
        ({"batch_shift": -0.1}, "batch_shift=-0.1 is not valid"),
        ({"n_batches": 0}, "n_batches=0 is not valid"),
        ({"ordered": 1}, "ordered=1 is not valid: give True or False"),
        ({"missing": 0.3}, r"missing=0.3 is not valid: give a dict from modalities to shares"),
        ({"missing": {"atac": 0.3}}, "missing names the unknown modality 'atac'. Valid are: 'H3K27ac'"),
        ({"missing": {3: 0.3}}, "missing names the unknown modality 3"),
        ({"missing": {"ATAC": 1.3}}, r"missing\['ATAC'\]=1.3 is not valid"),
        ({"chrom_sizes": {}}, r"chrom_sizes=\{\} is not valid: give the bins of each chromosome"),
        ({"chrom_sizes": "hg38"}, "chrom_sizes='hg38' is not valid"),
        ({"chrom_sizes": [24, 3]}, "Chromosome 'chr2' has 3 bins, a domain 12"),
        ({"boundary_signal": True}, r"boundary_signal=True needs two chromosomes of two domains \(24 bins\)"),
        ({"boundary_signal": True, "chrom_sizes": [24, 12]}, "boundary_signal=True needs"),
        ({"low_signal": True, "n_modalities": 4}, "low_signal=True is for at most 3 modalities, found 4"),
        ({"bin_size_bp": 0}, "bin_size_bp=0 is not valid"),
        ({"seed": -1}, "seed=-1 is not valid"),
        ({"profile_seed": 0.5}, "profile_seed=0.5 is not valid"),
    ],
)
def test_arguments_that_cannot_be_used_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        tracks(**SMALL | options)


def test_a_simulation_can_be_spoilt_so_that_registration_refuses_it():
    adata = tracks(**SMALL)
    adata.obsm["tracks"] = adata.obsm["tracks"] * 0.5
    with pytest.raises(DataError, match="not a whole number"):
        TracksField("X", "tracks").register_field(adata)
