"""The scIB benchmark of embeddings: how well they keep cell types, mix batches, and what they know of confounders."""

from __future__ import annotations

import logging
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np

from epivi._errors import ConfigError, DataError, nearest
from epivi._keys import OBSM_LSI, OBSM_PCA
from epivi.metrics._inputs import Labels, as_embedding, as_labels, package_version
from epivi.metrics._scib import BATCH, BIO, N_NEIGHBORS, SILHOUETTE_MAX, Cells, absent_metrics, embedding_metrics
from epivi.metrics._scib import skipped_labels as find_skipped_labels
from epivi.metrics.embedding.information import confounder_information

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    import pandas as pd
    from numpy.typing import NDArray

logger = logging.getLogger(__name__)

_MIN_CELLS = 30
# of each total, the metrics of bio conservation and of batch correction
TOTALS = {
    "total_scib": (BIO, ("bras", "ilisi", "kbet", "graph_connectivity", "pcr_comparison")),
    "total_convnet": (
        ("silhouette_label", "nmi_leiden", "clisi"),
        ("silhouette_batch", "graph_connectivity", "ilisi", "kbet"),
    ),
}
BATCH_WEIGHT, BIO_WEIGHT = 0.4, 0.6


def benchmark(
    data: Any,
    embeddings: Sequence[str],
    batch_key: str | None = None,
    label_key: str | None = None,
    *,
    unintegrated_key: str | None = None,
    confounders: Sequence[str] = (),
    n_jobs: int = 1,
    seed: int = 0,
) -> pd.DataFrame:
    """Compare embeddings of the same cells by the metrics of scIB, and by their information on confounders.

    Parameters
    ----------
    data
        AnnData or MuData with the embeddings in `obsm`, and batches, labels and confounders in `obs`.
    embeddings
        Keys of `obsm`; one row of the result each.
    batch_key, label_key
        Columns of `obs` with the batch and the cell type. Without one of them, or with one batch, what can be computed
        is.
    unintegrated_key
        Key of `obsm` of an embedding before correction, for the PCR comparison; by default ``"X_pca"`` or
        ``"X_lsi"``, whichever is there (`attrs` says which).
    confounders
        More columns of `obs`, such as the depth; the batch is always among them.
    n_jobs
        Processes that cluster at different resolutions.
    seed
        Seed of the neighbour search above 8,192 cells, of subsamples, and of the estimates of information.

    Returns
    -------
    One row an embedding; columns by group and metric. Scores run from 0, bad, to 1, good.

    - ``bio``: `isolated_labels` (silhouette), `nmi_leiden` and `ari_leiden` at the resolution of best NMI,
      `silhouette_label`, `clisi`;
    - ``batch``: `bras`, `silhouette_batch`, `ilisi`, `kbet` (by label), `graph_connectivity`, `pcr_comparison`;
    - ``confounder``: ``I(z,<key>)`` and ``max I(z,<key>)``, mean and maximum over dimensions of
      `confounder_information`, in nats; low is good, and numbers of dimensions are not comparable;
    - ``aggregate``: `bio` and `batch`, the means of scIB's set; `total_scib` = 0.4 batch + 0.6 bio over that set
      (`bras` stands for the silhouette of batches, as in scib-metrics since 0.6); `total_convnet`, the same weights
      over the seven metrics of the ConvNet-VAE paper. The two totals are not comparable with each other.

    A metric that is absent for all embeddings leaves the aggregates, ``attrs["aggregates"]`` names those that went in;
    absent for one embedding alone, it makes its aggregates NaN. ``attrs["absent"]`` gives the reason of every NaN,
    ``attrs["skipped_labels"]`` the labels that `silhouette_batch` (with `bras`) and `kbet` leave out because of one
    batch or few cells; the rest of `attrs` are the settings and versions.

    Raises
    ------
    DataError
        If there are fewer than 30 cells, or an embedding, labels, batches or a confounder cannot be used.
    ConfigError
        If a key is unknown, or `embeddings` is empty or repeats one.

    Notes
    -----
    Neighbours are found once for each embedding, 90 with the cell itself, exactly below 8,192 cells and by pynndescent
    above, and cut to 50 for kBET and 15 for Leiden and graph connectivity. Silhouettes are taken on at most 50,000
    cells. Cells are sorted by their coordinates first, so that their order in `data` changes nothing. Scores are not
    scaled between embeddings. LISI and kBET follow scib-metrics, not scIB: compare with published numbers in order
    only. kBET searches the diffusion map of a label exactly, with a seeded start; scib-metrics does so approximately,
    with a random one, and takes fewer components for labels that come after a small one.

    References
    ----------
    Luecken et al., Nat. Methods 19, 41 (2022); Rautenstrauch and Ohler, Nat. Biotechnol. (2025), for BRAS.

    Examples
    --------
    >>> import numpy as np
    >>> from anndata import AnnData
    >>> rng = np.random.default_rng(0)
    >>> adata = AnnData(np.zeros((60, 1), dtype=np.float32))
    >>> adata.obsm["X_sailer"], adata.obs["depth"] = rng.normal(size=(60, 2)), rng.random(60)
    >>> table = benchmark(adata, ["X_sailer"], confounders=["depth"])
    >>> bool(table.loc["X_sailer", ("confounder", "I(z,depth)")] < 0.2), table.attrs["absent"]["clisi"]
    (True, 'no label_key was given')
    """
    z_of = _as_embeddings(data, embeddings)
    n = len(next(iter(z_of.values())))
    if n < _MIN_CELLS:
        msg = f"There are {n} cells: the metrics take neighbourhoods of up to 90, at least {_MIN_CELLS} are needed."
        raise DataError(msg)
    labels, batches = (_as_column(data, key, n) for key in (label_key, batch_key))
    pre_key = _unintegrated(data, unintegrated_key)
    pre_nd = as_embedding(data.obsm[pre_key], name=f"obsm['{pre_key}']") if pre_key else None
    cells = Cells(None if labels is None else labels.codes, None if batches is None else batches.codes, pre_nd)
    absent = absent_metrics(cells)
    known = list(dict.fromkeys([*([] if batch_key is None else [batch_key]), *confounders]))
    for key in known:
        _check_column(data, key)
    rows: dict[str, dict[str, float]] = {}
    information: dict[str, dict[str, float]] = {}
    failed: dict[str, str] = {}
    for key, z_nd in z_of.items():
        logger.info("Scoring '%s' of %d cells and %d dimensions.", key, n, z_nd.shape[1])
        rows[key], why = embedding_metrics(z_nd, cells, absent, n_jobs=n_jobs, seed=seed)
        failed |= {f"{key}: {metric}": reason for metric, reason in why.items()}
        information[key], unused = _information(z_nd, data, known, batch_key, seed)
        absent |= unused
    table, used = _assemble(rows, information)
    skipped = find_skipped_labels(cells)
    table.attrs.update(
        absent=absent | failed | used["absent"],
        aggregates=used["aggregates"],
        skipped_labels={
            metric: [] if labels is None else [labels.names[code] for code in codes]
            for metric, codes in skipped.items()
        },
        batch_key=batch_key,
        label_key=label_key,
        unintegrated_key=pre_key,
        n_cells=n,
        n_dimensions={key: z_nd.shape[1] for key, z_nd in z_of.items()},
        n_labels=0 if labels is None else len(labels.names),
        n_batches=0 if batches is None else len(batches.names),
        n_neighbors={use: min(k, n) for use, k in N_NEIGHBORS.items()},
        n_silhouette=min(n, SILHOUETTE_MAX),
        seed=int(seed),
        scib_metrics_version=version("scib-metrics"),
        epivi_version=package_version(),
    )
    return table


