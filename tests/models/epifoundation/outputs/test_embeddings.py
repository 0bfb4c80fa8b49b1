from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

import epivi
from epivi import _keys as keys
from epivi._errors import ConfigError, DataError


def test_vectors_of_peaks_are_what_the_transformer_reads(pretrained, simulated):
    table = pretrained.get_peak_embeddings()
    assert list(table.index) == list(simulated["atac"].var_names)
    assert table.shape == (80, 32)
    encoder = pretrained.module.encoder
    batch = pretrained._encoding(pretrained.adata, targets=False)(
        pretrained.adata_manager.create_torch_dataset()[np.array([8])]
    )
    with torch.no_grad():
        vectors = encoder.embed(batch[keys.BATCH_TOKENS], batch[keys.BATCH_TOKEN_CHROM], None, None)[0, 1:]
    opened = np.flatnonzero(simulated["atac"].X[8].toarray()[0])
    np.testing.assert_allclose(table.to_numpy()[opened], vectors.numpy(), rtol=1e-5, atol=1e-6)


def test_vectors_of_genes_are_what_the_decoder_reads(pretrained, expressive):
    for model in (pretrained, expressive):
        table = model.get_gene_embeddings()
        assert list(table.index) == model.gene_names.tolist()
        with torch.no_grad():
            expected = model.module.genes(model.module.encoder.places).numpy()
        np.testing.assert_allclose(table, expected, rtol=1e-6)


