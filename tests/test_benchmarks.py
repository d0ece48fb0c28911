"""The one benchmark: what it counts, leaves out, fits, draws and compares."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import comparing, measuring, plot, report
from benchmarks.calibration import Calibration, calibrate
from benchmarks.cases import CASES, QUICK, NotEqualError
from benchmarks.clocks import Clock, Failed, times_as_fast
from benchmarks.flops import flop_of
from benchmarks.measuring import Options, memory_at_hand, predicted
from benchmarks.one_case import NO_MEMORY, NOT_EQUAL, Timed, alternately, time_of
from benchmarks.results import read_json, write_json
from benchmarks.startup import NEEDS, literal_feature, write_folder
from recbole_mm.model.workers import n_workers, share_out

REPOSITORY = Path(__file__).resolve().parents[1]
TINY = replace(QUICK, histories=60, batch=8, users=12, session_batch=4, sessions=12, checked_items=30, width=8)


# ------------------------------------------------ operations and rates


def test_operations_are_those_of_the_products_forward_and_backward():
    a, b = torch.randn(3, 4, requires_grad=True), torch.randn(4, 5, requires_grad=True)
    assert flop_of(lambda: a @ b) == 2 * 3 * 4 * 5
    assert flop_of(lambda: (a @ b).sum().backward()) == 3 * 2 * 3 * 4 * 5


def test_products_in_place_and_into_a_buffer_are_counted():
    a, b, out = torch.randn(3, 4), torch.randn(4, 5), torch.zeros(3, 5)
    assert flop_of(lambda: out.addmm_(a, b)) == flop_of(lambda: torch.mm(a, b, out=out)) == 120
    batch = torch.randn(2, 3, 4)
    assert flop_of(lambda: torch.zeros(2, 3, 5).baddbmm_(batch, b.expand(2, 4, 5))) == 240


def test_products_that_workers_make_are_counted():
    a, n_threads = torch.randn(8, 8), torch.get_num_threads()

    def shared() -> None:
        share_out(lambda number, worker: a @ a, 4, n_workers=n_workers(a.device, 4))

    torch.set_num_threads(2)
    try:
        assert flop_of(shared) == 4 * 2 * 8**3
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(n_threads)


def test_attention_on_a_cpu_is_counted():
    q = torch.randn(2, 3, 7, 8)
    counted = flop_of(lambda: torch.nn.functional.scaled_dot_product_attention(q, q, q))
    assert counted == 2 * (2 * 2 * 3 * 7 * 7 * 8)  # scores, and sums of values


def test_the_rate_is_the_best_of_all_products():
    found = calibrate(seconds_each=0)
    assert found.gflops == max(found.products.values()) > 0
    assert Calibration(1, "cpu", 50.0, {}).fraction(100e9, 4.0) == 0.5


# ------------------------------------------------ calls


class Ticking(Clock):
    """Each call takes as long as it says."""

    def seconds(self, call):
        return call()


def test_calls_alternate_and_end_with_the_budget():
    called = []

    def taking(name, seconds):
        return lambda batch: called.append(name) or seconds

    sides = {
        "ours": Timed(taking("ours", 1.0), range(4)),
        "literal": Timed(taking("literal", 3.0), range(4), budget=7.0, scale=10),
        "slow": Timed(taking("slow", 9.0), range(4), budget=7.0),
    }
    found = alternately(sides, Ticking())
    assert called == ["ours", "literal", "slow", "ours", "literal", "ours", "ours"]
    assert found["ours"]["samples"] == [1.0] * 3
    assert (found["literal"]["value"], found["literal"]["warm"]) == (30.0, True)
    assert (found["slow"]["value"], found["slow"]["warm"]) == (9.0, False)


def test_factors_are_medians_of_ratios_where_calls_are_paired():
    assert times_as_fast([1.0, 2.0, 4.0], [3.0, 8.0, 8.0]) == 3.0
    assert times_as_fast([1.0, 2.0, 4.0], [8.0]) == 4.0


@pytest.mark.parametrize("name", CASES)
def test_each_model_is_equal_to_its_literal_version_and_is_measured(name):
    case = CASES[name](100, TINY)
    found = time_of(case, literal=True, repeats=1, budget=1e9, clock=Clock("cpu", "processor"))
    measures = {"training step"} | ({"evaluation"} if case.evaluates else set())
    assert measures <= found.keys()
    for measure in measures:
        assert found[measure]["ours"]["gflop"] > 0 and found[measure]["literal"]["value"] > 0
    assert ("as shipped" in found["training step"]) == case.shipped_in_anomaly_mode


def test_a_model_that_differs_from_its_literal_version_is_not_timed(monkeypatch):
    case = CASES["sasrec"](100, TINY)
    monkeypatch.setattr(type(case), "differences", lambda self: {"loss": 0.0, "gradient": float("nan"), "score": 0.0})
    with pytest.raises(NotEqualError, match="SASRec: ours and the literal version differ by .*nan"):
        time_of(case, literal=True, repeats=1, budget=1.0, clock=Clock())


# ------------------------------------------------ what is left out


def test_costs_are_predicted_from_fewer_items():
    assert predicted({}, 1000) == 0
    assert predicted({10: 3.0}, 20) == 3.0
    rising = {n: 2.0 * n + 0.5 * n**2 for n in (10, 40)}
    assert predicted(rising, 100) == pytest.approx(200 + 5000)
    falling = {n: 7.0 + 2.0 * n for n in (10, 40)}
    assert predicted(falling, 100) == pytest.approx(207)
    assert predicted({10: 5.0, 40: 4.0}, 100) == 4.0  # it does not become cheaper
    assert predicted({10: 1.0, 20: 8.0}, 40) == 32.0  # more than quadratic: quadratic


class Faked:
    """Answers as processes do: N^2 seconds of the literal version's steps."""

    tasks: list = []

    def __init__(self, module, *, threads):
        Faked.tasks = []

    def __call__(self, task):
        self.tasks.append(task)
        if task.what == "start-up":
            return {"start-up": 2.0, "memory, start-up": {"growth_mib": 1.0, "peak_mib": 9.0}}
        if task.what == "memory":
            memory = {"growth_mib": task.items * 1.0, "peak_mib": task.items + 300.0}
            return {"memory, training": memory, "memory, evaluation": memory}
        side = {"value": 1.0, "samples": [1.0, 1.0], "warm": True, "gflop": 5.0, "scale": 1.0}
        slow = {**side, "value": task.items**2 / 1e4, "samples": [task.items**2 / 1e4]}
        sides = {"ours": side} | ({"literal": slow} if task.side == "both" else {})
        return {"training step": sides, "evaluation": sides, "calibration": {"gflops": 20.0}}


