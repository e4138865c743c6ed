"""`study`: run the cells of a study that are not finished, and write its report."""

import argparse
from pathlib import Path


def run(argv: list[str]) -> int:
    """Run what is missing and report; or run the cell of `--cell` alone."""
    options = _parser().parse_args(argv[1:])
    from .study_run import run_study  # it loads torch, which the options do without

    return run_study(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="alignvlm study", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("names", nargs="+", metavar="NAME", help="sections of the report, see docs/study.md")
    parser.add_argument("--config", type=Path, required=True, help="file of the study, as in configs/study/")
    parser.add_argument("--cell", type=int, help="run this cell only, as a task of a SLURM array")
    parser.add_argument(
        "--list", action="store_true", help="print the cells and whether they are finished, and run none"
    )
    parser.add_argument("--report-only", action="store_true", help="run no cell")
    parser.add_argument("--run-dir", type=Path, help="folder of the runs; default: runs/study/STUDY")
    parser.add_argument("--results", type=Path, help="folder of the result files; default: RUN_DIR/results")
    parser.add_argument("--report", type=Path, help="folder of the report; default: RUN_DIR/report")
    return parser
