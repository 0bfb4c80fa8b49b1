"""Speed of CANDI and of the readers of bulk files, each against a limit or a plain form measured in the same run.

    OMP_NUM_THREADS=1 uv run python benchmarks/speed_candi.py
    OMP_NUM_THREADS=1 uv run python benchmarks/speed_candi.py --parts chromosome

- ``network``: windows a second in training (forward, backward, AdamW) and inference at sizes "tutorial" (8 assays) and
  "paper" (35 assays), with DNA, counts and signal; floating point operations as torch counts them, against a product
  of matrices of 2,048 x 2,048 in the same run.
- ``chromosome``: every bin of a chromosome as long as the human chr21 (46,709,983 bp) at size "tutorial": means of
  eight assays of one biosample to bigWig files; seconds and peak memory above that of the data.
- ``files``: counting of a BAM file of 500,000 reads against a loop over them in Python, and reading of a bigWig file
  against a call of ``stats`` for each bin, results equal.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from _common import at_least, at_most, claims_table, markdown_table, parse, say, write
from _measure import peak, reset_peak, settle

if TYPE_CHECKING:
    from collections.abc import Callable

    from anndata import AnnData

CHR21_BP, BIN_BP = 46_709_983, 25
SIZES = {"tutorial": (8, 32, 20), "paper": (35, 4, 4)}
PARTS = ("network", "chromosome", "files")
# unmapped, secondary, quality check, duplicate, supplementary
LEFT_OUT = 0x4 | 0x100 | 0x200 | 0x400 | 0x800
N_READS, READ_BP = 500_000, 50
SECONDS_GOAL, GIB_GOAL, BAM_GOAL, BIGWIG_GOAL = 180.0, 4.0, 5.0, 100.0


def experiments(n_assays: int, n_bins: int, *, n_biosamples: int = 1, dna: bool = False) -> AnnData:
    """Return random counts and signal on one chromosome."""
    import anndata

    rng = np.random.default_rng(0)
    shape = (n_biosamples, n_assays, n_bins)
    counts = np.empty(shape, dtype=np.uint16)
    for b in range(n_biosamples):
        for a in range(n_assays):
            counts[b, a] = rng.poisson(rng.gamma(0.5, 2.0, n_bins))
    start = np.arange(n_bins) * BIN_BP
    bins = pd.DataFrame({"chrom": pd.Categorical(["chr21"] * n_bins), "start": start, "end": start + BIN_BP})
    adata = anndata.AnnData(
        np.ones(shape[:2], dtype=np.float32),
        obsm={"counts": counts, "availability": np.ones(shape[:2], dtype=bool), "depth": np.full(shape[:2], 2e7)},
        uns={"bins": bins},
    )
    adata.obs_names = [f"biosample_{b}" for b in range(n_biosamples)]
    adata.var_names = [f"assay_{a}" for a in range(n_assays)]
    if dna:
        adata.uns["dna"] = rng.integers(0, 4, n_bins * BIN_BP, dtype=np.uint8)
        adata.obsm["signal"] = np.arcsinh(counts).astype(np.float32)
        adata.uns["signal_transform"] = "arcsinh"
    return adata


def gemm(size: int = 2048) -> float:
    """Return the operations a second of a matrix product in single precision."""
    import torch

    a, b = torch.randn(2, size, size)
    return 2 * size**3 / fastest(lambda: a @ b, 5)


def fastest(run: Callable[[], Any], repeats: int) -> float:
    """Return the least seconds of a few calls, after one to warm up."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def network() -> list[list[str]]:
    """Return the rows of the table of training and inference."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    import epivi

    rows = []
    for size, (n_assays, batch_size, repeats) in SIZES.items():
        window = 1200 if size == "paper" else 240
        adata = experiments(n_assays, 40 * window, n_biosamples=2, dna=True)
        epivi.CANDI.setup_anndata(adata, validation_chroms=[])
        model = epivi.CANDI(adata, size=size)
        module = model.module
        batch = model.windows(adata)[np.stack([np.zeros(batch_size, int), window * np.arange(batch_size)], axis=1)]
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)

        def step(module: Any = module, batch: Any = batch, optimizer: Any = optimizer) -> None:
            optimizer.zero_grad()
            module(batch)[2].loss.backward()
            optimizer.step()

        def predict(module: Any = module, batch: Any = batch) -> None:
            with torch.inference_mode():
                module(batch, compute_loss=False)

        for name, run, mode in (("training", step, True), ("inference", predict, False)):
            module.train(mode)
            with FlopCounterMode(display=False) as counter:
                run()
            seconds, limit = fastest(run, repeats), gemm()
            operations = counter.get_total_flops()
            rate = operations / seconds
            figures = (f"{batch_size / seconds:.1f}", f"{operations / batch_size / 1e9:.3f}", f"{rate / 1e9:.1f}")
            rows.append([f"{size}, {name}", *figures, f"{limit / 1e9:.1f}", f"{rate / limit:.2f}"])
            say(" | ".join(rows[-1]))
    return rows


def chromosome() -> dict[str, float]:
    """Return seconds and peak memory above the data of predicting a chromosome to bigWig files."""
    import epivi

    adata = experiments(8, CHR21_BP // BIN_BP)
    epivi.CANDI.setup_anndata(adata, validation_chroms=[])
    model = epivi.CANDI(adata, size="tutorial")
    model.is_trained_ = True
    before = settle()
    is_reset = reset_peak()
    with tempfile.TemporaryDirectory() as folder:
        start, cpu = time.perf_counter(), time.process_time()
        model.export_bigwig(folder, what="mean", progress=False, batch_size=64)
        found = {"seconds": time.perf_counter() - start, "processor seconds": time.process_time() - cpu}
    return found | {"GiB above the data": (peak() - before) / 1024 if is_reset else float("nan")}


def simulate_reads(path: Path) -> None:
    """Write single-end reads at random places, some of them duplicates, sorted and with an index."""
    import pysam

    rng = np.random.default_rng(0)
    start = np.sort(rng.integers(0, CHR21_BP - READ_BP, N_READS)).tolist()
    flag = np.where(rng.random(N_READS) < 0.1, 0x400, 0) | np.where(rng.random(N_READS) < 0.5, 0x10, 0)
    header = {"HD": {"VN": "1.6", "SO": "coordinate"}, "SQ": [{"SN": "chr21", "LN": CHR21_BP}]}
    with pysam.AlignmentFile(str(path), "wb", header=header) as handle:
        read = pysam.AlignedSegment(handle.header)
        read.query_sequence, read.cigartuples, read.reference_id = "A" * READ_BP, [(0, READ_BP)], 0
        read.mapping_quality = 60
        for number, (at, bits) in enumerate(zip(start, flag.tolist(), strict=True)):
            read.query_name, read.reference_start, read.flag = f"read{number}", at, bits
            handle.write(read)
    pysam.index(str(path))


def files() -> dict[str, float]:
    """Return how many times as long the plain forms take, BAM and bigWig."""
    import pyBigWig
    import pysam

    from epivi.pp import bulk

    folder = tempfile.TemporaryDirectory()
    bam = Path(folder.name) / "reads.bam"
    simulate_reads(bam)

    def loop() -> np.ndarray:
        counts = np.zeros(CHR21_BP // BIN_BP, dtype=np.int64)
        with pysam.AlignmentFile(str(bam)) as reads:
            for read in reads.fetch("chr21"):
                if read.flag & LEFT_OUT:
                    continue
                at = (read.reference_start + read.reference_end) // 2 // BIN_BP
                counts[min(at, counts.size - 1)] += 1
        return counts

    def ours() -> np.ndarray:
        return bulk.count_bam(bam, {"chr21": CHR21_BP}, bin_size_bp=BIN_BP).counts_l

    if not np.array_equal(loop(), ours()):
        message = "The two ways to count a BAM file differ."
        raise RuntimeError(message)
    result = {"BAM, Python loop / epivi": fastest(loop, 2) / fastest(ours, 3)}
    n_bins = 20_000
    values = np.random.default_rng(0).gamma(0.5, 2.0, n_bins).astype(np.float32)
    with folder:
        path = Path(folder.name) / "track.bw"
        sizes = {"chr1": n_bins * BIN_BP}
        bulk.write_bigwig(path, sizes, {"chr1": values}, bin_size_bp=BIN_BP)

        def stats() -> np.ndarray:
            with pyBigWig.open(str(path)) as track:
                return np.array(
                    [track.stats("chr1", BIN_BP * i, BIN_BP * (i + 1), exact=True)[0] for i in range(n_bins)],
                    dtype=float,
                )

        def read() -> np.ndarray:
            return bulk.read_bigwig(path, sizes, bin_size_bp=BIN_BP, transform="none").signal_l

        if not np.allclose(stats(), read(), rtol=1e-5):
            message = "The two ways to read a bigWig file differ."
            raise RuntimeError(message)
        result["bigWig, stats / epivi"] = fastest(stats, 1) / fastest(read, 3)
    return result


def main() -> int:
    """Run the parts asked for and write the results."""
    chosen = parse(__doc__, seeds=1, parts={"nargs": "+", "choices": PARTS, "default": list(PARTS)})
    text, results, claims = "", {}, []
    if "network" in chosen.parts:
        header = ["", "windows / s", "GFLOP a window", "GFLOP / s", "matrix product", "share"]
        results["network"] = rows = network()
        text += markdown_table(header, rows) + "\n\n"
    if "chromosome" in chosen.parts:
        results["chromosome"] = found = chromosome()
        claims += [
            at_most("chr21-sized chromosome: seconds", [found["seconds"]], SECONDS_GOAL),
            at_most("chr21-sized chromosome: GiB above the data", [found["GiB above the data"]], GIB_GOAL),
        ]
    if "files" in chosen.parts:
        found = files()
        results["files"] = found
        claims += [
            at_least("BAM: Python loop / epivi", [found["BAM, Python loop / epivi"]], BAM_GOAL),
            at_least("bigWig: stats calls / epivi", [found["bigWig, stats / epivi"]], BIGWIG_GOAL),
        ]
    text += claims_table(claims) if claims else ""
    write(chosen.out, "speed_candi", text, results, threads=chosen.threads)
    return 0


if __name__ == "__main__":
    sys.exit(main())
