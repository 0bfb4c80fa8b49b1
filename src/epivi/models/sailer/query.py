"""Query data of peaks, brought to the peaks of a trained model."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Self

import numpy as np
import pandas as pd
from scipy import sparse

from epivi._errors import DataError
from epivi.models.base_query import QueryMixin

if TYPE_CHECKING:
    from pathlib import Path

    from anndata import AnnData

logger = logging.getLogger(__name__)

MIN_SHARE = 0.8


class PeakQueryMixin(QueryMixin):
    """Query mapping for models of peaks."""

    @classmethod
    def prepare_query_anndata(cls, adata: AnnData, reference_model: Self | str | Path) -> AnnData:
        """Return query data with exactly the peaks of the model: reordered by name, absent ones padded with zeros.

        Parameters
        ----------
        adata
            Query data of peaks.
        reference_model
            A trained model, or the folder of a saved one.

        Raises
        ------
        DataError
            If the query shares no peak with the model.
        """
        import anndata

        reference_model = cls._reference(reference_model)
        names = pd.Index(reference_model.feature_names)
        positions = adata.var_names.get_indexer(names)
        found = positions >= 0
        if not found.any():
            message = (
                f"The query shares none of its {adata.n_vars} peaks with the {names.size} of the model. Peak sets must "
                "be counted on the same regions: count the query's fragments in the peaks of the reference."
            )
            raise DataError(message)
        if found.mean() < MIN_SHARE:
            logger.warning("Only %.0f %% of the model's peaks are in the query; the rest is zero.", 100 * found.mean())
        select = sparse.csr_matrix(
            (np.ones(found.sum(), dtype=np.float32), (positions[found], np.flatnonzero(found))),
            shape=(adata.n_vars, names.size),
        )
        layers = {key: sparse.csr_matrix(adata.layers[key]) @ select for key in adata.layers if key is not None}
        matrix = sparse.csr_matrix(adata.X) @ select if adata.X is not None else None
        return anndata.AnnData(matrix, obs=adata.obs.copy(), var=pd.DataFrame(index=names), layers=layers)