def measured(monkeypatch, options, processes=Faked):
    monkeypatch.setattr(measuring, "Processes", processes)
    steps, said = [], []
    rows = measuring.measure_all(options, step=steps.append, say=said.append)
    return rows, steps, said


OPTIONS = Options(cases=("unisrec",), items=(100, 200, 1000), sizes=TINY, budget=20.0)


def test_a_literal_version_that_would_take_too_long_is_left_out_with_the_reason(monkeypatch):
    rows, steps, said = measured(monkeypatch, OPTIONS)
    assert said == [
        "UniSRec fine-tuning, 1,000 items: literal version left out, a step would take about 100 s, more than "
        "--budget=20"
    ]
    assert not [t for t in Faked.tasks if t.items == 1000 and t.side != "ours" and t.what != "start-up"]
    assert len(steps) == OPTIONS.n_processes()
    step = {row["items"]: row for row in rows if row["measure"] == "training step"}
    assert (step[200]["factor"], step[200]["of_rate"]) == (4.0, 0.25)
    assert "factor" not in step[1000] and "more than --budget" in step[1000]["literal"]["skipped"]
    assert any("1,000 items, literal: a step would take about 100 s" in line for line in report.left_out(rows))


def test_a_literal_version_that_needs_more_memory_than_there_is_is_left_out(monkeypatch):
    monkeypatch.setattr(measuring, "memory_at_hand", lambda device: 600.0)
    _, _, said = measured(monkeypatch, replace(OPTIONS, budget=1e9))
    assert said == [
        "UniSRec fine-tuning, 1,000 items: literal version left out, it would take about 1.0 GiB, and 0.6 GiB are at "
        "hand"
    ]


