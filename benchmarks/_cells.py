"""Single-cell data sets of the benchmark of quality, and the methods that are compared on each."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, NamedTuple

import _rivals as rivals
import numpy as np
from _runs import DATA, QUIET, held_out_scores, scores

if TYPE_CHECKING:
    from collections.abc import Callable

    from anndata import AnnData

    Methods = dict[str, Callable[[int], dict[str, float]]]

MULTIOMES = {
    "snareseq_mouse_cortex": ("atac", "cell_type", "batch"),
    "scicar_mouse_kidney": ("atac", "cell_type", None),
    "scicar_a549": ("atac", "time_h", None),
    "pairedtag_mouse_brain_h3k27me3": ("h3k27me3", "cell_type", "sample"),
}
ACCESSIBILITY = {"preissl2018_forebrain_atac": "cell_type"}
EXPRESSION: dict[str, tuple[str | None, str | None]] = {
    "pbmc3k_rna": ("cell_type", None),
    "mouse_bladder_rna": ("cell_type", None),
    "worm_neuron_rna": ("cell_type", None),
    "bmmc_multiome_starter_rna_only": ("cell_type", "batch"),
    "kang2018_pbmc_ifnb_rna": (None, "stim"),
}
HELD_OUT = 0.2
DEEP = {"max_epochs": 100}
MIN_SHARE_OF_CELLS = 0.01


class Size(NamedTuple):
    """How much of a data set is used: most cells and features, and epochs of every network (``None``: its own)."""

    cells: int | None = None
    features: int | None = None
    epochs: int | None = None

    def of(self, epochs: int | None) -> int | None:
        """Return the epochs of a method that has so many in the full form."""
        return epochs if self.epochs is None else self.epochs

    @property
    def train(self) -> dict[str, int]:
        """Return the arguments of ``train``: the model's own epochs in the full form."""
        return {} if self.epochs is None else {"max_epochs": self.epochs}

    def rows(self, n: int) -> np.ndarray:
        """Return the cells that are used."""
        rows = np.random.default_rng(0).permutation(n)
        return np.sort(rows if self.cells is None else rows[: self.cells])

    def columns(self, matrix: Any) -> np.ndarray:
        """Return the features that are used: those found in most cells."""
        found = np.asarray((matrix > 0).sum(0)).ravel()
        order = np.argsort(-found, kind="stable")
        return np.sort(order[: self.features] if self.features is not None else order)


FULL, QUICK = Size(), Size(cells=1_000, features=4_000, epochs=4)