def scib_convnet(
    data: Any, embeddings: Sequence[str], batch_key: str, label_key: str, *, n_jobs: int = 1, seed: int = 0
) -> pd.DataFrame:
    """Compute the seven scIB metrics of the ConvNet-VAE paper and their weighted mean, 0.4 batch + 0.6 bio.

    Parameters
    ----------
    data, embeddings, batch_key, label_key, n_jobs, seed
        As in :func:`benchmark`; two batches and two labels or more.

    Returns
    -------
    One row an embedding: `silhouette_label`, `nmi_leiden`, `clisi`, `silhouette_batch`, `graph_connectivity`, `ilisi`,
    `kbet`, their means `bio` and `batch`, and `overall`; `attrs` as in :func:`benchmark`. Not comparable with
    :func:`scib_default`.

    Raises
    ------
    DataError
        If a metric is not defined, for example with one batch, or the data cannot be used.
    ConfigError
        If a key is unknown, or `embeddings` is empty or repeats one.

    Examples
    --------
    >>> import numpy as np
    >>> from anndata import AnnData
    >>> rng = np.random.default_rng(0)
    >>> adata = AnnData(np.zeros((90, 1), dtype=np.float32))
    >>> adata.obs["type"], adata.obs["batch"] = rng.choice(["A", "B"], 90), rng.choice(["s1", "s2"], 90)
    >>> adata.obsm["X_z"] = rng.normal(size=(90, 2)) + 9.0 * (adata.obs["type"] == "B").to_numpy()[:, None]
    >>> bool(scib_convnet(adata, ["X_z"], "batch", "type").loc["X_z", "bio"] > 0.9)
    True
    """
    table = benchmark(data, embeddings, batch_key, label_key, n_jobs=n_jobs, seed=seed)
    return _one_total(table, "total_convnet")