class FailingWith:
    def __init__(self, status, when):
        self.status, self.when = status, when

    def __call__(self, module, *, threads):
        answers = Faked(module, threads=threads)

        def answer(task):
            if self.when(task):
                raise Failed(self.status, "why")
            return answers(task)

        return answer


def test_memory_that_runs_out_costs_the_literal_version_alone(monkeypatch):
    failing = FailingWith(NO_MEMORY, lambda task: task.what == "time" and task.side == "both")
    rows, _, said = measured(monkeypatch, replace(OPTIONS, items=(100,)), failing)
    (step,) = [row for row in rows if row["measure"] == "training step"]
    assert step["literal"] == {"skipped": "why"} and step["ours"]["value"] == 1.0
    assert not report.has_failed(rows) and "why" in said[0]


@pytest.mark.parametrize("status", [NOT_EQUAL, 1, -9])
def test_a_failure_of_ours_is_told_and_fails_the_command(monkeypatch, status):
    rows, _, said = measured(monkeypatch, OPTIONS, FailingWith(status, lambda task: task.what == "time"))
    assert report.has_failed(rows)
    assert {NOT_EQUAL: "why", 1: "failed: why", -9: "memory ran out"}[status] in said[0]
    assert "failed" in report.as_text(rows)


def test_memory_at_hand_is_a_number_of_mib():
    assert memory_at_hand("cpu") > 100


# ------------------------------------------------ start-up


def test_the_literal_start_finds_each_item_s_rows_by_name(tmp_path):
    folder = tmp_path / "made-up"
    write_folder(folder, "MSM4SR", 20, n_users=10, n_rows=2, width=4)
    import numpy as np

    from recbole_mm.data.layout import read_feature

    feature = read_feature(folder, "text")
    padded, counts = literal_feature(folder, "text", np.array(["[PAD]", feature.tokens[5], "unknown"]))
    assert padded.shape == (3, 2, 4) and counts.tolist() == [0, 2, 0]
    torch.testing.assert_close(padded[1], torch.from_numpy(np.array(feature.rows[10:12])))
    assert not padded[0].any() and not padded[2].any()


def test_every_model_of_the_cases_has_its_features_for_the_start():
    assert {case.model for case in CASES.values()} == set(NEEDS)


# ------------------------------------------------ report


def row(case="MMSBR", measure="training step", items=5000, *, unit="s", ours=1.0, literal=None, **more):
    sides = {"ours": {"value": ours, "samples": [ours], "gflop": 3.0}}
    if literal is not None:
        sides["literal"] = {"value": literal, "samples": [literal]}
    return {"case": case, "measure": measure, "items": items, "unit": unit, **sides, **more}


def test_exponents_are_slopes_in_logarithms():
    rows = [row(items=n, ours=7 * n**1.3, literal=n**2.0) for n in (1000, 5000, 20_000)]
    ours, literal = report.fits(rows)
    assert (ours.side, literal.side) == ("ours", "literal")
    assert (ours.exponent, ours.last) == pytest.approx((1.3, 1.3))
    assert (literal.exponent, literal.last) == pytest.approx((2.0, 2.0))


def test_what_does_not_grow_hides_less_in_the_last_slope():
    rows = [row(items=n, ours=1000 + n * 1.0) for n in (1000, 5000, 20_000)]
    (fit,) = report.fits(rows)
    assert fit.exponent < fit.last < 1


def test_memory_that_grows_too_fast_is_not_reached():
    def told(power):
        rows = [row(measure="memory, training", unit="MiB", items=n, ours=n**power) for n in (1000, 5000, 20_000)]
        return report.figures(rows)[0]

    assert told(1.0)["reached"] and told(1.09)["reached"] and not told(1.11)["reached"]


def test_a_figure_is_judged_where_it_is_to_be_reached():
    step = {"case": "MSM4SR pre-training", "factor": 9.0}
    assert [f["reached"] for f in report.figures([row(items=5000, **step)])] == [True]
    assert report.figures([row(items=20_000, **step)]) == []
    tower = {"measure": "item tower", "of_rate": 0.4}
    assert [f["reached"] for f in report.figures([row(items=20_000, **tower)])] == [False]
    assert report.figures([row(items=600, **tower)]) == []