def test_positions_of_the_genome_enter_the_vectors_of_peaks(simulated, make, learn):
    model = learn(make(simulated.copy(), positions="genome", peak_identity=False))
    table = model.get_peak_embeddings().to_numpy()
    codes = simulated["atac"].var["chrom"].astype(str).to_numpy()
    bins = ((simulated["atac"].var["start"] + simulated["atac"].var["end"]) // 2 // 100_000).to_numpy()
    places = [*zip(codes, bins, strict=True)]
    pairs = [(i, j) for i in range(80) for j in range(i) if places[i] == places[j]]
    assert pairs
    # peaks of one bin share a vector, those of others do not
    for i, j in pairs:
        np.testing.assert_array_equal(table[i], table[j])
    assert len(np.unique(table, axis=0)) == len(set(places))


def test_models_without_genes_say_so(annotated):
    with pytest.raises(ConfigError, match="The model has no genes"):
        annotated.get_gene_embeddings()
    with pytest.raises(ConfigError, match="predicts no expression"):
        annotated.get_gene_peak_scores(["gene_0"])


@pytest.mark.parametrize("which", ["pretrained", "expressive"])
def test_scores_are_gradient_times_input_by_finite_differences(request, copy_of, which):
    model = copy_of(request.getfixturevalue(which))
    model.module.double()
    gene, row = 5, 21
    scores = model.get_gene_peak_scores(["gene_5"], indices=[row]).to_numpy()[0]
    batch = model._encoding(model.adata, targets=False)(model.adata_manager.create_torch_dataset()[np.array([row])])
    encoder = model.module.encoder

    @torch.no_grad()
    def predicted(x):
        z = encoder.transformer(x, torch.ones(1, x.shape[1], dtype=torch.bool))[:, 0]
        outputs = model.module.generative(z, torch.tensor([[gene]]))["genes"][0, 0]
        return float(outputs[-1] - (outputs[0] if which == "pretrained" else 0.0))

    with torch.no_grad():
        x = encoder.embed(batch[keys.BATCH_TOKENS], batch[keys.BATCH_TOKEN_CHROM], None, None)
    opened = batch[keys.BATCH_TOKENS][0, 1:].numpy() - 2
    step = 1e-6
    for at in (1, 4, len(opened)):
        # along the vector of the peak: the derivative by its length is gradient times input
        up, down = x.clone(), x.clone()
        up[0, at] *= 1 + step
        down[0, at] *= 1 - step
        expected = (predicted(up) - predicted(down)) / (2 * step)
        assert scores[opened[at - 1]] == pytest.approx(expected, rel=1e-4, abs=1e-8)
    closed = np.setdiff1d(np.arange(80), opened)
    assert not scores[closed].any()
    assert np.abs(scores[opened]).min() > 0


def test_scores_of_groups_are_means_over_cells_with_the_peak(pretrained, simulated):
    table = pretrained.get_gene_peak_scores(["gene_3", "gene_0"], groupby="cell_type")
    assert list(table.index) == [(g, f"type_{t}") for g in ("gene_3", "gene_0") for t in range(3)]
    assert table.index.names == ["gene", "group"]
    assert list(table.columns) == list(simulated["atac"].var_names)
    single = np.stack([pretrained.get_gene_peak_scores(["gene_0"], indices=[row]).to_numpy()[0] for row in range(60)])
    is_open = simulated["atac"].X.toarray() > 0
    for group in range(3):
        own = (simulated.obs["cell_type"] == f"type_{group}").to_numpy()
        expected = single[own].sum(0) / np.maximum(is_open[own].sum(0), 1)
        np.testing.assert_allclose(table.loc[("gene_0", f"type_{group}")], expected, rtol=1e-3, atol=1e-6)
    whole = pretrained.get_gene_peak_scores("gene_0", batch_size=7)
    assert list(whole.index) == [("gene_0", "all")]
    np.testing.assert_allclose(whole.to_numpy()[0], single.sum(0) / np.maximum(is_open.sum(0), 1), rtol=1e-3, atol=1e-6)


def test_scores_of_all_genes_in_any_order_are_theirs(expressive):
    genes = expressive.gene_names[::-1]
    table = expressive.get_gene_peak_scores(genes, indices=[0, 1])
    for gene in ("gene_0", "gene_11"):
        one = expressive.get_gene_peak_scores([gene], indices=[0, 1])
        np.testing.assert_allclose(table.loc[(gene, "all")], one.loc[(gene, "all")], rtol=1e-4, atol=1e-7)


def test_scores_count_what_is_read_off_near_peaks_directly(near, copy_of):
    without = copy_of(near)
    without.module.local.is_used.fill_(0.0)
    both, alone = (model.get_gene_peak_scores(["gene_3", "gene_9"], groupby="cell_type") for model in (near, without))
    local = near.module.local
    for gene in (3, 9):
        own = (local.gene == gene).numpy()
        expected = np.zeros(80)
        expected[local.peak[own]] = local.weight.detach().numpy()[own] * float(near.module.gene_sd[gene])
        difference = (both - alone).xs(f"gene_{gene}", level="gene")
        is_read = (alone.xs(f"gene_{gene}", level="gene") != 0).to_numpy()
        np.testing.assert_allclose(difference, expected * is_read, rtol=1e-4, atol=1e-5)


def test_scores_leave_the_model_as_it_is(own):
    own.get_gene_peak_scores(["gene_0"], indices=[0])
    assert all(parameter.grad is None for parameter in own.module.parameters())
    assert all(parameter.requires_grad for parameter in own.module.parameters())


def test_scores_need_known_genes_and_groups(pretrained):
    with pytest.raises(ConfigError, match="first 'gene_99'"):
        pretrained.get_gene_peak_scores(["gene_99"])
    with pytest.raises(DataError, match="groupby='type' is no column of obs"):
        pretrained.get_gene_peak_scores(["gene_0"], groupby="type")


def test_projected_onto_themselves_cells_are_the_same(pretrained, simulated):
    for separator in (":", "-"):
        peaks = simulated["atac"].copy()
        # the bare names, in both formats
        peaks.var = pd.DataFrame(index=[name.replace(":", separator) for name in peaks.var_names])
        projected = pretrained.project_peaks(peaks, min_overlap=1.0)
        assert list(projected.var_names) == list(simulated["atac"].var_names)
        assert projected.uns["projection"]["share_peaks_used"] == 1.0
        assert projected.uns["projection"]["share_entries_kept"] == 1.0
        np.testing.assert_array_equal(
            pretrained.get_latent_representation(projected), pretrained.get_latent_representation()
        )


def test_moved_peaks_are_brought_back(pretrained, simulated):
    atac = simulated["atac"]
    width = (atac.var["end"] - atac.var["start"]).min()
    shift = int(width) // 4
    moved = epivi.simulate.shifted_peaks(atac.copy(), shift=shift, merge=False, seed=3)
    projected = pretrained.project_peaks(moved, how="reciprocal")
    column = moved.uns["simulation"]["column"]
    latent, found = pretrained.get_latent_representation(), pretrained.get_latent_representation(projected)
    # peaks that lie closer than they were moved may change places
    hits = projected.X.toarray() > 0
    truth = atac.X.toarray() > 0
    assert (hits == truth).all(0).mean() > 0.8
    assert column.size == 80
    cosine = (latent * found).sum(1) / np.linalg.norm(latent, axis=1) / np.linalg.norm(found, axis=1)
    assert cosine.min() > 0.9


def test_the_report_of_a_projection_against_a_toy_genome(pretrained, simulated):
    names = simulated["atac"].var_names[[3, 40]].tolist()
    chrom, start, end = simulated["atac"].var.iloc[10][["chrom", "start", "end"]]
    query_names = [*names, f"{chrom}:{start + 1}-{end - 1}", "chrUn-x.1:5-9"]
    query = type(simulated["atac"])(
        sparse.csr_matrix([[1, 0, 2, 1], [0, 1, 0, 1], [1, 1, 0, 0]]),
        obs=pd.DataFrame(index=["a", "b", "c"]),
        var=pd.DataFrame(index=query_names),
    )
    projected = pretrained.project_peaks(query, how="reciprocal", min_share=0.0)
    report = projected.uns["projection"]
    assert report["share_peaks_used"] == 0.75
    assert report["share_entries_kept"] == 5 / 7
    assert report["share_targets_hit"] == 3 / 80
    assert report["n_contigs_unknown"] == 1
    assert projected.X[:, [3, 40, 10]].toarray().tolist() == [[1, 0, 2], [0, 1, 0], [1, 1, 0]]
    assert pretrained.get_latent_representation(projected).shape == (3, 32)
