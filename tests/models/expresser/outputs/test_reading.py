"""What is asked for is checked; batches come back in the order of the rows."""

import numpy as np
import pytest

from epivi._errors import ConfigError, DataError


def test_unknown_genes_groups_and_sizes_are_refused(trained) -> None:
    with pytest.raises(ConfigError, match=r"1 of 2 genes are not in the vocabulary of 60.*'g1x'"):
        trained.impute(genes=["g1", "g1x"], mode="all")
    with pytest.raises(ConfigError, match="genes is empty"):
        trained.get_gene_embeddings(genes=[])
    with pytest.raises(DataError, match=r"no column 'kinds'\. Did you mean 'kind'"):
        trained.get_gene_embeddings("contextual", "kinds")
    with pytest.raises(ConfigError, match="batch_size=0"):
        trained.get_latent_representation(batch_size=0)


def test_every_cell_is_read_once_with_all_its_genes(trained) -> None:
    reading = trained._read(indices=[5, 3, 17], batch_size=2)
    x = trained.adata.X.toarray()
    seen = {}
    for positions, cells in reading.batches:
        for at, position in enumerate(positions):
            part = slice(cells.indptr[at], cells.indptr[at + 1])
            row = np.zeros(60)
            row[cells.token_o[part] - 1] = cells.count_o[part]
            seen[int(position)] = row
    assert sorted(seen) == [0, 1, 2]
    assert all(np.array_equal(seen[i], x[row]) for i, row in enumerate([5, 3, 17]))