@pytest.mark.parametrize(
    ("side", "unit", "expected"),
    [
        ({"value": 0.0123}, "s", "12.3 ms"),
        ({"value": 1.2345}, "s", "1.23 s"),
        ({"value": 123.4, "warm": False, "scale": 7}, "s", "123 s*~"),
        ({"value": 2048.4}, "MiB", "2,048 MiB"),
        ({"value": 20_480}, "MiB", "20.0 GiB"),
        ({"skipped": "too long"}, "s", "left out"),
        ({"failed": "why"}, "s", "failed"),
        (None, "s", ""),
    ],
)
def test_a_number_is_told_in_few_digits(side, unit, expected):
    assert report.told(side, unit) == expected


def test_both_tables_have_all_rows():
    rows = [row(literal=12.0, factor=12.0, rate=10.0, of_rate=0.3), row("SASRec", "start-up", ours=0.5)]
    text, markdown = report.as_text(rows), report.as_markdown(rows)
    assert text.splitlines()[3].split() == ["training", "step", "5,000", "12", "s", "1", "s", "12.0x", "3", "30%"]
    assert "| **SASRec** |" in markdown and "| start-up | 5,000 |  |  | 0.5 s |" in markdown
    assert len(markdown.splitlines()) == 6


# ------------------------------------------------ plot


def circles(drawing):
    return list(ElementTree.fromstring(drawing).iter("{http://www.w3.org/2000/svg}circle"))


def test_the_plot_has_a_point_for_each_number():
    rows = [row(items=n, ours=n / 1e4, literal=n / 1e3) for n in (1000, 5000, 20_000)]
    drawing = plot.svg(rows, "Cost <of> items")
    points = circles(drawing)
    assert len(points) == 6
    tips = {point[0].text for point in points}
    assert "recbole_mm, 5,000 items: 500 ms" in tips and "literal, 20,000 items: 20 s" in tips
    assert "Cost &lt;of&gt; items" in drawing


def test_points_of_the_plot_lie_on_logarithmic_axes():
    rows = [row(items=n, ours=n / 1000) for n in (1000, 10_000, 100_000)]
    x, y = ([float(point.get(key)) for point in circles(plot.svg(rows, ""))] for key in ("cx", "cy"))
    assert x[1] - x[0] == pytest.approx(x[2] - x[1], abs=0.2) and x[0] < x[1]
    assert y[0] - y[1] == pytest.approx(y[1] - y[2], abs=0.2) and y[0] > y[1]


def test_stages_that_start_alike_have_the_same_panel_of_start_up():
    rows = [row("MSM4SR", "start-up", n) for n in (1000, 5000)]
    rows += [row(f"MSM4SR {stage}", items=n) for stage in ("pre-training", "fine-tuning") for n in (1000, 5000)]
    assert len(circles(plot.svg(rows, ""))) == 8
    loaded = ("http", "src=", "<script", "url(")
    namespace = 'xmlns="http://www.w3.org/2000/svg"'
    assert not any(word in plot.page(plot.svg(rows, ""), "t").replace(namespace, "") for word in loaded)


# ------------------------------------------------ two measurements


def file_of(rows, **machine):
    on = {"processor": "p", "cores": 2, "threads": 1, "device": "cpu", **machine}
    return {"machine": on, "calibration": {"gflops": 50.0}, "settings": {"sizes": {"rows": 1}}, "results": rows}


def seconds(*samples):
    found = row()
    found["ours"] = {"value": sorted(samples)[len(samples) // 2], "samples": list(samples)}
    return [found]


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ((1.0, 1.1, 1.2), (1.5, 1.6, 1.7), "SLOWER"),
        ((1.0, 1.1, 1.6), (1.5, 1.6, 1.7), None),  # ranges meet
        ((1.0, 1.01, 1.02), (1.05, 1.06, 1.07), None),  # less than a tenth
        ((1.5, 1.6, 1.7), (1.0, 1.1, 1.2), "faster"),
        ((1.0,), (1.15,), None),  # one call each
        ((1.0,), (1.5,), "SLOWER"),
    ],
)
def test_a_time_has_changed_where_ranges_do_not_meet(before, after, expected):
    lines, worse = comparing.compare(file_of(seconds(*before)), file_of(seconds(*after)))
    assert worse == (expected == "SLOWER")
    assert len(lines) == 1 + bool(expected) and (not expected or expected in lines[0])


