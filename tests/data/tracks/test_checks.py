from __future__ import annotations

import anndata as ad
import mudata as md
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from epivi._errors import ConfigError, DataError
from epivi.data.tracks._checks import check_stacked
from epivi.data.tracks.field import MuDataTracksField, TracksField

N, C, L = 4, 2, 3
COUNTS = np.arange(N * C * L, dtype=np.uint16).reshape(N, C, L) % 3
CELLS = [f"c{i}" for i in range(N)]
BINS = pd.DataFrame({"chrom": ["1", "1", "2"], "start": [0, 10, 0], "end": [10, 20, 10]}, index=list("xyz"))


def described(array=COUNTS, *, obsm=None, n=N, **uns):
    description = {"channels": ["ac", "me3"], "bins": BINS.copy(), "genome": "hg38", "bin_size_bp": 10} | uns
    adata = ad.AnnData(obs=pd.DataFrame(index=CELLS[:n]), obsm={"tracks": array, **(obsm or {})})
    adata.uns["tracks"] = {key: value for key, value in description.items() if value is not None}
    return adata


def register(adata, **options):
    return TracksField("X", "tracks", **options).register_field(adata)


def changed(at, value, dtype=np.float32):
    array = COUNTS.astype(dtype)
    array[at] = value
    return array


def bins(**columns):
    return BINS.assign(**columns)


@pytest.mark.parametrize("sparse_form", [False, True])
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.nan, r"holds NaN, a missing value. Set it to 0, or mask the channel in this cell with mask_key"),
        (np.inf, r"holds inf, an infinite value. Pass the raw counts"),
        (-2, r"holds -2, a negative value: the counts look scaled or centred. Pass the raw counts"),
        (0.5, r"holds 0.5, not a whole number: the counts look normalised.*epivi.pp.reads_to_fragments"),
    ],
)
def test_what_is_no_count_is_named_with_cell_channel_and_bin(value, message, sparse_form):
    array = changed((2, 1, 1), value)
    array[3, 0, 0] = value  # later: not the one that is named
    if sparse_form:
        array = sparse.csr_matrix(array.reshape(N, -1))
    where = r"adata.obsm\['tracks'\]: cell 'c2' \(row 2\), channel 'me3', bin 1:10-20 "
    with pytest.raises(DataError, match=where + message):
        register(described(array))


def test_negative_integers_are_refused_in_every_chunk():
    with pytest.raises(DataError, match=r"cell 'c3' \(row 3\), channel 'ac', bin 2:0-10 holds -1"):
        register(described(changed((3, 0, 2), -1, np.int32)))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (COUNTS > 0, r"has dtype bool. Counts are needed.*\.astype\('uint8'\)"),
        (sparse.csr_matrix(COUNTS.reshape(N, -1) > 0), "has dtype bool"),
        (COUNTS.astype(object), r"has dtype object, which cannot hold counts. Convert it"),
        (COUNTS.astype(complex), "has dtype complex128"),
        (COUNTS.reshape(N, -1), r"has 2 axes, shape \(4, 6\). Reshape it to \(cells, channels, bins\) = \(4, 2, 3\)"),
        (COUNTS[..., None], "has 4 axes"),
        (COUNTS[:, :1], r"has shape \(4, 1, 3\), needed is \(4, 2, 3\): 4 cells, 2 channels and 3 bins as described"),
        (COUNTS[:, :, :2], r"has shape \(4, 2, 2\), needed is \(4, 2, 3\)"),
        (COUNTS[:, :, :0], r"has shape \(4, 2, 0\), needed"),
        (COUNTS.transpose(0, 2, 1), r"has shape \(4, 3, 2\), needed"),
        (sparse.csr_matrix(COUNTS[:, :1].reshape(N, -1)), r"has shape \(4, 3\), needed is \(4, 6\)"),
        (sparse.csc_matrix(COUNTS.reshape(N, -1)), r"is sparse in the format 'csc'. Convert it with .tocsr\(\)"),
        (sparse.coo_matrix(COUNTS.reshape(N, -1)), r"is sparse in the format 'coo'. Convert it with .tocsr\(\)"),
        (sparse.coo_array(COUNTS), r"is a sparse array with 3 axes. Use .reshape\(4, 6\).tocsr\(\)"),
        (pd.DataFrame(COUNTS.reshape(N, -1), index=CELLS), "is a DataFrame. Store the counts as an array"),
        (np.ma.masked_array(COUNTS), r"has type numpy.ma.*MaskedArray, which is not read. Load it into memory"),
        (COUNTS.tolist(), "has type builtins.list, which is not read"),
    ],
)
def test_arrays_of_the_wrong_kind_dtype_or_shape_are_refused(array, message):
    with pytest.raises(DataError, match=r"adata.obsm\['tracks'\] " + message):
        check_stacked(array, where="adata.obsm['tracks']", shape=(N, C, L))


