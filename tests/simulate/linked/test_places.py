from __future__ import annotations

import inspect

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from epivi.simulate import linked_multiome
from epivi.simulate.linked._places import lay_out, link_table
from epivi.simulate.linked._setting import LINK_BP, MAX_LINKS, LinkedSetting

DEFAULTS = {key: p.default for key, p in inspect.signature(linked_multiome).parameters.items()}


def places(**changes):
    return lay_out(LinkedSetting.checked({**DEFAULTS, **changes}))


@settings(max_examples=40, deadline=None)
@given(
    n_genes=st.integers(1, 40),
    k=st.integers(1, MAX_LINKS),
    extra=st.integers(0, 150),
    seed=st.integers(0, 50),
)
def test_genome_is_sound_and_links_lie_near(n_genes, k, extra, seed):
    peaks, genes, link_gk, sizes = places(n_genes=n_genes, peaks_per_gene=k, n_peaks=k + extra, seed=seed)
    assert len(peaks) == k + extra
    assert len(genes) == n_genes
    assert peaks.index.is_unique
    for table in (peaks, genes):
        assert (table["start"] >= 0).all()
        assert (table["end"] > table["start"]).all()
        assert (table["end"] <= table["chrom"].astype(str).map(sizes)).all()
    same = peaks["chrom"].cat.codes.diff().to_numpy()[1:]
    assert (same >= 0).all()
    gap = peaks["start"].to_numpy()[1:] - peaks["end"].to_numpy()[:-1]
    assert (gap[same == 0] > 0).all()

    assert link_gk.shape == (n_genes, k)
    assert all(len(set(row)) == k for row in link_gk.tolist())
    np.testing.assert_array_equal(np.unique(link_gk), np.flatnonzero(peaks["kind"] == "linked"))
    links = link_table(peaks, genes, link_gk)
    origin = np.where(genes["strand"] == "+", genes["start"], genes["end"])[links["gene_index"]]
    at = links["peak_index"].to_numpy()
    centre = (peaks["start"].to_numpy() + peaks["end"].to_numpy())[at] / 2
    np.testing.assert_array_equal(links["distance"], np.abs(centre - origin))
    assert (links["distance"] <= LINK_BP).all()
    assert (
        peaks["chrom"].astype(str).to_numpy()[at] == genes["chrom"].astype(str).to_numpy()[links["gene_index"]]
    ).all()
    assert (peaks.index[at] == links["peak"]).all()
    assert (genes.index[links["gene_index"]] == links["gene"]).all()


def test_enough_peaks_are_not_shared_and_scarce_ones_are():
    peaks, _, link_gk, _ = places(n_genes=50, n_peaks=400)
    assert len(np.unique(link_gk)) == link_gk.size == 150
    assert abs((peaks["kind"] == "type").sum() - 125) <= 2
    peaks, genes, link_gk, sizes = places()
    assert (peaks["kind"] == "linked").sum() == 450
    assert np.bincount(link_gk.ravel()).max() == 2
    assert list(sizes) == ["chr1", "chr2", "chr3", "chr4"]
    assert genes["chrom"].value_counts(sort=False).tolist() == [79, 60, 40, 21]
    assert set(genes["strand"]) == {"+", "-"}


def test_some_peaks_lie_close_together_and_the_layout_follows_the_seed():
    peaks, genes, _, _ = places(seed=3)
    gap = peaks["start"].to_numpy()[1:] - peaks["end"].to_numpy()[:-1]
    assert ((gap > 0) & (gap < 1000)).any()
    assert not genes.equals(places(seed=4)[1])
    assert genes.equals(places(seed=3)[1])
