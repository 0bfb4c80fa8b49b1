"""Every string key that epivi reads or writes in AnnData and MuData."""

from __future__ import annotations

from typing import Final

# var: where a peak or bin lies, 0-based and half-open
VAR_CHROM: Final = "chrom"
VAR_START: Final = "start"
VAR_END: Final = "end"

# obs: what setup_* stores
OBS_DEPTH: Final = "_epivi_depth"
OBS_N_OPEN: Final = "_epivi_n_open"
OBS_RNA_DEPTH: Final = "_epivi_rna_depth"
OBS_HAS_REFERENCE: Final = "_epivi_has_reference"
OBS_ALIGN_WEIGHT: Final = "_epivi_align_weight"

# obsm keys of embeddings
OBSM_LSI: Final = "X_lsi"
OBSM_PCA: Final = "X_pca"
OBSM_REFERENCE: Final = "_epivi_reference"
OBSM_SAILER: Final = "X_sailer"
OBSM_SAILERX: Final = "X_sailerx"

# uns
UNS_SIMULATION: Final = "simulation"
UNS_METRICS: Final = "epivi_metrics"

# MuData: modality names taken when the user gives none
MOD_ATAC: Final = "atac"
MOD_RNA: Final = "rna"

# batch dict: entries that the data room hands to a module, beside scvi-tools' own REGISTRY_KEYS
BATCH_INDPTR: Final = "x_indptr"
BATCH_INDICES: Final = "x_indices"
BATCH_VALUES: Final = "x_values"
BATCH_DEPTH: Final = "depth"
BATCH_REFERENCE: Final = "reference"
BATCH_HAS_REFERENCE: Final = "has_reference"
BATCH_ALIGN_WEIGHT: Final = "align_weight"
BATCH_ROWS: Final = "rows"

# binned tracks: obsm array, its mask of measured modalities, its description in uns
OBSM_TRACKS: Final = "tracks"
OBSM_TRACKS_MASK: Final = "tracks_mask"
UNS_TRACKS: Final = "tracks"
BATCH_MASK: Final = "modality_mask"
OBSM_TRACKS_MEASURED: Final = "_epivi_tracks_measured"
UNS_TRUTH: Final = "truth"

# fragment files: fragments of each cell, and what was counted and left out
OBS_N_FRAGMENTS: Final = "n_fragments"
UNS_FRAGMENTS: Final = "fragments"

# bulk experiments: biosamples by assays by bins, and the windows that are cut from them
OBSM_COUNTS: Final = "counts"
OBSM_SIGNAL: Final = "signal"
OBSM_AVAILABILITY: Final = "availability"
OBSM_AVAILABILITY_SIGNAL: Final = "availability_signal"
OBSM_EXPERIMENT_DEPTH: Final = "depth"
VARM_LOCUS_PRIOR: Final = "locus_prior"
UNS_BINS: Final = "bins"
UNS_DNA: Final = "dna"
UNS_GENOME: Final = "genome"
UNS_CATEGORIES: Final = "categories"
UNS_SIGNAL_TRANSFORM: Final = "signal_transform"
BATCH_WINDOW: Final = "window"
BATCH_BIN_MASK: Final = "bin_mask"
BATCH_COUNTS: Final = "counts"
BATCH_SIGNAL: Final = "signal"
BATCH_AVAILABLE_COUNTS: Final = "available_counts"
BATCH_AVAILABLE_SIGNAL: Final = "available_signal"
BATCH_CONTINUOUS: Final = "continuous"
BATCH_CATEGORICAL: Final = "categorical"
BATCH_LOG_DEPTH_RATIO: Final = "log_depth_ratio"
BATCH_DNA: Final = "dna"
BATCH_PRIOR: Final = "prior"
BATCH_HAS_PRIOR: Final = "has_prior"

# cells as sets of tokens: what is read of them, and what a training step scores
BATCH_RNA: Final = "rna"
BATCH_TOKENS: Final = "tokens"
BATCH_TOKEN_CHROM: Final = "token_chrom"
BATCH_TOKEN_POSITION: Final = "token_position"
BATCH_TOKEN_LEVEL: Final = "token_level"
BATCH_LENGTH: Final = "length"
BATCH_GENES: Final = "genes"
BATCH_GENE_TARGET: Final = "gene_target"
BATCH_HIDDEN_PEAKS: Final = "hidden_peaks"
BATCH_HIDDEN_IS_OPEN: Final = "hidden_is_open"
BATCH_N_EXPRESSED: Final = "n_expressed"
BATCH_CLASS: Final = "class"
OBSM_EPIFOUNDATION: Final = "X_epifoundation"

# peaks on other peaks or on genes, quality of a multiome
UNS_PROJECTION: Final = "projection"
VAR_N_PEAKS: Final = "n_peaks"
OBS_NUCLEOSOME_SIGNAL: Final = "nucleosome_signal"
OBS_TSS_ENRICHMENT: Final = "tss_enrichment"

# expression of genes as tokens: which data set measures which gene, and what is read of a cell
OBS_DATASET: Final = "dataset"
OBS_N_EXPRESSED: Final = "_epivi_n_expressed"
VARM_MEASURED: Final = "measured"
BATCH_BIN: Final = "bin"
BATCH_VALUE: Final = "value"
BATCH_MAXIMUM: Final = "maximum"
BATCH_SHIFT: Final = "shift"
BATCH_QUERY: Final = "query"
BATCH_QUERY_LENGTH: Final = "query_length"
BATCH_ZEROS: Final = "zeros"

# peaks of a model that the data do not have
BATCH_ABSENT_PEAKS: Final = "absent_peaks"
