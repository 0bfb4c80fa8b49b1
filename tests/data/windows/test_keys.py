from __future__ import annotations

import pytest

from epivi._errors import ConfigError
from epivi.data.windows import ExperimentKeys


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"counts_key": None, "signal_key": None}, "at least one of them is needed"),
        ({"fasta": "a.fa", "dna_key": None}, "fasta is given and dna_key is None"),
        ({"unseen": "guess"}, "unseen='guess' is not valid"),
        ({"continuous_covariates": "depth"}, "continuous_covariates='depth' is not valid: give a list"),
        ({"categorical_covariates": "run_type"}, "categorical_covariates='run_type' is not valid"),
        ({"categorical_covariates": ["a"], "continuous_covariates": ["a"]}, "'a'"),
    ],
)
def test_keys_that_cannot_be_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        ExperimentKeys(**options)