def scib_default(
    data: Any,
    embeddings: Sequence[str],
    batch_key: str,
    label_key: str,
    *,
    unintegrated_key: str | None = None,
    n_jobs: int = 1,
    seed: int = 0,
) -> pd.DataFrame:
    """Compute the set of metrics of scib-metrics and their weighted mean, 0.4 batch + 0.6 bio.

    Clusters are those of Leiden, where the `Benchmarker` of scib-metrics takes k-means by default.

    Parameters
    ----------
    data, embeddings, batch_key, label_key, unintegrated_key, n_jobs, seed
        As in :func:`benchmark`; two batches and two labels or more, and an embedding before correction.

    Returns
    -------
    One row an embedding: `isolated_labels`, `nmi_leiden`, `ari_leiden`, `silhouette_label`, `clisi`, `bras`, `ilisi`,
    `kbet`, `graph_connectivity`, `pcr_comparison`, their means `bio` and `batch`, and `overall`; `attrs` as in
    :func:`benchmark`.

    Raises
    ------
    DataError
        If a metric is not defined, for example with one batch, or the data cannot be used.
    ConfigError
        If a key is unknown, or `embeddings` is empty or repeats one.

    Examples
    --------
    >>> import numpy as np
    >>> from anndata import AnnData
    >>> rng = np.random.default_rng(0)
    >>> adata = AnnData(np.zeros((90, 1), dtype=np.float32))
    >>> adata.obs["type"], adata.obs["batch"] = rng.choice(["A", "B"], 90), rng.choice(["s1", "s2"], 90)
    >>> adata.obsm["X_pca"] = rng.normal(size=(90, 2)) + 9.0 * (adata.obs["type"] == "B").to_numpy()[:, None]
    >>> scib_default(adata, ["X_pca"], "batch", "type").shape
    (1, 13)
    """
    keys: dict[str, Any] = {"unintegrated_key": unintegrated_key, "n_jobs": n_jobs, "seed": seed}
    return _one_total(benchmark(data, embeddings, batch_key, label_key, **keys), "total_scib")


def _one_total(table: pd.DataFrame, total: str) -> pd.DataFrame:
    """Return the metrics of one total, their means and the total; refuse where one is not defined."""
    import pandas as pd

    bio, batch = TOTALS[total]
    flat = table.droplevel("group", axis=1)[[*bio, *batch]]
    for metric in flat:
        if flat[metric].isna().any():
            absent = table.attrs["absent"]
            why = absent.get(metric) or next(text for key, text in absent.items() if key.endswith(f": {metric}"))
            msg = f"The metric '{metric}' is not defined: {why}. `benchmark` computes the metrics that are."
            raise DataError(msg)
    means = {"bio": flat[list(bio)].mean(axis=1), "batch": flat[list(batch)].mean(axis=1)}
    means["overall"] = BATCH_WEIGHT * means["batch"] + BIO_WEIGHT * means["bio"]
    found = pd.concat([flat, pd.DataFrame(means)], axis=1)
    found.columns.name = "metric"
    found.attrs.update(table.attrs)
    return found


