"""Vectors of genes: the table itself, and means over cells against a loop."""

import numpy as np
import pytest

from epivi._errors import ConfigError


def test_static_vectors_are_the_table(trained) -> None:
    frame = trained.get_gene_embeddings()
    assert list(frame.index) == list(trained.feature_names)
    assert np.array_equal(frame.to_numpy(), trained.module.network.genes.table.weight[1:].detach().numpy())
    assert trained.get_gene_embeddings(genes=["g7", "g2"]).equals(frame.loc[["g7", "g2"]])


@pytest.mark.parametrize("groupby", [None, "kind"])
def test_contextual_vectors_are_means_over_cells(trained, groupby) -> None:
    data = trained.adata
    encoding = trained._encoding(data)
    total, n = {}, {}
    for positions, cells in trained._read(batch_size=1).batches:
        encoded = encoding.encoded(cells, np.zeros(cells.token_o.size, dtype=bool))
        context = trained._context(encoded)[0].detach().numpy().astype(float)
        group = "" if groupby is None else data.obs[groupby].iloc[positions[0]]
        for token, vector in zip(encoded["tokens"][0].tolist(), context, strict=True):
            key = (group, f"g{token - 1}")
            total[key] = total.get(key, 0.0) + vector
            n[key] = n.get(key, 0) + 1
    frame = trained.get_gene_embeddings("contextual", groupby)
    counted = dict(zip(frame.index, frame.attrs["n_cells"], strict=True))
    for (group, gene), vector in total.items():
        at = gene if groupby is None else (group, gene)
        assert np.allclose(frame.loc[at], vector / n[group, gene], atol=1e-5)
        assert counted[at] == n[group, gene]
    assert frame.isna().all(axis=1).sum() == len(frame) - len(total)


def test_anndata_of_genes_holds_those_that_are_expressed(trained) -> None:
    frame = trained.get_gene_embeddings("contextual", "kind")
    adata = trained.get_gene_embeddings("contextual", "kind", return_anndata=True)
    assert adata.n_obs == (np.array(frame.attrs["n_cells"]) > 0).sum()
    row = adata.obs.iloc[5]
    assert np.array_equal(adata.X[5], frame.loc[(row["group"], row["gene"])].to_numpy())
    assert adata.obs_names[5] == f"{row['group']}|{row['gene']}"
    static = trained.get_gene_embeddings(return_anndata=True)
    assert list(static.obs_names) == list(trained.feature_names)


def test_wrong_kinds_are_refused(trained) -> None:
    with pytest.raises(ConfigError, match="kind='cell'"):
        trained.get_gene_embeddings("cell")
    with pytest.raises(ConfigError, match="groupby is for kind='contextual'"):
        trained.get_gene_embeddings(groupby="kind")