class Multiome:
    """A multiome, its labels, and the methods to compare on it."""

    def __init__(self, name: str, size: Size = FULL) -> None:
        import mudata

        import epivi

        self.name, self.size = name, size
        self.atac, self.labels_key, self.batch_key = MULTIOMES[name]
        self.mdata = mudata.read_h5mu(DATA / f"{name}.h5mu")
        if size is not FULL:
            self.mdata = self._smaller(self.mdata)
        self.labels = self.mdata.obs[self.labels_key].astype(str).to_numpy()
        self.batch = self.mdata.obs[self.batch_key].astype(str).to_numpy() if self.batch_key else None
        self.depth = np.asarray((self.mdata[self.atac].X > 0).sum(1)).ravel()
        rna = self.mdata["rna"]
        epivi.pp.rna_reference(rna)
        if not (has := np.asarray(rna.obsm["X_pca"]).any(axis=1)).all():
            rna.obsm["X_pca"][~has] = np.nan
        rng = np.random.default_rng(0)
        self.held = np.zeros(self.mdata.n_obs, dtype=bool)
        self.held[rng.permutation(self.mdata.n_obs)[: int(HELD_OUT * self.mdata.n_obs)]] = True

    def _smaller(self, mdata: Any) -> Any:
        """Return some cells and features, cells that are then empty left out."""
        import mudata

        rows = self.size.rows(mdata.n_obs)
        parts = {key: mdata[key][rows].copy() for key in ("rna", self.atac)}
        parts = {key: part[:, self.size.columns(part.X)].copy() for key, part in parts.items()}
        filled = np.logical_and.reduce([np.asarray(part.X.sum(1)).ravel() > 0 for part in parts.values()])
        small = mudata.MuData({key: part[filled].copy() for key, part in parts.items()})
        for key in filter(None, (self.labels_key, self.batch_key)):
            small.obs[key] = mdata.obs[key].to_numpy()[rows][filled]
        return small

    def reference(self) -> np.ndarray:
        """The RNA reference, cells without counts at the origin."""
        return np.nan_to_num(np.asarray(self.mdata["rna"].obsm["X_pca"]))

    def judge(self, values: np.ndarray, *, sees_rna: bool = False, held: bool = False) -> dict[str, float]:
        """Score an embedding, with labels passed to held-out cells where it did not see their RNA."""
        before = self.reference() if sees_rna else self._lsi()
        found = scores(values, self.labels, self.depth, self.batch, None if self.batch is None else before)
        return found | (held_out_scores(values, self.labels, self.held) if held else {})

    def _lsi(self) -> np.ndarray:
        return rivals.lsi(self.mdata[self.atac], 10, 0)

    def _hidden(self) -> Any:
        """The same multiome, the RNA of the held-out cells taken away."""
        import mudata

        rna = self.mdata["rna"][~self.held].copy()
        hidden = mudata.MuData({self.atac: self.mdata[self.atac].copy(), "rna": rna})
        hidden = hidden[self.mdata.obs_names].copy()
        for key in (self.labels_key, self.batch_key):
            if key is not None:
                hidden.obs[key] = self.mdata.obs[key].to_numpy()
        return hidden

    def part(self, key: str) -> AnnData:
        """Return a modality with the batches among its obs."""
        adata = self.mdata[key].copy()
        if self.batch_key:
            adata.obs[self.batch_key] = self.batch
        return adata

    def lsi(self, seed: int) -> dict[str, float]:
        return self.judge(rivals.lsi(self.mdata[self.atac], 10, seed), held=True)

    def rna(self, seed: int) -> dict[str, float]:  # noqa: ARG002
        return self.judge(self.reference(), sees_rna=True, held=True)

    def sailer(self, seed: int, **options: Any) -> dict[str, float]:
        import epivi

        adata = self.part(self.atac)
        epivi.SAILER.setup_anndata(adata, batch_key=self.batch_key)
        train = options.pop("train", {})
        model = epivi.SAILER(adata, n_latent=50, seed=seed, **options)
        model.train(**{"batch_size": 200} | train | self.size.train | QUIET)
        return self.judge(model.get_latent_representation(), held=True)

    def sailerx(self, seed: int, **options: Any) -> dict[str, float]:
        import epivi

        train = options.pop("train", {})
        result: dict[str, float] = {}
        for hides in (False, True):
            mdata = self._hidden() if hides else self.mdata.copy()
            epivi.SAILERX.setup_mudata(
                mdata,
                modalities={"atac": self.atac, "rna": "rna"},
                reference_key="X_pca",
                batch_key=self.batch_key,
            )
            model = epivi.SAILERX(mdata, seed=seed, **options)
            start = time.perf_counter()
            model.train(**train | self.size.train | QUIET)
            values = model.get_latent_representation()
            if hides:
                result |= held_out_scores(values, self.labels, self.held)
            else:
                result |= self.judge(values, sees_rna=True)
                result |= {"seconds": time.perf_counter() - start, "align_loss": model.get_alignment_loss()}
        return result

    def epifoundation(self, seed: int) -> dict[str, float]:
        """Label-free vectors, pretrained on the genes of the same cells."""
        import epivi

        mdata = self.mdata.copy()
        epivi.EpiFoundation.setup_mudata(mdata, modalities={"atac": self.atac, "rna": "rna"})
        return self.judge(epifoundation(mdata, seed, self.size), sees_rna=True)

    def methods(self, *, variants: bool = False) -> Methods:
        """Return methods by name, the first ones without any part of the papers' ideas; ``variants`` of SAILERX too."""
        atac, batch_key, n = self.part(self.atac), self.batch_key, self.size.of(40)
        found: Methods = {
            "LSI of ATAC": self.lsi,
            "PCA of RNA (reference)": self.rna,
            f"PEAKVI of ATAC, {n} epochs": lambda seed: self.judge(rivals.peakvi(atac, batch_key, n, seed)),
        }
        if atac.X.max() > 1:
            run = f"POISSONVI of ATAC, {n} epochs"
            found[run] = lambda seed: self.judge(rivals.poissonvi(atac, batch_key, n, seed))
        if batch_key:
            found |= self._corrections()
        found |= {
            f"MULTIVI, {n} epochs": lambda seed: self.judge(
                rivals.multivi(self.mdata, self.atac, batch_key, n, seed), sees_rna=True
            ),
            "MOFA+": lambda seed: self.judge(
                rivals.mofa(self.mdata, self.atac, n_factors=15, iterations=self.size.of(1000) or 1000, seed=seed),
                sees_rna=True,
            ),
            "SAILER, ATAC alone": lambda seed: self.sailer(seed, encoder="auto"),
            "SAILERX": lambda seed: self.sailerx(seed, encoder="auto"),
            "EpiFoundation, peaks and genes": self.epifoundation,
        }
        return found | (self._variants() if variants else {})

    def _corrections(self) -> Methods:
        """Return batch correction of the RNA: it is where labels are found, and where batches differ."""
        rna, key, epochs = self.part("rna"), self.batch_key, self.size.of(None)

        def judge(values: np.ndarray) -> dict[str, float]:
            return self.judge(values, sees_rna=True)

        return {
            "Harmony of RNA": lambda seed: judge(rivals.harmony(self.reference(), self.batch, seed)),
            "SCVI of RNA": lambda seed: judge(rivals.scvi_latent(rna, key, epochs, seed)),
            "scANVI of RNA, told half of the labels": lambda seed: judge(
                rivals.scanvi_latent(rna, self.labels, key, epochs, seed)
            ),
        }

    def _variants(self) -> Methods:
        return {
            "SAILERX, weight 4.57": lambda seed: self.sailerx(seed, encoder="auto", align_weight=4.57),
            "SAILERX, neighbour minibatches": lambda seed: self.sailerx(seed, encoder="auto", sampler="neighbors"),
            "SAILERX, fused posterior": lambda seed: self.sailerx(seed, encoder="auto", fuse_reference=True),
            "SAILERX, chromosome encoder, published weight": lambda seed: self.sailerx(seed, train=DEEP),
            "SAILERX, chromosome encoder, weight 45.7": lambda seed: self.sailerx(seed, align_weight=45.7, train=DEEP),
        }