def test_the_check_of_the_array_stands_in_the_field():
    adata = described(pd.DataFrame(COUNTS.reshape(N, -1), index=CELLS))
    with pytest.raises(DataError, match=r"adata.obsm\['tracks'\] is a DataFrame"):
        register(adata)
    with pytest.raises(DataError, match=r"query.obsm\['tracks'\] has dtype bool"):
        register(described(COUNTS > 0), where="query")


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [("indices", 99, "an index lies outside its shape"), ("indptr", 99, "its indptr does not fit its data")],
)
def test_damaged_matrices_are_refused(part, value, message):
    matrix = sparse.csr_matrix(COUNTS.reshape(N, -1))
    getattr(matrix, part)[1] = value
    with pytest.raises(DataError, match=f"is a damaged sparse matrix: {message}. Build the matrix anew"):
        check_stacked(matrix, where="adata.obsm['tracks']", shape=(N, C, L))


@pytest.mark.parametrize(
    ("adata", "message"),
    [
        (described(channels=None), r"adata.uns\['tracks'\] has no entry 'channels'"),
        (described(bins=None), r"adata.uns\['tracks'\] has no entry 'bins'"),
        (described(channels=[]), r"adata.uns\['tracks'\]\['channels'\] is empty"),
        (described(channels=["ac", "ac"]), r"\['channels'\] names 'ac' 2 times. Give every channel a name of its own"),
        (described(bins=bins(start=[10, 0, 0], end=[20, 10, 10])), r"\['bins'\]: bin 1 \(1:0-10\) starts before the"),
        (described(bins=bins(start=[0, 9, 0], end=[10, 19, 10])), r"bin 1 \(1:9-19\) overlaps the bin in front of it"),
        (described(bins=bins(chrom=["1", "2", "1"])), r"bin 2 \(1:0-10\) lies on a chromosome that ended already"),
        (described(bins=bins(end=[10, 10, 10])), r"bin 1 \(1:10-10\) does not end after its start"),
        (described(bins=BINS[:0]), r"\['bins'\] has no row"),
        (described(bins=[1, 2]), r"\['bins'\] is a list: give a DataFrame"),
        (described(bin_size_bp=5), "wider than bin_size_bp=5"),
        (described(COUNTS * 0), r"adata.obsm\['tracks'\] has no measured count above zero"),
    ],
)
def test_descriptions_that_cannot_be_used_are_refused(adata, message):
    with pytest.raises(DataError, match=message):
        register(adata)


