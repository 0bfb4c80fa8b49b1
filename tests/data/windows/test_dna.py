from __future__ import annotations

import numpy as np
import pytest

from epivi._errors import DataError
from epivi.data.windows import ExperimentKeys, ExperimentsField, WindowDataset


def written(tmp_path, sequences):
    path = tmp_path / "a.fa"
    path.write_text("".join(f">{name}\n{''.join('ACGTN'[c] for c in codes)}\n" for name, codes in sequences.items()))
    return path


def test_a_fasta_file_gives_the_bases_under_the_bins(adata, tmp_path):
    rng = np.random.default_rng(1)
    sequences = {"chr2": rng.integers(0, 5, 137), "chr1": rng.integers(0, 5, 340)}
    del adata.uns["dna"]
    field = ExperimentsField(ExperimentKeys(fasta=written(tmp_path, sequences)))
    with pytest.raises(DataError, match=r"fasta needs the lengths of the chromosomes in adata.uns\['genome'\]"):
        field.register_field(adata)
    adata.uns["genome"] = {"chrom_sizes": {"chr1": 330, "chr2": 137}}
    with pytest.raises(DataError, match="reach to chr1:335, beyond the 330 bp"):
        field.register_field(adata)
    assert "dna" not in adata.uns
    adata.uns["genome"]["chrom_sizes"]["chr1"] = 340
    state = field.register_field(adata)
    c1, c2 = sequences["chr1"], sequences["chr2"]
    np.testing.assert_array_equal(adata.uns["dna"], np.concatenate([c1[:200], c1[300:335], c2[10:135]]))
    assert WindowDataset(adata, state, 4)[[[0, 47]]]["dna"].tolist() == [c2[10:30].tolist()]


@pytest.mark.parametrize(
    ("dna", "message"),
    [
        ("ACGT", r"adata.uns\['dna'\] is str: codes of bases as uint8"),
        (np.zeros(360), r"uns\['dna'\] is float64: codes"),
        (np.zeros(359, dtype=np.uint8), r"has the shape \(359,\), needed is \(360,\)"),
        (np.r_[np.zeros(359), 5].astype(np.uint8), r"is 5 at position 359: codes are 0-3"),
    ],
)
def test_bad_dna_is_refused(adata, dna, message):
    adata.uns["dna"] = dna
    with pytest.raises(DataError, match=message):
        ExperimentsField().register_field(adata)
