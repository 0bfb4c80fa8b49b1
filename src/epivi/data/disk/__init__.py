"""Data sets larger than memory: rows of zarr stores through annbatch, minibatches from blocks of shuffled chunks."""

from epivi.data.disk.blocks import BlockDataset, BlockSampler, Held, block_batches, cut_blocks
from epivi.data.disk.collection import open_collection
from epivi.data.disk.rows import DiskRows, rows_on_disk

__all__ = [
    "BlockDataset",
    "BlockSampler",
    "DiskRows",
    "Held",
    "block_batches",
    "cut_blocks",
    "open_collection",
    "rows_on_disk",
]