def test_missing_entries_are_named_with_the_nearest():
    adata = described()
    with pytest.raises(DataError, match=r"adata.obsm has no entry 'track'. Did you mean 'tracks'"):
        TracksField("X", "track").register_field(adata)
    adata.obsm["other"] = COUNTS
    with pytest.raises(DataError, match=r"adata.uns has no entry 'other'"):
        TracksField("X", "other").register_field(adata)
    adata.uns["tracks"] = "text"
    with pytest.raises(DataError, match=r"adata.uns\['tracks'\] is a str: a dict with 'channels' and 'bins'"):
        register(adata)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.ones((N, C)), r"has dtype float64, a Boolean array is needed: True where measured.*astype\(bool\)"),
        (np.ones((N, C + 1), dtype=bool), r"has shape \(4, 3\), needed is \(4, 2\).*\['ac', 'me3'\]"),
        (np.ones((N, C, 1), dtype=bool), r"has shape \(4, 2, 1\), needed"),
        (sparse.csr_matrix(np.ones((N, C), dtype=bool)), "has type csr_matrix, a Boolean array"),
        (pd.DataFrame({"ac": [True] * N, "x": [True] * N}, CELLS), r"has the columns \['ac', 'x'\], needed are"),
        (pd.DataFrame({"ac": [True] * N, "me3": [1] * N}, CELLS), r"has columns of dtype \['bool', 'int64'\]: give"),
    ],
)
def test_masks_of_the_wrong_form_are_refused(mask, message):
    with pytest.raises(DataError, match=r"adata.obsm\['m'\] " + message):
        register(described(obsm={"m": mask}), mask_key="m")


def test_cells_and_channels_that_were_never_measured_are_refused():
    mask = np.ones((N, C), dtype=bool)
    mask[1:3] = False
    with pytest.raises(DataError, match=r"2 of 4 cells of adata have no measured channel, the first is 'c1' \(row 1\)"):
        register(described(obsm={"m": mask}), mask_key="m")
    array = COUNTS.copy()
    array[3] = 0
    with pytest.raises(DataError, match=r"1 of 4 cells of adata have no measured channel, the first is 'c3'"):
        register(described(array), empty="mask")
    mask[:] = [True, False]
    with pytest.raises(DataError, match=r"Channel 'me3' of adata is measured in no cell. Leave it out or correct"):
        register(described(obsm={"m": mask}), mask_key="m")
    with pytest.raises(DataError, match=r"adata.obsm has no entry 'n'"):
        register(described(), mask_key="n")


def test_views_few_cells_double_names_and_other_objects_are_refused():
    with pytest.raises(DataError, match=r"adata is a view of another object: call .copy\(\) on it first"):
        register(described()[:3])
    with pytest.raises(DataError, match="adata has 1 cells, at least 2 are needed"):
        register(described(COUNTS[:1], n=1))
    adata = described()
    adata.obs_names = ["a", "b", "a", "c"]
    with pytest.raises(DataError, match=r"obs_names are not unique: 'a' occurs more than once"):
        register(adata)
    with pytest.raises(DataError, match="adata is a ndarray: an AnnData or MuData is needed"):
        register(COUNTS)
    with pytest.raises(DataError, match="mdata is a AnnData, a MuData is needed"):
        MuDataTracksField("X").register_field(described())
    with pytest.raises(ConfigError, match="empty='ignore' is not valid"):
        TracksField("X", "tracks", empty="ignore")


def mudata_of(ac=None, me3=None):
    mods = {"ac": COUNTS[:, 0] if ac is None else ac, "me3": COUNTS[:, 1] if me3 is None else me3}
    for name, part in mods.items():
        if not isinstance(part, ad.AnnData):
            var = BINS.set_index(name + BINS.index)
            mods[name] = ad.AnnData(part, obs=pd.DataFrame(index=CELLS[: part.shape[0]]), var=var)
    return md.MuData(mods)


