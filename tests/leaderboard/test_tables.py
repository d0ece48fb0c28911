"""Markdown, LaTeX, CSV and the terminal's table say what the board says."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path

import pytest
from runs import failed, record, with_rows

from recbole_mm.leaderboard import board, cells, latex, markdown, tables, wording
from recbole_mm.records import Records


@pytest.fixture
def made(tmp_path) -> dict:
    """Two datasets; the first with a model, its knock-outs, a baseline, a floor, a failed run and a paper."""
    slices = {"popularity": {"head": {"n": 20, "recall@10": 0.25}, "cold": {"n": 3, "recall@10": 0.75}}}
    runs = [with_rows(record("MSM4SR", seed, 0.8, slices=slices), tmp_path) for seed in (1, 2)]
    runs += [with_rows(record("MSM4SR", seed, 0.4, knockout="text:noise"), tmp_path) for seed in (1, 2)]
    runs += [with_rows(record("SASRec", seed, 0.5), tmp_path) for seed in (1, 2)]
    runs += [with_rows(record("Popularity", 1, 0.1, budget={"trials": 20, "seconds": 61.2}), tmp_path)]
    runs += [failed("NARM", 2, error="loss is <nan> | stop", settings_given={"learning_rate": 0.1})]
    runs += [record("SASRec", dataset="50%_off & more", command="")]
    entry = {"source": "table 3", "note": "another edition", "metrics": {"recall@10": 0.0712}}
    papers = {"shop": {"SASRec": entry, "VQ-Rec": entry}}
    return board.build(Records(runs, []), results_folder=tmp_path, papers=papers, n_resamples=200).to_dict()


@pytest.fixture
def shop(made) -> dict:
    return next(table for table in made["tables"] if table["dataset"] == "shop")


def test_markdown_has_every_part(made, shop):
    text = tables.markdown(made, [shop])
    assert text.startswith("# shop\n") and "## leave-one-out (leaks future information" in text
    assert "60 test rows, 100 items ranked, seeds 1, 2. Epochs and settings were selected by Recall@10 on" in text
    assert "validation data. Interactions `data`, test rows `rows`." in text
    for sentence in shop["sentences"]:
        assert sentence in text
    assert re.search(r"\| MSM4SR \| 2 \| \*\*\.8000\*\* \| .* \.3000 \(\.1\d+ to \.4\d+\) \| < \.0001 \|", text)
    assert "| *Popularity* | 1 |" in text and "| baseline |" in text
    assert re.search(r"\| MSM4SR − text:noise \| 2 \| \.4000 \| \.4000 \(\.2\d+ to \.5\d+\) \| < \.0001 \|", text)
    assert "| by popularity | head (20 rows) | cold (3 rows) |" in text and "| MSM4SR | .2500 | .7500 |" in text
    assert "| Popularity | 0 | 2 | 20 | 10 | 1 | 0.5 | 1 | 20 trials, 61.2 s |" in text
    assert r"| NARM | 2 | learning_rate=0.1 | loss is \<nan> \| stop |" in text
    assert ".0712 Recall@10 |" in text and "SASRec in the paper: table 3; not comparable: another edition." in text
    assert "### Reported elsewhere, not comparable" in text and "| VQ-Rec | .0712 | table 3 | another edition |" in text


def test_all_rows_of_a_markdown_table_have_the_same_number_of_cells(made, shop):
    grids = re.findall(r"(?:^\|.*\|\n?)+", tables.markdown(made, [shop]), flags=re.MULTILINE)
    assert len(grids) == 6
    for grid in grids:
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in grid.splitlines()}) == 1


def test_commands_of_models_and_seeds_that_share_their_settings_are_one(made, shop):
    assert markdown.commands(shop, made["runs"]) == [
        "python run_recbole_mm.py --model=MSM4SR --dataset=shop --knockouts=text:noise --seeds=1,2",
        "python run_recbole_mm.py --model=SASRec --dataset=shop --seeds=1,2",
        "python run_recbole_mm.py --model=Popularity --dataset=shop --seed=1",
        "python run_recbole_mm.py --model=NARM --dataset=shop --seed=2",
    ]


def test_commands_of_knock_outs_go_with_their_full_runs_where_the_seeds_are_the_same():
    knockouts = [(None, (1, 2)), ("text:noise", (1, 2)), ("image:noise", (1, 2)), ("price:shuffle", (1,))]
    runs = [
        record(model, seed, 0.5, knockout=knockout)
        for model in ("A", "B") for knockout, seeds in knockouts for seed in seeds
    ]  # fmt: skip
    runs.append(record("C", 1, 0.5, knockout="text:noise"))
    made = board.build(Records(runs, []), results_folder=Path("nowhere"), papers={}).to_dict()
    assert markdown.commands(made["tables"][0], made["runs"]) == [
        "python run_recbole_mm.py --model=A,B --dataset=shop '--knockouts=image:noise;text:noise' --seeds=1,2",
        "python run_recbole_mm.py --model=A,B --dataset=shop --knockout=price:shuffle --seed=1",
        "python run_recbole_mm.py --model=C --dataset=shop --knockout=text:noise --seed=1",
    ]


def test_hostile_text_stays_in_its_cell_and_in_its_block():
    name, given = "A|b_`x`\n# <b> _c_ ~~d~~ $e$ &lt;", {"epochs": "``` `"}
    runs = [record(name, recall=0.5, command="python x.py '--note=\n```\n# out'")]
    runs += [failed("X", error="a | b\n\n# c\n| d |", settings_given=given)]
    made = board.build(Records(runs, []), results_folder=Path("nowhere"), papers={}).to_dict()
    text = tables.markdown(made, made["tables"])
    assert r"| A\|b\_\`x\` # \<b> \_c\_ \~\~d\~\~ \$e\$ \&lt; |" in text and "a \\| b # c \\| d \\|" in text
    outside = re.sub(r"^````\n.*^````$", "", text, flags=re.MULTILINE | re.DOTALL)
    assert "# out" in text and "# out" not in outside
    headings = ["# shop", "## ", "### Cost", "### Runs", "### Remarks", "### Made"]
    assert all(line.startswith(tuple(headings)) for line in outside.splitlines() if line.startswith("#"))


def test_a_slice_with_one_band_and_a_search_that_was_not_made_take_no_place():
    slices = {"coverage": {"all": {"n": 60, "recall@10": 0.5}}}
    runs = [record("SASRec", slices=slices)]
    made = board.build(Records(runs, []), results_folder=Path("nowhere"), papers={}).to_dict()
    text = tables.markdown(made, made["tables"])
    assert "coverage" not in text and "on parts of" not in text
    assert "budget" not in text and "Each model ran with one setting; none was searched for." in text


def test_latex_is_booktabs_and_every_character_is_escaped(made):
    off = [table for table in made["tables"] if table["dataset"] != "shop"]
    text = tables.latex(made, made["tables"])
    assert r"50\%\_off \& more" in tables.latex(made, off)
    assert text.count(r"\begin{table}") == text.count(r"\end{tabular}") == 3
    assert (
        r"\textbf{.8000}" in text
        and latex._tex("−.1 ± .2") == r"$-$.1 $\pm$ .2"
        and r"\emph{Popularity}" in text
        and r"\toprule" in text
    )
    body = re.sub(r"\\[&%$#_{}~^]", "", "\n".join(line for line in text.splitlines() if not line.startswith("%")))
    assert not re.search(r"[_%#−±–]", re.sub(r"\\label\{.*\}", "", body))
    for table in re.findall(r"\\midrule\n(.*?)\\bottomrule", body, flags=re.DOTALL):
        assert len({line.count("&") for line in table.strip().splitlines()}) == 1


def test_the_csv_has_a_line_for_each_row_and_metric(made):
    lines = list(csv.DictReader(io.StringIO(tables.csv_of(made))))
    assert len(lines) == 2 * 5
    line = next(line for line in lines if line["row"] == "MSM4SR − text:noise" and line["metric"] == "recall@10")
    assert (line["kind"], line["of"], line["seeds"], line["test"], line["bold"]) == (
        "knockout",
        "MSM4SR",
        "1 2",
        "0.4",
        "0",
    )
    assert float(line["gap"]) == pytest.approx(0.4) and line["difference"] == "" and len(line["run_ids"].split()) == 2
    line = next(line for line in lines if line["row"] == "SASRec" and line["metric"] == "recall@10" and line["paper"])
    assert (line["paper"], line["paper_source"], line["baseline"]) == ("0.0712", "table 3", "SASRec")


def test_a_csv_of_nothing_has_a_header():
    assert tables.csv_of({"tables": []}).startswith("dataset,")


def test_the_terminal_s_table_is_aligned(shop):
    lines = tables.terminal(shop).splitlines()
    assert lines[0].startswith("shop, leave-one-out (leaks")
    assert len({len(line) for line in lines[1:6]}) == 1
    assert "* .8000 " in lines[2] and lines[6].startswith("* the highest")
    assert "failed: NARM, seed 2: loss is <nan> | stop" in lines
    assert lines[-2:] == shop["sentences"]


def test_views_are_written_with_names_that_every_system_takes(made, tmp_path):
    made["tables"].append({**made["tables"][0], "dataset": "../50%_off/& more"})
    names = {file.name for file in tables.write(made, tmp_path / "out")}
    assert names == {
        "50__off_more.md", "50__off_more.tex", "_50__off_more.md", "_50__off_more.tex", "shop.md", "shop.tex",
        "leaderboard.csv",
    }  # fmt: skip
    assert {file.name for file in (tmp_path / "out").iterdir()} == names


def test_a_table_without_a_result_can_be_written(tmp_path):
    made = board.build(Records([failed("NARM")], []), results_folder=tmp_path, papers={}).to_dict()
    assert "No run has come to a result." in tables.markdown(made, made["tables"])
    assert "failed: NARM" in tables.terminal(made["tables"][0])
    assert r"\begin{table}" not in tables.latex(made, made["tables"])


# ------------------------------------------------ words


@pytest.mark.parametrize(
    ("value", "text"), [(0.12345, ".1235"), (-0.5, "−.5000"), (1.0, "1.0000"), (-0.00001, ".0000"), (None, "–")]
)
def test_numbers_have_no_zero_before_the_point(value, text):
    assert wording.number(value) == text


def test_a_deviation_stands_only_where_seeds_differ():
    row = {
        "test": {"m": {"mean": 0.25, "sd": 0.0125}, "same": {"mean": 0.25, "sd": 0.0}, "one": {"mean": 1, "sd": None}}
    }
    assert [cells.spread(row, name) for name in ("m", "same", "one", "x")] == [".2500 ± .0125", ".2500", "1.0000", "–"]


def test_figures_have_three_digits_and_no_exponent():
    assert [cells.figure(value) for value in (None, 0, 7e-5, 0.01234, 12.34, 1234567.8)] == [
        "–", "0", "< 0.001", "0.0123", "12.3", "1,234,568",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("cannot read /home/me/x/shop.inter: gone", "cannot read shop.inter: gone"),
        ("--dataset=/srv/data/shop --a=1", "--dataset=shop --a=1"),
        (r"C:\Users\me\shop.inter", "shop.inter"),
        ("dataset/shop/shop.inter and https://a.b/c/d", "dataset/shop/shop.inter and https://a.b/c/d"),
        ("1/2 and text/image", "1/2 and text/image"),
    ],
)
def test_absolute_paths_are_cut_to_the_name(text, left):
    assert wording.without_paths(text) == left


def row(
    name: str, recall: float, kind: str = "model", difference: tuple = (), gap: tuple = (), knockout: str = ""
) -> dict:
    def values(of: tuple) -> dict:
        return {"m": dict(zip(("mean", "low", "high", "p_holm"), of, strict=True))} if of else {}

    return {
        "name": name,
        "kind": kind,
        "test": {"m": {"mean": recall}},
        "difference": values(difference),
        "gap": values(gap),
        "knockout": knockout,
        "of": "A" if knockout else None,
    }


@pytest.mark.parametrize(
    ("difference", "said"),
    [
        ((0.1, 0.05, 0.15, 0.01), "A is ahead of B by .1000 M (95 % interval .0500 to .1500)"),
        ((0.1, -0.05, 0.15, 0.3), "A and B cannot be told apart: the difference is .1000 M (95 % interval −.0500 to"),
        ((0.1, 0.01, 0.15, 0.3), "Whether A differs from B is not certain: by .1000 M (95 % interval .0100 to"),
        ((-0.1, -0.15, -0.05, 0.01), "Nothing is ahead of B: the next, A, differs by −.1000 M (95 % interval"),
        ((), "A is ahead of B by .3000 M, not tested for want of values of single users."),
    ],
)  # fmt: skip
def test_the_first_sentence_says_who_is_ahead_and_how_sure_that_is(difference, said):
    rows = [row("A", 0.5, difference=difference), row("B", 0.2)]
    assert wording.sentences(rows, metric="m", baseline="B")[0].startswith(said)


@pytest.mark.parametrize(
    ("gap", "end"),
    [
        ((0.1, 0.05, 0.15, 0.01), ", its pictures .1000 (.0500 to .1500)."),
        ((0.1, -0.05, 0.15, 0.3), ": the pictures bring nothing here that could be measured."),
        ((0.1, 0.01, 0.15, 0.3), ": what the pictures bring is not certain."),
        ((-0.1, -0.15, -0.05, 0.01), ": the pictures do harm here."),
    ],
)
def test_the_second_sentence_says_what_a_modality_is_worth(gap, end):
    rows = [row("A", 0.5), row("A − text:noise", 0.1, "knockout", gap=(0.4, 0.3, 0.5, 0.001), knockout="text:noise")]
    rows += [row("A − image:noise", 0.4, "knockout", gap=gap, knockout="image:noise")]
    said = wording.sentences(rows, metric="m", baseline="")[1]
    assert said.startswith("Replacing the text of A by noise costs .4000 M (.3000 to .5000), its pictures ")
    assert said.endswith(end)


CERTAIN = (0.1, 0.05, 0.15, 0.01)


@pytest.mark.parametrize(
    ("difference", "said"),
    [
        (CERTAIN, "The floor F is ahead of B by .1000 M (95 % interval .0500 to .1500); no model is above that floor."),
        ((0.1, -0.05, 0.15, 0.3), "The floor F and B cannot be told apart: the difference is .1000 M (95 % interval "),
        ((), "The floor F is ahead of B by .1000 M, not tested for want of values of single users; no model is above "),
    ],
)
def test_a_floor_that_no_model_is_above_is_named_as_one(difference, said):
    rows = [row("F", 0.3, "floor", difference), row("B", 0.2), row("A", 0.1)]
    told = wording.sentences(rows, metric="m", baseline="B")
    assert told[0].startswith(said) and told[0].endswith("; no model is above that floor.")
    assert told[1] == "The highest of 2 models is B with .2000; the highest floor is F with .3000 M."


def test_a_table_without_a_baseline_says_so():
    said = [
        wording.sentences(rows, metric="m", baseline="")[0] for rows in ([row("A", 0.5)], [row("A", 0.5), row("B", 0)])
    ]
    assert said == [
        "A has .5000 M; there is no other row to compare it with.",
        "A has the highest M, .5000, of 2 rows; there is no baseline to test it against.",
    ]


def test_a_baseline_below_a_floor_is_told_as_such():
    rows = [row("A", 0.5, difference=CERTAIN), row("F", 0.3, "floor"), row("B", 0.2)]
    assert wording.sentences(rows, metric="m", baseline="B")[0].endswith("; B is below the floor F too, .3000.")
    assert "below" not in wording.sentences(rows, metric="m", baseline="F")[0]
    rows = [row("a", 0.5, difference=CERTAIN), row("B", 0.2), row("F", 0.1, "floor")]
    assert wording.sentences(rows, metric="m", baseline="B")[0].startswith("a is ahead of B")
    assert "below" not in wording.sentences(rows, metric="m", baseline="B")[0]


def test_without_knock_outs_the_second_sentence_is_about_the_floors():
    rows = [row("A", 0.5), row("F", 0.3, "floor"), row("B", 0.2)]
    assert (
        wording.sentences(rows, metric="m", baseline="B")[1]
        == "1 of 2 models is above the highest floor, F with .3000 M."
    )
    assert "A is above the highest floor" in wording.sentences(rows[:2], metric="m", baseline="F")[1]
    assert "No model was run" in wording.sentences(rows[1:2], metric="m", baseline="F")[1]
    assert "No floor was run" in wording.sentences(rows[:1], metric="m", baseline="")[1]


def test_a_knock_out_of_prices_and_another_way_is_named():
    rows = [
        row("A", 0.5),
        row("k", 0.4, "knockout", gap=(0.1, 0.05, 0.15, 0.01), knockout="price:shuffle,text:constant"),
    ]
    said = wording.sentences(rows, metric="m", baseline="")[1]
    assert said.startswith("Shuffling the prices of A and making its text the same for all items costs .1000 M")


def test_the_names_of_files_do_not_leave_the_folder(made):
    made["tables"] = [{**made["tables"][0], "dataset": name} for name in ("..", "a/../b", "")]
    for stem in tables.by_dataset(made):
        assert Path(stem).name == stem and not stem.startswith(".")
