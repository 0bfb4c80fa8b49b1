"""Numbers about a result, on arrays, so that rival methods can be judged too.

Embeddings are arrays of shape (cells, dimensions), labels any one-dimensional array-like. No function modifies its
input or a global random state.
"""

from __future__ import annotations

from epivi.metrics.clusters import ClusterAgreement, cluster_agreement, subsample_scores
from epivi.metrics.dice import DiceScore, dice, dice_depth_correlation, dice_specific
from epivi.metrics.information import ConfounderInformation, confounder_information
from epivi.metrics.leiden import LeidenPartition, leiden_fixed_k, leiden_sweep
from epivi.metrics.neighbors import NeighborMixing, knn_accuracy, label_purity, neighbor_mixing, rare_type_purity
from epivi.metrics.scores import cluster_scores

__all__ = [
    "ClusterAgreement",
    "ConfounderInformation",
    "DiceScore",
    "LeidenPartition",
    "NeighborMixing",
    "cluster_agreement",
    "cluster_scores",
    "confounder_information",
    "dice",
    "dice_depth_correlation",
    "dice_specific",
    "knn_accuracy",
    "label_purity",
    "leiden_fixed_k",
    "leiden_sweep",
    "neighbor_mixing",
    "rare_type_purity",
    "subsample_scores",
]
