"""The network of genes against a loop over cells."""

import numpy as np
import pytest

from epivi import _keys as keys
from epivi._errors import ConfigError
from epivi.models.expresser.network import gather_rows
from epivi.models.expresser.outputs import network as module


@pytest.mark.parametrize("score", ["lift", "mass"])
def test_scores_are_means_over_cells(trained, score) -> None:
    total, pairs, asked = np.zeros((60, 60)), np.zeros((60, 60)), np.zeros(60)
    reading = trained._read(batch_size=1)
    for _, cells in reading.batches:
        for hidden_o, batch, context in trained._folds(reading.encoding, cells):
            query = gather_rows(context, batch[keys.BATCH_QUERY])
            weight = trained.module.network.attention.weights(query, context, batch[keys.BATCH_BIN] > 0)[0].detach()
            tokens = cells.token_o - 1
            for i, gene in enumerate(tokens[hidden_o]):
                asked[gene] += 1
                for j in np.flatnonzero(~hidden_o):
                    total[gene, tokens[j]] += weight[i, j].item() * ((~hidden_o).sum() if score == "lift" else 1)
                    pairs[gene, tokens[j]] += 1
    expected = total / np.maximum(pairs if score == "lift" else asked[:, None], 1)
    expected[pairs < 3] = 0
    got = trained.get_gene_network(score=score, top=60, return_sparse=True).toarray()
    assert np.allclose(got, expected, atol=1e-4)
    if score == "mass":
        every = trained.get_gene_network(score="mass", top=60, min_cells=1, return_sparse=True)
        sums = np.asarray(every.sum(1)).ravel()
        assert np.allclose(sums[asked > 0], 1.0, atol=1e-4)


def test_table_lists_the_best_first(trained) -> None:
    table = trained.get_gene_network(genes=["g9", "g0"], top=4)
    assert table["gene"].tolist() == ["g9"] * 4 + ["g0"] * 4
    assert (table.groupby("gene", sort=False)["score"].diff().dropna() <= 0).all()
    matrix = trained.get_gene_network(genes=["g9", "g0"], top=4, return_sparse=True)
    first = table.iloc[0]
    assert matrix[9, int(first["attends_to"][1:])] == pytest.approx(first["score"])
    assert not (table["gene"] == table["attends_to"]).any()


def test_what_cannot_be_told_is_refused(trained, build, make, monkeypatch) -> None:
    with pytest.raises(ConfigError, match="score='sum'"):
        trained.get_gene_network(score="sum")
    with pytest.raises(ConfigError, match="top=0"):
        trained.get_gene_network(top=0)
    with pytest.raises(ConfigError, match="decoder='encoder' has no attention"):
        make(build(), decoder="encoder").get_gene_network()
    monkeypatch.setattr(module, "MOST_PAIRS", 600)
    with pytest.raises(ConfigError, match="name at most 10 in genes="):
        trained.get_gene_network()