def epifoundation(data: Any, seed: int, size: Size) -> np.ndarray:
    """Return label-free vectors of EpiFoundation at the size of its own benchmark."""
    from quality_epifoundation import NETWORK, PRETRAINING_EPOCHS

    import epivi

    model = epivi.EpiFoundation(data, seed=seed, **NETWORK)
    model.train(max_epochs=size.of(PRETRAINING_EPOCHS), **QUIET)
    return model.get_latent_representation()


class Accessibility:
    """A single ATAC data set and the methods to compare on it."""

    def __init__(self, name: str, size: Size = FULL) -> None:
        import anndata

        self.name, self.size = name, size
        adata = anndata.read_h5ad(DATA / f"{name}.h5ad")
        if size is not FULL:
            adata = adata[size.rows(adata.n_obs)]
            adata = adata[:, size.columns(adata.X)].copy()
        self.adata = adata
        self.labels = self.adata.obs[ACCESSIBILITY[name]].astype(str).to_numpy()
        self.depth = np.asarray((self.adata.X > 0).sum(1)).ravel()

    def judge(self, values: np.ndarray) -> dict[str, float]:
        """Score an embedding."""
        return scores(values, self.labels, self.depth)

    def sailer(self, seed: int, **options: Any) -> dict[str, float]:
        import epivi

        adata = self.adata.copy()
        epivi.SAILER.setup_anndata(adata)
        train = options.pop("train", {})
        model = epivi.SAILER(adata, seed=seed, **options)
        start = time.perf_counter()
        model.train(**train | self.size.train | QUIET)
        seconds = time.perf_counter() - start
        return self.judge(model.get_latent_representation()) | {"elbo": model.get_elbo(), "seconds": seconds}

    def epifoundation(self, seed: int) -> dict[str, float]:
        """Label-free vectors, pretrained on hidden peaks."""
        import epivi

        adata = self.adata.copy()
        epivi.EpiFoundation.setup_anndata(adata)
        return self.judge(epifoundation(adata, seed, self.size))

    def methods(self, *, variants: bool = False) -> Methods:
        """Methods by name; with ``variants`` the network of the thesis too."""
        n = self.size.of(200)
        found: Methods = {
            "LSI, 10 components": lambda seed: self.judge(rivals.lsi(self.adata, 10, seed)),
            "LSI, 30 components": lambda seed: self.judge(rivals.lsi(self.adata, 30, seed)),
            f"PEAKVI, {n} epochs": lambda seed: self.judge(rivals.peakvi(self.adata, None, n, seed)),
            "SAILER, encoder auto (linear)": lambda seed: self.sailer(seed, encoder="auto"),
            "EpiFoundation, peaks": self.epifoundation,
        }
        if variants:
            found["SAILER, dense (thesis)"] = lambda seed: self.sailer(seed, encoder="dense")
        return found