def test_modalities_that_cannot_be_used_are_refused():
    with pytest.raises(DataError, match=r"mdata has no modality 'me' for channel 'H3'. Did you mean 'me3'"):
        MuDataTracksField("X", {"H3": "me"}).register_field(mudata_of())
    with pytest.raises(DataError, match=r"mdata\['ac'\].layers has no entry 'n'"):
        MuDataTracksField("X", layer="n").register_field(mudata_of())
    with pytest.raises(DataError, match=r"mdata\['me3'\].X has dtype bool"):
        MuDataTracksField("X").register_field(mudata_of(me3=COUNTS[:, 1] > 0))
    with pytest.raises(DataError, match=r"mdata: cell 'c1' \(row 1\), channel 'ac', bin 1:0-10 holds 0.5"):
        MuDataTracksField("X").register_field(mudata_of(ac=changed((1, 0, 0), 0.5)[:, 0]))
    genes = ad.AnnData(COUNTS[:, 0], obs=pd.DataFrame(index=CELLS), var=pd.DataFrame(index=["g1", "g2", "g3"]))
    with pytest.raises(DataError, match=r"The bins of mdata\['ac'\] have no position.*names such as 'g1' do not tell"):
        MuDataTracksField("X").register_field(mudata_of(ac=genes))
    named = genes.copy()
    named.var_names = ["chr1:0-10", "chr1:10-20", "strange"]
    with pytest.raises(DataError, match=r"mdata\['ac'\]: 2 of 3 feature names can be read as positions"):
        MuDataTracksField("X").register_field(mudata_of(ac=named))
    named.var_names = ["chr1:0-10", "chr1:20-30", "chr1:10-20"]
    with pytest.raises(DataError, match=r"mdata\['ac'\].var: bin 2 \(chr1:10-20\) starts before"):
        MuDataTracksField("X").register_field(mudata_of(ac=named))
    no_x = ad.AnnData(obs=pd.DataFrame(index=CELLS), var=BINS)
    with pytest.raises(DataError, match=r"mdata\['ac'\].X is empty. Give counts"):
        MuDataTracksField("X").register_field(mudata_of(ac=no_x))
    no_bins = ad.AnnData(np.ones((N, 0)), obs=pd.DataFrame(index=CELLS))
    with pytest.raises(DataError, match=r"mdata\['ac'\].X has shape \(4, 0\): cells and bins are needed"):
        MuDataTracksField("X").register_field(mudata_of(ac=no_bins))
    with pytest.raises(DataError, match="mdata is a view"):
        MuDataTracksField("X").register_field(mudata_of()[:3])


def test_a_query_without_any_channel_is_refused():
    field = MuDataTracksField("X", ["ac"])
    state = field.register_field(mudata_of())
    query = md.MuData({"me3": mudata_of()["me3"].copy()})
    with pytest.raises(DataError, match=r"mdata has none of the modalities \['ac'\]. Valid are: 'me3'"):
        field.transfer_field(state, query)
    state = (field := MuDataTracksField("X")).register_field(mudata_of())
    query = md.MuData({"rna": mudata_of()["me3"].copy()})
    with pytest.raises(DataError, match=r"mdata has none of the modalities \['ac', 'me3'\]"):
        field.transfer_field(state, query)


@pytest.mark.parametrize(
    ("modalities", "message"),
    [
        ("ac", "modalities='ac' is not valid: give a list of modalities, or a dict"),
        (3, "modalities=3 is not valid: give a list"),
        ([], r"modalities=\[\] is not valid: at least one name is needed"),
        ([1], r"modalities=\[1\] is not valid: .*names are text"),
        (["ac", "ac"], "modalities names the channel 'ac' twice. Name it once"),
        ({"a": "ac", "b": "ac"}, "modalities names the modality 'ac' twice"),
    ],
)
def test_lists_of_modalities_are_checked(modalities, message):
    with pytest.raises(ConfigError, match=message):
        MuDataTracksField("X", modalities)


def test_a_modality_of_one_cell_is_read():
    one = ad.AnnData(COUNTS[:1, 0] + 1, obs=pd.DataFrame(index=CELLS[:1]), var=BINS.set_index("a" + BINS.index))
    mdata = mudata_of(ac=one)
    state = MuDataTracksField("X").register_field(mdata)
    assert state["n_measured"] == [1, N]