def test_memory_has_changed_by_a_twentieth_and_some_mib():
    def worse(before, after):
        old, new = (file_of([row(measure="memory, training", unit="MiB", ours=v)]) for v in (before, after))
        return comparing.compare(old, new)[1]

    assert worse(1000.0, 1060.0) and not worse(1000.0, 1040.0) and not worse(20.0, 25.0) and not worse(1060.0, 1000.0)


def test_on_another_machine_seconds_are_scaled_by_the_matrix_rate():
    old, new = file_of(seconds(1.0)), file_of(seconds(2.0), cores=4)
    new["calibration"]["gflops"] = 25.0
    lines, worse = comparing.compare(old, new)
    assert not worse and "another machine (cores 2 and 4): old seconds are multiplied by 2.00" in lines[0]


def test_a_measurement_that_fails_now_is_worse():
    new = seconds(1.0)
    new[0]["ours"] = {"failed": "why"}
    lines, worse = comparing.compare(file_of(seconds(1.0)), file_of(new))
    assert worse and "FAILED" in lines[0]


def test_other_data_are_not_compared():
    other = file_of(seconds(1.0)) | {"settings": {"sizes": {"rows": 2}}}
    with pytest.raises(ValueError, match="not the same data"):
        comparing.compare(file_of(seconds(1.0)), other)


# ------------------------------------------------ files and commands


def test_a_file_of_measurements_is_read_as_written(tmp_path):
    write_json(tmp_path / "a" / "b.json", {"x": 1}, Calibration(1, "cpu", 9.0, {}), settings={"items": [1]})
    found = read_json(tmp_path / "a" / "b.json")
    assert (found["results"], found["settings"], found["calibration"]["gflops"]) == ({"x": 1}, {"items": [1]}, 9.0)
    assert {"processor", "cores", "threads", "torch"} <= found["machine"].keys()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": 1}'])
def test_another_file_is_refused(tmp_path, content, capsys):
    file = tmp_path / "a.json"
    file.write_text(content)
    assert command.main(["--compare", str(file), str(file)]) == 2
    assert f"{file} is no file of measurements" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--models", "mmsbr", "nothing"], "--models: nothing is none of msm4sr-pretrain, "),
        (["--items", "5"], "--items: 5 is too few, at least 100"),
        (["--compare", "a", "b", "c"], "--compare takes an older file and perhaps a newer one"),
    ],
)
def test_wrong_options_are_told(arguments, message, capsys):
    assert command.main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_none_is_measured(capsys):
    assert command.main(["--device", "cuda"]) == 2
    assert "PyTorch finds no GPU" in capsys.readouterr().err


def test_all_commands_are_listed_with_a_sentence(capsys):
    assert command.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {"mmsbr", "msm4sr", "unisrec", "evaluation", "calibration"} <= command.commands().keys()
    assert len(lines) == len(command.commands()) and all(line.strip()[-1] in ".;" for line in lines)


def test_the_whole_command_prints_and_writes_what_was_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measuring, "Processes", Faked)
    monkeypatch.setattr("benchmarks.startup.import_seconds", lambda: 3.0)
    arguments = ["--models", "unisrec", "--items", "5000", "1000", "--quick", "--out", str(tmp_path), "--threads", "1"]
    assert command.main(arguments) == 0
    out = capsys.readouterr().out
    assert "GFLOP/s on 1 thread" in out and "UniSRec fine-tuning" in out and "left out" in out
    told = json.loads((tmp_path / "benchmark.json").read_text())
    assert told["settings"]["items"] == [1000, 5000] and told["imports"] == 3.0
    assert "| **UniSRec fine-tuning** |" in (tmp_path / "benchmark.md").read_text()
    assert "<svg" in (tmp_path / "benchmark.html").read_text()
    assert command.main(["--compare", *[str(tmp_path / "benchmark.json")] * 2]) == 0


@pytest.mark.slow
def test_the_benchmark_runs_for_real(tmp_path):
    arguments = ["--quick", "--models", "sasrec", "--items", "100", "--threads", "1", "--out", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "benchmark.json").read_text())["results"]
    assert len(rows) == 6 and all("value" in row["ours"] and "value" in row["literal"] for row in rows)