def _assemble(
    rows: dict[str, dict[str, float]], information: dict[str, dict[str, float]]
) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Return the table with its aggregates, and what went into these."""
    import pandas as pd

    scores = pd.DataFrame.from_dict(rows, orient="index")
    present = set(scores.columns[scores.notna().any()])
    parts = {"bio": scores[list(BIO)], "batch": scores[list(BATCH)]}
    known = pd.DataFrame.from_dict(information, orient="index")
    if len(known.columns):
        parts["confounder"] = known
    aggregate: dict[str, pd.Series] = {}
    used: dict[str, Any] = {"aggregates": {}, "absent": {}}
    for total, (bio, batch) in TOTALS.items():
        names = {"bio": [name for name in bio if name in present], "batch": [name for name in batch if name in present]}
        # a plain mean skips NaN: a row without one of the metrics would be compared on others
        means = {part: scores[found].mean(axis=1, skipna=False) for part, found in names.items()}
        if total == "total_scib":
            aggregate |= means
        aggregate[total] = BATCH_WEIGHT * means["batch"] + BIO_WEIGHT * means["bio"]
        used["aggregates"][total] = names
        if empty := [part for part, found in names.items() if not found]:
            used["absent"][total] = f"there is no metric of {' and '.join(empty)}"
            used["absent"] |= dict.fromkeys(empty, "all its metrics are absent")
    parts["aggregate"] = pd.DataFrame(aggregate)
    table = pd.concat(parts, axis=1, names=["group", "metric"])
    table.index.name = "embedding"
    return table.astype(np.float64), used


def _information(
    z_nd: NDArray[np.float64], data: Any, confounders: Iterable[str], batch_key: str | None, seed: int
) -> tuple[dict[str, float], dict[str, str]]:
    """Return mean and maximum I(z, c) of each confounder, and those that take one value."""
    found: dict[str, float] = {}
    absent: dict[str, str] = {}
    for key in confounders:
        column = data.obs[key]
        names = (f"I(z,{key})", f"max I(z,{key})")
        if len(column.unique()) == 1:
            found |= dict.fromkeys(names, float("nan"))
            absent |= dict.fromkeys(names, f"obs['{key}'] takes one value")
            continue
        try:
            information = confounder_information(z_nd, column, discrete=True if key == batch_key else None, seed=seed)
        except DataError as error:
            msg = f"obs['{key}'] cannot be used as a confounder: {error}"
            raise DataError(msg) from error
        found |= dict(zip(names, (information.mean, information.max), strict=True))
    return found, absent


def _as_embeddings(data: Any, embeddings: Sequence[str]) -> dict[str, NDArray[np.float64]]:
    """Return the embeddings by their keys."""
    keys = [embeddings] if isinstance(embeddings, str) else list(embeddings)
    if not keys or len(set(keys)) < len(keys):
        msg = f"embeddings is {keys}: give one or more different keys of obsm. {nearest('', data.obsm.keys())}"
        raise ConfigError(msg)
    for key in keys:
        if key not in data.obsm:
            msg = f"obsm has no embedding '{key}'. {nearest(key, data.obsm.keys())}"
            raise ConfigError(msg)
    return {key: as_embedding(data.obsm[key], name=f"obsm['{key}']") for key in keys}


def _check_column(data: Any, key: str) -> None:
    """Refuse a key that is no column of obs."""
    if key not in data.obs:
        msg = f"obs has no column '{key}'. {nearest(key, data.obs.columns)}"
        raise ConfigError(msg)


def _as_column(data: Any, key: str | None, n: int) -> Labels | None:
    """Return the codes of a column of obs, None without a key."""
    if key is None:
        return None
    _check_column(data, key)
    return as_labels(data.obs[key], n, name=f"obs['{key}']", min_values=1)


def _unintegrated(data: Any, key: str | None) -> str | None:
    """Return the key of the embedding before correction, None if there is none."""
    if key is None:
        return next((known for known in (OBSM_PCA, OBSM_LSI) if known in data.obsm), None)
    if key not in data.obsm:
        msg = f"unintegrated_key is '{key}', which is not in obsm. {nearest(key, data.obsm.keys())}"
        raise ConfigError(msg)
    return key
