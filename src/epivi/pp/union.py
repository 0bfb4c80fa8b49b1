"""Several data sets with different genes as one: their union, and which genes each measures."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp

from epivi._errors import ConfigError, DataError
from epivi._keys import OBS_DATASET, VARM_MEASURED
from epivi._validate import check_anndata, check_counts, check_key
from epivi.pp.counts import _csr, _gene_names

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    from anndata import AnnData

logger = logging.getLogger(__name__)


def union_genes(
    data: Mapping[str, AnnData] | Sequence[AnnData],
    *,
    gene_key: str | None = None,
    layer: str | None = None,
    key_added: str = OBS_DATASET,
) -> AnnData:
    """Join data sets of different genes: all cells, every gene of any of them, and which data set measures which gene.

    A gene that a data set does not measure is missing for its cells, not zero. A sparse matrix holds both alike, so
    that ``varm["measured"]`` keeps them apart; :class:`epivi.Expresser` reads it.

    Parameters
    ----------
    data
        Counts, cells × genes, by the name of the data set; a sequence is numbered ``"0"``, ``"1"``, ...
    gene_key
        Column of var that names the genes, such as Ensembl identifiers; var_names by default. Versions of Ensembl
        identifiers are cut off.
    layer
        Layer with the counts; X by default.
    key_added
        Column of obs for the name of the data set.

    Returns
    -------
    AnnData with ``X`` the counts (CSR), the columns of obs of all data sets, ``obs[key_added]``, the columns of var of
    the first data set that has the gene, and ``varm["measured"]``, a Boolean table (genes × data sets). Genes are in
    the order in which they first occur; cell names get ``-<data set>`` where they would occur twice.

    Raises
    ------
    ConfigError
        If there is no data set.
    DataError
        If an object is no AnnData of counts, a gene occurs twice in one, or a data set shares no gene with the others.

    Examples
    --------
    >>> import numpy as np, pandas as pd
    >>> from anndata import AnnData
    >>> a = AnnData(np.ones((2, 2)), obs=pd.DataFrame(index=["a1", "a2"]), var=pd.DataFrame(index=["CD4", "CD8A"]))
    >>> b = AnnData(np.ones((2, 2)), obs=pd.DataFrame(index=["b1", "b2"]), var=pd.DataFrame(index=["CD4", "MS4A1"]))
    >>> both = union_genes({"a": a, "b": b})
    >>> both.var_names.tolist(), both.varm["measured"]["b"].tolist()
    (['CD4', 'CD8A', 'MS4A1'], [True, False, True])
    """
    import pandas as pd
    from anndata import AnnData

    named = dict(data) if isinstance(data, Mapping) else {str(i): entry for i, entry in enumerate(data)}
    if not named:
        message = "union_genes needs one data set or more."
        raise ConfigError(message)
    genes = {name: _names(entry, name, gene_key) for name, entry in named.items()}
    union = pd.Index(pd.unique(np.concatenate(list(genes.values()))))
    _check_shared(genes)
    blocks, measured = [], {}
    for name, entry in named.items():
        counts = _csr(_matrix(entry, name, layer))
        columns = union.get_indexer(genes[name])
        blocks.append(
            sp.csr_matrix((counts.data, columns[counts.indices], counts.indptr), shape=(entry.n_obs, union.size))
        )
        measured[name] = np.isin(np.arange(union.size), columns)
    x = sp.vstack(blocks, format="csr")
    x.sort_indices()
    index = pd.Index(union.astype(str))
    varm = {VARM_MEASURED: pd.DataFrame(measured, index=index)}
    obs = _obs(named, key_added)
    shared = int(np.logical_and.reduce(list(measured.values())).sum())
    logger.info("%d data sets have %d genes together, of which all measure %d.", len(named), union.size, shared)
    return AnnData(x, obs=obs, var=_var(named, genes).reindex(index), varm=varm)


def _matrix(adata: AnnData, name: str, layer: str | None) -> Any:
    """Return the counts of a data set, checked."""
    if layer is not None:
        check_key(adata.layers, layer, where=f"data['{name}'].layers")
    matrix = adata.X if layer is None else adata.layers[layer]
    where = f"data['{name}'].X" if layer is None else f"data['{name}'].layers['{layer}']"
    check_counts(matrix, where=where, obs_names=adata.obs_names)
    return matrix


def _names(adata: Any, name: str, gene_key: str | None) -> np.ndarray:
    """Return the genes of a data set, each once."""
    import pandas as pd
    from anndata import AnnData

    if not isinstance(adata, AnnData):
        check_anndata(adata, where=f"data['{name}']")
    names = _gene_names(adata, gene_key, strip_versions=True)
    index = pd.Index(names)
    if not index.is_unique:
        twice = index[index.duplicated()].unique()[:5].tolist()
        message = f"data['{name}'] holds genes twice: {twice}. epivi.pp.collapse_genes sums their counts."
        raise DataError(message)
    return names


def _check_shared(genes: Mapping[str, np.ndarray]) -> None:
    """Check that every data set shares genes with another one."""
    for name, own in genes.items():
        others = {gene for other, held in genes.items() if other != name for gene in held}
        if others and not others.intersection(own):
            message = (
                f"data['{name}'] shares no gene with the other data sets (its own look like {own[:2].tolist()}, theirs "
                f"like {sorted(others)[:2]}). Name the genes alike, for example with gene_key='gene_ids'."
            )
            raise DataError(message)


def _obs(named: Mapping[str, AnnData], key_added: str) -> pd.DataFrame:
    """Return the rows of obs of all data sets, with names that occur once."""
    import pandas as pd

    obs = pd.concat([entry.obs for entry in named.values()], axis=0)
    sizes = [entry.n_obs for entry in named.values()]
    datasets = np.repeat(np.array(list(named), dtype=object), sizes)
    if not obs.index.is_unique:
        obs.index = pd.Index([f"{cell}-{name}" for cell, name in zip(obs.index, datasets, strict=True)])
    obs[key_added] = pd.Categorical(datasets, categories=list(named))
    return obs


def _var(named: Mapping[str, AnnData], genes: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """Return the rows of var of the first data set that has each gene."""
    import pandas as pd

    var = pd.concat([entry.var.set_axis(genes[name].astype(str), axis=0) for name, entry in named.items()], axis=0)
    return var[~var.index.duplicated()]
