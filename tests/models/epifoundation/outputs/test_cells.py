from __future__ import annotations

import mudata as md
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from epivi._errors import ConfigError


def test_cells_are_told_by_what_is_read_of_them(simulated, make):
    partial = md.MuData({"atac": simulated["atac"].copy(), "rna": simulated["rna"][20:].copy()})
    x = partial["atac"].X.toarray()
    x[3], x[4, :20] = 0, 1
    partial["atac"].X = sparse.csr_matrix(x)
    model = make(partial, setup={"batch_key": None, "labels_key": None, "empty_cells": "zero"}, max_peaks=20)
    table = model.describe_cells()
    n_open = pd.Series((x > 0).sum(1), index=simulated.obs_names)
    assert table["n_open"].to_dict() == n_open.to_dict()
    assert table["n_read"].to_dict() == n_open.clip(upper=20).to_dict()
    assert table["truncated"].to_dict() == (n_open > 20).to_dict()
    assert table.index[table["empty"]].tolist() == [simulated.obs_names[3]]
    assert table["has_rna"].to_dict() == {name: name in partial["rna"].obs_names for name in simulated.obs_names}
    assert 0 < table["truncated"].sum() < 60
    pd.testing.assert_frame_equal(model.describe_cells(indices=[5, 3]), table.iloc[[5, 3]])
    assert "truncated" not in partial.obs


def test_columns_are_written_where_that_is_asked_for(pretrained, simulated):
    for data in (simulated.copy(), simulated["atac"].copy()):
        table = pretrained.describe_cells(data, write=True)
        pd.testing.assert_frame_equal(data.obs[list(table)], table, check_names=False)
        assert table["has_rna"].all() == hasattr(data, "mod")
    with pytest.raises(ConfigError, match="write=True writes columns of all cells"):
        pretrained.describe_cells(simulated.copy(), [1, 2], write=True)


def test_a_query_is_described_by_the_peaks_of_the_model(pretrained, simulated):
    order = np.random.default_rng(0).permutation(80)
    query = simulated["atac"][:, order].copy()
    expected = pretrained.describe_cells(simulated["atac"].copy())
    pd.testing.assert_frame_equal(pretrained.describe_cells(query), expected)