class Expression:
    """A data set of RNA with labels, batches or both, and the methods to compare on it."""

    def __init__(self, name: str, size: Size = FULL) -> None:
        import anndata

        labels_key, self.batch_key = EXPRESSION[name]
        self.name, self.size = name, size
        adata = anndata.read_h5ad(DATA / f"{name}.h5ad")
        adata.var_names_make_unique()
        adata = adata[size.rows(adata.n_obs)]
        share = np.asarray((adata.X > 0).mean(0)).ravel()
        adata = adata[:, share >= MIN_SHARE_OF_CELLS]
        self.adata = adata[:, size.columns(adata.X)].copy()
        self.labels = self.adata.obs[labels_key].astype(str).to_numpy() if labels_key else None
        self.batch = self.adata.obs[self.batch_key].astype(str).to_numpy() if self.batch_key else None
        self.depth = np.asarray(self.adata.X.sum(1)).ravel()

    def pca(self, seed: int = 0) -> np.ndarray:
        """Thirty principal components."""
        return rivals.pca(self.adata, 30, seed)

    def judge(self, values: np.ndarray) -> dict[str, float]:
        """Score an embedding."""
        return scores(values, self.labels, self.depth, self.batch, None if self.batch is None else self.pca())

    def expresser(self, seed: int) -> dict[str, float]:
        """Mean vectors of cells, at the size of its own benchmark."""
        from quality_expresser import NETWORK, TRAINING

        import epivi

        adata = self.adata.copy()
        epivi.Expresser.setup_anndata(adata)
        model = epivi.Expresser(adata, seed=seed, **NETWORK)
        model.train(max_epochs=self.size.of(8), **TRAINING | QUIET)
        values = model.get_latent_representation()
        return self.judge(np.nan_to_num(values))

    def methods(self, *, variants: bool = False) -> Methods:  # noqa: ARG002
        """Methods by name."""
        key, epochs = self.batch_key, self.size.of(None)
        found: Methods = {
            "PCA": lambda seed: self.judge(self.pca(seed)),
            "SCVI": lambda seed: self.judge(rivals.scvi_latent(self.adata, key, epochs, seed)),
        }
        if key:
            found["Harmony"] = lambda seed: self.judge(rivals.harmony(self.pca(seed), self.batch, seed))
        if self.labels is not None:
            found["scANVI, told half of the labels"] = lambda seed: self.judge(
                rivals.scanvi_latent(self.adata, self.labels, key, epochs, seed)
            )
        return found | {"Expresser": self.expresser}
