"""Command line: write all views of the recorded runs."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from recbole_mm.errors import RecBoleMMError, exit_code_of
from recbole_mm.records import RUNS_FILE, load

EXAMPLES = """\
examples:
  python -m recbole_mm.leaderboard                                  results/runs.jsonl, views beside it
  python -m recbole_mm.leaderboard --dataset=Office --metric=NDCG@10 --baseline=Transitions
  python -m recbole_mm.leaderboard shared/runs.jsonl --out=board    another file of runs, views in another folder
"""
N_TOLD = 20  # problems; the rest is counted


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m recbole_mm.leaderboard``.

    Returns:
        Exit code: 0 written, 2 wrong usage, 3 no run can be used, 4 machine (disk, rights).
    """
    options = _parser().parse_args(argv)
    try:
        return _write(options)
    except (RecBoleMMError, OSError) as error:
        return exit_code_of(error)


def _write(options: argparse.Namespace) -> int:
    from recbole_mm.leaderboard import board as boards
    from recbole_mm.leaderboard import page, tables

    folder = options.out or options.file.parent
    board = boards.build(
        load(options.file),
        results_folder=options.file.parent,
        baseline=options.baseline,
        metric=options.metric,
        dataset=options.dataset,
        protocol=options.protocol,
    ).to_dict()
    for problem in board["problems"][:N_TOLD]:
        print(problem, file=sys.stderr)
    if len(board["problems"]) > N_TOLD:
        print(f"and {len(board['problems']) - N_TOLD} more problems of this kind", file=sys.stderr)
    written = tables.write(board, folder)
    page.write_page(board, folder / "leaderboard.html")
    for table in board["tables"]:
        print(tables.terminal(table), end="\n\n")
    print("written:", *(str(file) for file in [folder / "leaderboard.html", *written]), sep="\n  ")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m recbole_mm.leaderboard", allow_abbrev=False, epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Write the recorded runs as one page, Markdown, LaTeX and CSV, and print the tables.",
    )  # fmt: skip
    parser.add_argument("file", nargs="?", type=Path, default=RUNS_FILE, help=f"JSON lines of runs ({RUNS_FILE})")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="where the views are written (that of the runs)")
    parser.add_argument("--dataset", metavar="NAMES", help="these datasets alone, parted by commas")
    parser.add_argument("--protocol", metavar="NAMES", help="these protocols alone, parted by commas")
    parser.add_argument("--metric", metavar="NAME", help="shown first, such as NDCG@10 (what selected the epochs)")
    parser.add_argument("--baseline", metavar="ROW", help="what rows are compared with (SASRec, or the highest floor)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
