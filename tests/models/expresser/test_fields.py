"""Names of genes, matching of other data, storage forms, occupancy of bins."""

import anndata as ad
import numpy as np
import pytest
from scipy import sparse

import epivi
from epivi._errors import DataError
from epivi._keys import OBS_N_EXPRESSED
from epivi.models.expresser.fields import bin_occupancy, matched, without_version


def test_versions_of_ensembl_identifiers_are_cut_off_and_nothing_else() -> None:
    names = ["ENSMUSG00000000001.4", "ENSG00000141510", "AC233755.1", "ENSG00000002586.20_PAR_Y", "MT-CO1"]
    assert without_version(names) == [
        "ENSMUSG00000000001",
        "ENSG00000141510",
        "AC233755.1",
        "ENSG00000002586_PAR_Y",
        "MT-CO1",
    ]


@pytest.mark.parametrize("form", ["explicit zeros", "dense", "int", "float64", "csc"])
def test_forms_of_storage_agree(counts, make, form) -> None:
    expected = make(counts.copy()).get_latent_representation(pool="expression")
    other = counts.copy()
    x = counts.X.toarray()
    if form == "explicit zeros":
        full = sparse.csr_matrix(x + 1)
        full.data -= 1
        other.X = full
    elif form == "csc":
        other.X = sparse.csc_matrix(x)
    else:
        other.X = {"dense": x, "int": sparse.csr_matrix(x.astype(np.int64)), "float64": counts.X.astype(float)}[form]
    assert np.allclose(make(other).get_latent_representation(pool="expression"), expected, atol=1e-6)


def test_genes_match_by_name_or_by_the_other_name(counts, make) -> None:
    counts.var["ids"] = [f"ENSG{i:011d}.{i % 3}" for i in range(60)]
    model = make(counts, {"gene_key": "ids"})
    assert model.feature_names[5] == "ENSG00000000005"
    expected = model.get_latent_representation()
    by_symbol = ad.AnnData(counts.X, obs=counts.obs[["batch"]], var=counts.var[[]])
    assert np.array_equal(model.get_latent_representation(by_symbol), expected)
    by_id = by_symbol.copy()
    by_id.var_names = [f"ENSG{i:011d}.9" for i in range(60)]
    assert np.array_equal(model.get_latent_representation(by_id), expected)


def test_the_combination_that_finds_most_genes_is_taken(counts) -> None:
    names = np.array([f"x{i}" for i in range(60)])
    found = matched(names, counts.var_names.to_numpy(dtype=str), counts, None)
    assert found.known.tolist() == list(range(60))
    assert found.rows.tolist() == list(range(1, 61))


def test_columns_in_another_order_change_no_result(trained) -> None:
    data = trained.adata.copy()
    order = np.random.default_rng(0).permutation(60)
    permuted = ad.AnnData(data.X[:, order], obs=data.obs[["batch"]], var=data.var.iloc[order])
    for pool in ("mean", "expression", "decoder"):
        one = trained.get_latent_representation(pool=pool)
        assert np.allclose(trained.get_latent_representation(permuted, pool=pool), one, atol=1e-5)


def test_unknown_genes_are_left_out_and_missing_ones_are_zero(trained) -> None:
    data = trained.adata
    query = ad.AnnData(sparse.hstack([data.X[:, 10:], data.X[:, :3]]).tocsr(), obs=data.obs[["batch"]].copy())
    query.var_names = [*data.var_names[10:], "new1", "new2", "new3"]
    zeroed = ad.AnnData(data.X.toarray(), obs=data.obs[["batch"]].copy(), var=data.var[[]])
    zeroed.X[:, :10] = 0
    one, two = (trained.get_latent_representation(d, pool="expression") for d in (query, zeroed))
    assert np.allclose(one, two, atol=1e-5)
    assert query.obs[OBS_N_EXPRESSED].to_numpy().max() <= 50


def test_a_query_with_most_counts_on_unknown_genes_is_refused(trained) -> None:
    data = trained.adata
    query = ad.AnnData(data.X.copy(), obs=data.obs[["batch"]].copy())
    query.var_names = [f"ENSG{i}" for i in range(60)]
    with pytest.raises(DataError, match=r"0% of the counts.*look like \['ENSG0'.*model's like \['g0'"):
        trained.get_latent_representation(query)


def test_data_on_disk_are_read_row_by_row(counts, make, fit, tmp_path) -> None:
    counts.write_h5ad(tmp_path / "counts.h5ad")
    memory = fit(make(counts), max_epochs=1)
    backed = ad.read_h5ad(tmp_path / "counts.h5ad", backed="r")
    disk = fit(make(backed), max_epochs=1)
    assert not sparse.issparse(disk.adata.X)
    assert np.array_equal(disk.get_gene_embeddings().to_numpy(), memory.get_gene_embeddings().to_numpy())
    one, two = (m.impute(indices=[3, 1], mode="all").X.toarray() for m in (disk, memory))
    assert np.array_equal(one, two)
    backed.file.close()


def test_occupancy_of_bins_is_that_of_a_loop() -> None:
    rng = np.random.default_rng(0)
    x = rng.poisson(0.5, (30, 40)) * rng.integers(1, 4, (30, 40))
    x[:, 0] += 1
    bins = []
    for row in x:
        value = np.log1p(1e4 * row[row > 0] / row.sum())
        bins += np.ceil(20 * value / value.max() - 1e-9).astype(int).tolist()
    share = np.bincount(bins)[np.unique(bins)] / len(bins)
    report = bin_occupancy(sparse.csr_matrix(x), 20)
    assert report["n_occupied"] == len(share)
    assert report["n_effective"] == pytest.approx(np.exp(-(share * np.log(share)).sum()))
    assert report["single_counts"] == pytest.approx((x == 1).sum() / (x > 0).sum())


def test_the_front_door_has_the_model() -> None:
    assert epivi.Expresser.__name__ == "Expresser"
