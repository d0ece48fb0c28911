"""``python -m recbole_mm.leaderboard``: from lines to files."""

from __future__ import annotations

from pathlib import Path

import pytest
from runs import failed, record, with_rows, write_runs

from recbole_mm.leaderboard.__main__ import main
from recbole_mm.records import RUNS_FILE


@pytest.fixture
def runs() -> Path:
    """results/runs.jsonl below the test's own working directory."""
    folder = RUNS_FILE.parent
    rows = [with_rows(record(model, 1, recall), folder) for model, recall in (("MSM4SR", 0.8), ("SASRec", 0.5))]
    return write_runs(RUNS_FILE, [*rows, record("SASRec", dataset="books"), failed("NARM")])


def test_all_views_are_written_beside_the_runs(runs, capsys):
    assert main([]) == 0
    names = {file.name for file in runs.parent.iterdir()}
    views = {"leaderboard.html", "shop.md", "shop.tex", "books.md", "books.tex", "leaderboard.csv"}
    assert names == {*views, "runs.jsonl", "per_user"}
    out = capsys.readouterr().out
    assert "MSM4SR is ahead of SASRec by .3000 Recall@10" in out and "failed: NARM, seed 1: the loss is nan" in out
    assert all(f"results/{name}" in out for name in views)
    here = str(Path.cwd())
    assert not any(here in (runs.parent / name).read_text() for name in views)


def test_options_choose_folder_dataset_metric_and_baseline(runs, capsys):
    given = ["--out=board", "--dataset=shop", "--protocol=leave-one-out", "--metric=NDCG@10", "--baseline=MSM4SR"]
    assert main([str(runs), *given]) == 0
    assert {file.name for file in Path("board").iterdir()} == {
        "leaderboard.html",
        "shop.md",
        "shop.tex",
        "leaderboard.csv",
    }
    assert "NDCG@10 − MSM4SR" in capsys.readouterr().out


def test_problems_are_told_with_their_line_and_the_rest_goes_on(runs, capsys):
    runs.write_text(runs.read_text() + '{"model": "SAS\n' * 22)
    assert main([]) == 0
    err = capsys.readouterr().err.splitlines()
    assert "runs.jsonl, line 5 is no record of a run" in err[0] and err[-1] == "and 2 more problems of this kind"
    assert "line 5 is no record" in (runs.parent / "leaderboard.html").read_text()


@pytest.mark.parametrize(
    ("content", "told"), [("", "the file is empty"), ("{}\n", "line 1 is no record of a run"), (None, "No such file")]
)
def test_nothing_usable_is_an_error_of_data(content, told, capsys):
    if content is not None:
        Path("x.jsonl").write_text(content)
    assert main(["x.jsonl"]) == 3
    assert told in capsys.readouterr().err


def test_a_wrong_name_is_an_error_of_settings(runs, capsys):
    assert main(["--baseline=SASRek"]) == 2
    assert "no row is called SASRek; did you mean 'SASRec'" in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_the_machine_s_error(runs, capsys):
    Path("taken").write_text("")
    assert main(["--out=taken"]) == 4
    assert "the machine gave up" in capsys.readouterr().err
