"""Quality on real data: agreement with cell types, mixing of batches, information about depth, held-out cells; tasks.

    uv run --group benchmark python benchmarks/quality.py --quick      # all, small: a check of the scripts
    uv run --group benchmark python benchmarks/quality.py --full       # all, as on the page; goes on where it stopped
    uv run python benchmarks/quality.py snareseq_mouse_cortex --seeds 3
    uv run python benchmarks/quality.py preissl2018_forebrain_atac --seeds 5
    uv run python benchmarks/quality.py candi --seeds 3
    uv run python benchmarks/quality.py epifoundation --seeds 5
    uv run python benchmarks/quality.py expresser --seeds 3

Each method and seed is run once and kept as JSON under ``results/quality`` (``results/quality_quick`` in the quick
form), with versions, and with seconds and peak memory up to the embedding; delete a file to run it again.
``summary.md`` is written from these files. The data are found through EPIVI_TEST_DATA (default ../shared/data).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from _cells import ACCESSIBILITY, EXPRESSION, FULL, MULTIOMES, QUICK, Accessibility, Expression, Multiome
from _common import quiet
from _runs import DATA, QUIET, markdown, run_table, scores

__all__ = ["DATA", "QUIET", "Accessibility", "Multiome", "main", "markdown", "run_table", "scores"]

OUT, OUT_QUICK = Path("results/quality"), Path("results/quality_quick")


def main() -> int:
    """Run what is missing, print and write the tables."""
    task = sys.argv[1:2]
    if task == ["epifoundation"]:
        from quality_epifoundation import main as epifoundation

        return epifoundation()
    if task == ["expresser"]:
        from quality_expresser import main as expresser

        return expresser()
    if task == ["candi"]:
        # other data, other scores: a script of its own, here under the same command
        from quality_candi import main as candi

        return candi(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", choices=[*MULTIOMES, *ACCESSIBILITY, *EXPRESSION], help="one data set")
    parser.add_argument("--quick", action="store_true", help="small samples and a few epochs: checks the scripts")
    parser.add_argument("--full", action="store_true", help="all data sets and tasks")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time, of all data sets")
    parser.add_argument("--seeds", type=int, default=None, help="number of seeds, counted from 0")
    parser.add_argument("--methods", help="only methods whose name this regular expression finds")
    parser.add_argument("--variants", action="store_true", help="variants of the models too")
    parser.add_argument("--out", type=Path, default=None)
    chosen = parser.parse_args()
    chosen.out = chosen.out or (OUT_QUICK if chosen.quick else OUT)
    if chosen.name is None:
        if chosen.quick == chosen.full:
            parser.error("name a data set, or all of them by --quick or --full")
        from _suite import run_all

        return run_all(chosen.out, quick=chosen.quick, seeds=chosen.seeds, n_jobs=chosen.jobs)
    quiet(1)
    if not any(DATA.glob(f"{chosen.name}.*")):
        print(f"test data not found: set EPIVI_TEST_DATA (missing sc/{chosen.name})", file=sys.stderr)
        return 2
    chosen.seeds = chosen.seeds or (1 if chosen.quick else 3)
    size = QUICK if chosen.quick else FULL
    kind = Multiome if chosen.name in MULTIOMES else Accessibility if chosen.name in ACCESSIBILITY else Expression
    run_table(kind(chosen.name, size).methods(variants=chosen.variants), chosen.name, chosen)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
