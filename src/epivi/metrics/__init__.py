"""Numbers about a result, on arrays, so that rival methods can be judged too.

Embeddings are arrays of shape (cells, dimensions), labels any one-dimensional array-like, tracks (bins,) or
(tracks, bins), predicted distributions arrays of their parameters, of any shape. No function modifies its
input or a global random state.
"""

from __future__ import annotations

from epivi.metrics.annotation import annotation_scores
from epivi.metrics.benchmark import benchmark, scib_convnet, scib_default
from epivi.metrics.calibration import (
    Recalibration,
    coverage,
    crps_gaussian,
    crps_nb,
    gaussian_cdf,
    gaussian_pit,
    gaussian_quantile,
    interval_coverage,
    nb_cdf,
    nb_pit,
    nb_quantile,
    pit_distance,
    randomised_pit,
)
from epivi.metrics.dice import DiceScore, dice, dice_depth_correlation, dice_specific
from epivi.metrics.embedding.clusters import ClusterAgreement, cluster_agreement, subsample_scores
from epivi.metrics.embedding.information import ConfounderInformation, confounder_information
from epivi.metrics.embedding.leiden import LeidenPartition, leiden_fixed_k, leiden_sweep
from epivi.metrics.embedding.neighbors import (
    NeighborMixing,
    knn_accuracy,
    label_purity,
    neighbor_mixing,
    rare_type_purity,
)
from epivi.metrics.embedding.scores import cluster_scores
from epivi.metrics.expression import ExpressionScores, expression_scores, open_gene_scores
from epivi.metrics.gene_tasks import gene_baselines, gene_classification_task, gene_pair_task, gene_regression_task
from epivi.metrics.imputation import imputation_scores

__all__ = [
    "ClusterAgreement",
    "ConfounderInformation",
    "DiceScore",
    "ExpressionScores",
    "LeidenPartition",
    "NeighborMixing",
    "Recalibration",
    "annotation_scores",
    "benchmark",
    "cluster_agreement",
    "cluster_scores",
    "confounder_information",
    "coverage",
    "crps_gaussian",
    "crps_nb",
    "dice",
    "dice_depth_correlation",
    "dice_specific",
    "expression_scores",
    "gaussian_cdf",
    "gaussian_pit",
    "gaussian_quantile",
    "gene_baselines",
    "gene_classification_task",
    "gene_pair_task",
    "gene_regression_task",
    "imputation_scores",
    "interval_coverage",
    "knn_accuracy",
    "label_purity",
    "leiden_fixed_k",
    "leiden_sweep",
    "nb_cdf",
    "nb_pit",
    "nb_quantile",
    "neighbor_mixing",
    "open_gene_scores",
    "pit_distance",
    "randomised_pit",
    "rare_type_purity",
    "scib_convnet",
    "scib_default",
    "subsample_scores",
]
