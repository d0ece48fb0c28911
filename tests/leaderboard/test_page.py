"""The page opens from disk, shows what the board says, and bears phones, the dark and hostile names."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import random
import re
import shutil
from pathlib import Path

import pytest

from recbole_mm.leaderboard.page import (
    FEWEST_POINTS,
    MOST_POINTS,
    decimated,
    embedded,
    packed,
    page_text,
    points_per_curve,
    write_page,
)

METRICS = ["recall@10", "recall@20", "ndcg@10", "ndcg@20", "mrr@20"]
HOSTILE = "</script><img src=x onerror=\"document.title='broken'\">&amp;\u2028<!--"
BROWSER, DRIVER = (shutil.which(name) or f"/usr/bin/{name}" for name in ("chromium", "chromedriver"))


# ------------------------------------------------ a board with known contents


def board_of(tables: list[dict], runs: dict[str, dict], problems: list[str] | None = None) -> dict:
    return {
        "generated": "2026-01-31 12:00",
        "version": "9.9",
        "tables": tables,
        "runs": runs,
        "problems": problems or [],
    }


def small_board(n_epochs: int = 30) -> dict:
    """Two datasets; the first has three models, a floor and two knock-outs of three seeds each, and a failed run."""
    source = random.Random(1)
    runs: dict[str, dict] = {}
    recall = {"MSM4SR": 0.31, "SASRec": 0.30, "MMSBR": 0.22, "Pop": 0.10, "MSM4SR − text:noise": 0.24}
    recall["MSM4SR − image:noise"] = 0.305
    rows = [row_of(name, value, "alpha", runs, source, n_epochs) for name, value in recall.items()]
    rows[0]["paper"] = {"recall@20": {"value": 0.4, "source": "a paper", "note": "other filtering of items"}}
    rows[0]["cost"]["peak_memory_gpu"] = 3 * 2**29
    rows[2]["warnings"] = ["12 of 300 test rows got the same score for every item"]
    failed = {"run_id": "f" * 12, "model": "MMSBR", "seed": 7, "error": "training loss is not finite in epoch 3"}
    alpha = table_of("alpha", "leave-one-out", "training sees interactions later than the tested ones", rows)
    alpha["failed"] = [failed | {"settings_given": {"learning_rate": 10}, "knockout": "text:noise"}]
    paper = {"name": "CL4SRec", "source": "another paper", "note": "sampled metrics", "metrics": {"recall@20": 0.7654}}
    alpha["reported"] = [paper]
    beta = table_of(
        "beta", "cold-items", "", [row_of(name, 0.2, "beta", runs, source, n_epochs) for name in ("MSM4SR", "Pop")]
    )
    return board_of([alpha, beta], runs, ["results/runs.jsonl, line 3 is no record of a run: NaN is no result"])


def table_of(dataset: str, protocol: str, note: str, rows: list[dict]) -> dict:
    return {
        "id": f"{dataset}/{protocol}/0123abcd",
        "dataset": dataset,
        "protocol": protocol,
        "protocol_note": note,
        "data_fingerprint": "21fd151ab742",
        "test_fingerprint": "0123456789abcdef",
        "n_test": 300,
        "n_items": 1200,
        "metrics": METRICS,
        "main_metric": "Recall@20",
        "baseline": "SASRec",
        "sentences": ["MSM4SR is best by recall@20.", "SASRec cannot be told apart from it."],
        "rows": rows,
        "failed": [],
        "notes": [],
    }


def row_of(name: str, recall: float, dataset: str, runs: dict, source: random.Random, n_epochs: int) -> dict:
    model, _, knockout = name.partition(" − ")
    floor = model == "Pop"
    means = {metric: recall * (0.5 + 0.1 * position) for position, metric in enumerate(METRICS)} | {"recall@20": recall}
    ids = []
    for seed in (1, 2, 3):
        ids.append(f"{len(runs):012x}")
        runs[ids[-1]] = run_of(ids[-1], model, dataset, seed, knockout, means, 0 if floor else n_epochs, source)
    part = {"mean": recall - 0.3, "low": recall - 0.32, "high": recall - 0.28, "p": 0.001, "p_holm": 0.004}
    if abs(recall - 0.3) < 0.02:
        part |= {"p": 0.3, "p_holm": 0.6}
    gap = {"mean": 0.31 - recall, "low": 0.31 - recall - 0.02, "high": 0.31 - recall + 0.02, "p": 0.01}
    return {
        "name": name,
        "model": model,
        "kind": "floor" if floor else "knockout" if knockout else "model",
        "knockout": knockout or None,
        "of": model if knockout else None,
        "run_ids": ids,
        "seeds": [1, 2, 3],
        "n_settings": 1,
        "valid": {metric: {"mean": mean * 1.05, "sd": 0.004} for metric, mean in means.items()},
        "test": {metric: {"mean": mean, "sd": 0.003, "bold": recall >= 0.3} for metric, mean in means.items()},
        "difference": {} if name == "SASRec" else {metric: part for metric in METRICS},
        "gap": {metric: gap for metric in METRICS} if knockout else {},
        "cost": {
            "parameters": 0 if floor else int(2e6 * recall),
            "seconds_per_epoch": None if floor else 12.5 * recall,
            "train_seconds": 0.02 if floor else 400 * recall**2,
            "epochs": 1 if floor else n_epochs,
            "peak_memory": 2**29 + int(2**30 * recall),
            "latency_ms": 0.4 + recall,
        },
        "budget": {"trials": 20, "seconds": 1300.0, "space_hash": "ab12", "sampler": "TPE"} if model == "MMSBR" else {},
        "paper": {},
        "slices": {
            "popularity": {
                band: {"n": n} | {metric: mean * factor for metric, mean in means.items()}
                for band, n, factor in (("head", 120, 1.3), ("mid", 90, 0.9), ("tail", 80, 0.6), ("cold", 10, 0.2))
            },
            "history": {"1-2": {"n": 150} | means, "3-5": {"n": 150} | means},
        },
        "warnings": [],
    }


def run_of(
    run_id: str,
    model: str,
    dataset: str,
    seed: int,
    knockout: str,
    means: dict[str, float],
    n_epochs: int,
    source: random.Random,
) -> dict:
    curve = [
        {
            "epoch": epoch,
            "train_loss": 4 + 3 * math.exp(-epoch / 8) + source.gauss(0, 0.03),
            "valid": means["recall@20"] * (1 - math.exp(-(epoch + 1) / 5)) + source.gauss(0, 0.003),
        }
        for epoch in range(n_epochs)
    ]
    best = max(range(n_epochs), key=lambda epoch: curve[epoch]["valid"], default=0)
    names = ("pretrain", "finetune") if model == "MSM4SR" else ("train",)
    stages = [
        {
            "stage": stage,
            "seconds": 20.5,
            "epochs": n_epochs,
            "best_epoch": best,
            "valid": means,
            "checkpoint": "/home/somebody/saved/x.pth",
            "curve": curve,
        }
        for stage in names
    ]
    return {
        "run_id": run_id,
        "model": model,
        "dataset": dataset,
        "protocol": "leave-one-out",
        "seed": seed,
        "knockout": knockout or None,
        "status": "done",
        "error": "",
        "started": "2026-01-31T11:00:00",
        "settings_given": {"epochs": n_epochs},
        "features": {"text": "46b1d346f9e4d9d8295145fb836be4ee1aaef825651a2c8375985d28e2b54ae0"}
        if model == "MSM4SR"
        else {},
        "data_fingerprint": "21fd151ab742",
        "settings_hash": "aabbccddeeff",
        "versions": {"torch": "2.13.0", "recbole": "1.2.1"},
        "command": f"python run_recbole_mm.py --model={model} --dataset={dataset} --seed={seed} --epochs={n_epochs}",
        "seconds": {"data": 1.5, "train": 20.5, "test": 0.4},
        "peak_memory": {"resident": 2**30},
        "stages": stages,
        "valid": means,
        "test": means,
        "warnings": [],
        "budget": {},
        "n_parameters": 123456,
        "latency": {"batch_ms_per_user": 0.41, "single_ms": 3.2},
    }


def data_in(text: str, block: str) -> dict:
    return json.loads(re.search(rf'<script id="{block}" type="application/json">(.*?)</script>', text, re.DOTALL)[1])


# ------------------------------------------------ the file


def test_the_page_is_one_file_that_loads_nothing(tmp_path):
    write_page(small_board(), tmp_path / "leaderboard.html")
    text = (tmp_path / "leaderboard.html").read_text()
    assert [file.name for file in tmp_path.iterdir()] == ["leaderboard.html"]
    assert set(re.findall(r"https?://[^\s\"']+", text)) == {"http://www.w3.org/2000/svg"}  # a name, never fetched
    assert not re.search(r"@import|url\(|\ssrc=|<iframe|<object|<embed", text)
    assert re.findall(r"<link [^>]*>", text) == ['<link rel="icon" href="data:,">']
    assert "{{" not in text.replace("${", "")


def test_the_content_security_policy_allows_this_script_and_style_only():
    text = page_text(small_board())
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', text)[1]
    assert policy.startswith("default-src 'none';") and "unsafe" not in policy and "connect-src" not in policy
    for element, rule in (("style", "style-src"), ("script", "script-src")):
        (content,) = re.findall(rf"<{element}>(.*?)</{element}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        assert f"{rule} 'sha256-{digest}'" in policy


def test_the_script_writes_no_markup():
    script = re.search(r"<script>(.*?)</script>", page_text(small_board()), re.DOTALL)[1]
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|DOMParser", script
    )


@pytest.mark.parametrize("text", [HOSTILE, "{{board}} {{script}}", "\u2028\u2029", "\ud800 alone", "</SCRIPT >", "]]>"])
def test_hostile_text_cannot_leave_its_block_and_comes_back_as_it_was(text):
    content = embedded({"name": text})
    assert not set("<>&\u2028\u2029") & set(content)
    assert json.loads(content) == {"name": text}
    board = small_board(2)
    board["tables"][0]["rows"][0]["name"] = text
    page = page_text(board)
    page.encode()
    assert page.count("</script>") == 3 and page.lower().count("<script") == 3
    assert data_in(page, "board")["tables"][0]["rows"][0]["name"] == text


def test_values_that_are_not_finite_become_empty():
    board = small_board(2)
    board["tables"][0]["rows"][0]["test"]["recall@20"]["mean"] = math.nan
    run_id = next(iter(board["runs"]))
    board["runs"][run_id]["seconds"] = {"train": math.inf}
    page = page_text(board)
    assert data_in(page, "board")["tables"][0]["rows"][0]["test"]["recall@20"]["mean"] is None
    assert data_in(page, "runs")["runs"][run_id]["seconds"] == {"train": None}


def test_a_board_without_runs_makes_a_page():
    assert data_in(page_text(board_of([], {})), "board")["tables"] == []


def test_a_run_keeps_its_details_and_loses_the_path_of_its_checkpoint():
    runs = small_board(5)["runs"]
    small = packed(runs, 200)
    run_id, run = next(iter(runs.items()))
    kept = small["runs"][run_id]
    for key in ("seed", "command", "data_fingerprint", "settings_hash", "latency", "n_parameters", "started"):
        assert kept[key] == run[key]
    for key in ("versions", "features", "settings_given"):
        assert small["shared"][kept[key]] == run[key]
    names, values = kept["test"]
    assert dict(zip(small["shared"][names], values, strict=True)) == run["test"]
    assert [stage["stage"] for stage in kept["stages"]] == ["pretrain", "finetune"]
    assert kept["stages"][0]["curve"]["epoch"] == [0, 1, 2, 3, 4]
    assert "saved/x.pth" not in json.dumps(small)


@pytest.mark.parametrize("n_epochs", [1, 2, 199, 200, 201, 5000])
def test_a_long_curve_keeps_first_last_and_best_in_at_most_200_points(n_epochs):
    best = n_epochs * 2 // 3
    kept = decimated(n_epochs, MOST_POINTS, (best,))
    assert kept == sorted(set(kept)) and len(kept) == min(n_epochs, MOST_POINTS) or len(kept) == MOST_POINTS - 1
    assert {0, n_epochs - 1} <= set(kept) and (best in kept or n_epochs == 1)
    assert max(after - before for before, after in zip(kept, kept[1:], strict=False)) <= 26 if n_epochs > 1 else True


def test_many_curves_have_fewer_points_each():
    run = {"stages": [{"stage": "train", "best_epoch": 3, "curve": [{"epoch": 0, "train_loss": 1.0, "valid": 0.1}]}]}
    assert points_per_curve({"a": run}) == MOST_POINTS
    assert points_per_curve({str(number): run for number in range(10_000)}) == 40
    assert points_per_curve({str(number): run for number in range(100_000)}) == FEWEST_POINTS


# ------------------------------------------------ in a browser


@pytest.fixture(scope="module")
def browser():
    """One headless Chromium for all tests; selenium's own download of drivers is off."""
    pytest.importorskip("selenium")
    for program in (BROWSER, DRIVER):
        if not Path(program).exists():
            pytest.skip(f"no {program}: apt-get install chromium chromium-driver")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    """Address of the page of the small board."""
    path = tmp_path_factory.mktemp("page") / "leaderboard.html"
    write_page(small_board(), path)
    return path.as_uri()


@pytest.fixture
def opened(browser, page):
    """Opens a page at some width, and looks afterwards that the browser had nothing to complain of."""

    def go(address: str = "", *, url: str = page, width: int = 1280, scheme: str = "light"):
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "", "features": features})
        browser.get("about:blank")  # else only the hash would change
        browser.get(url + address)
        return browser

    browser.get_log("browser")
    yield go
    assert browser.get_log("browser") == []


def names_in(browser, table: int = 0, kind: str = "model") -> list[str]:
    return browser.execute_script(
        "const rows = `tbody.${arguments[1]} tr[data-row]`;"
        "const board = document.querySelectorAll('.board')[arguments[0]];"
        "return [...board.querySelectorAll(rows)].map((row) => row.dataset.row)",
        table,
        kind,
    )


def click(browser, selector: str) -> None:
    browser.execute_script("document.querySelector(arguments[0]).click()", selector)


def count(browser, selector: str) -> int:
    return browser.execute_script("return document.querySelectorAll(arguments[0]).length", selector)


def text_of(browser, selector: str) -> str:
    return browser.execute_script("return document.querySelector(arguments[0])?.innerText ?? ''", selector)


def test_the_page_shows_tables_notes_failures_and_problems(opened):
    browser = opened()
    assert count(browser, ".board") == 2
    for text in (
        "alpha",
        "training sees interactions later than the tested ones",
        "300",
        "1,200",
        "SASRec cannot be told",
    ):
        assert text in text_of(browser, ".board")
    assert "line 3 is no record of a run" in text_of(browser, "#problems")
    assert "recbole_mm 9.9" in text_of(browser, "#about") and "2026-01-31 12:00" in text_of(browser, "#about")
    row = text_of(browser, 'tr[data-row="MSM4SR"]')
    for text in ("0.3100 ± 0.0030", "[−0.0100, +0.0300]", "0.600", "620 k", "38.4 s", "0.4000", "3.88", "1.5 GiB"):
        assert text in row
    assert count(browser, '.board tr[data-row="SASRec"] strong') == 3  # tied with the best in each metric
    assert text_of(browser, ".failed summary") == "1 failed run"
    click(browser, ".failed summary")
    assert "training loss is not finite in epoch 3" in text_of(browser, ".failed")
    assert "MMSBR − text:noise" in text_of(browser, ".failed")
    assert "learning_rate: 10" in text_of(browser, ".failed")
    assert count(browser, 'tr[data-row="CL4SRec"]') == 0  # a paper's values stand apart
    click(browser, ".reported summary")
    for text in ("not comparable", "CL4SRec", "0.7654", "another paper: sampled metrics"):
        assert text in text_of(browser, ".reported")


def test_a_click_on_a_header_sorts_and_another_turns_the_order(opened):
    browser = opened()
    assert names_in(browser) == ["MSM4SR", "SASRec", "MMSBR"]
    header = '[data-sort="cost:parameters"]'
    click(browser, header)
    assert names_in(browser) == ["MMSBR", "SASRec", "MSM4SR"]
    sort = "return document.querySelector(arguments[0]).closest('th').getAttribute('aria-sort')"
    assert browser.execute_script(sort, header) == "ascending"
    click(browser, header)
    assert names_in(browser) == ["MSM4SR", "SASRec", "MMSBR"]
    assert browser.execute_script(sort, header) == "descending"
    assert names_in(browser, kind="knockout")[0] == "MSM4SR − image:noise"  # each group in the same order
    click(browser, '[data-sort="name"]')
    assert names_in(browser) == ["MMSBR", "MSM4SR", "SASRec"]
    click(browser, '[data-sort="difference"]')  # the baseline has none, and comes last in both directions
    assert names_in(browser)[-1] == "SASRec"
    click(browser, '[data-sort="difference"]')
    assert names_in(browser)[-1] == "SASRec"


def test_curves_are_named_by_the_metric_that_selected_whatever_is_shown(opened, tmp_path):
    board = small_board()
    board["tables"][0] |= {"main_metric": "mrr@20", "selected_by": "recall@20"}
    write_page(board, tmp_path / "leaderboard.html")
    text = opened("#dataset=alpha", url=(tmp_path / "leaderboard.html").as_uri()).find_element("tag name", "main").text
    assert "MRR@20 against" in text and "validation Recall@20" in text and "validation MRR@20" not in text


def test_all_metrics_are_shown_when_asked_for(opened):
    browser = opened()
    shown = (
        "const board = document.querySelector('.board');"
        "return [...board.querySelectorAll('[data-sort^=test]')].map((button) => button.innerText)"
    )
    assert browser.execute_script(shown) == ["Recall@20", "NDCG@20", "MRR@20"]
    click(browser, "#all")
    assert [name.lower() for name in browser.execute_script(shown)] == METRICS and "all=1" in browser.current_url


def test_sorting_works_with_the_keyboard_and_keeps_the_focus(opened):
    from selenium.webdriver.common.keys import Keys

    browser = opened()
    browser.execute_script("document.querySelector('[data-sort=\"name\"]').focus()")
    browser.switch_to.active_element.send_keys(Keys.ENTER)
    assert names_in(browser) == ["MMSBR", "MSM4SR", "SASRec"]
    browser.switch_to.active_element.send_keys(Keys.SPACE)
    assert names_in(browser) == ["SASRec", "MSM4SR", "MMSBR"]


def choose(browser, selector: str, value: str) -> None:
    browser.execute_script(
        "const s = document.querySelector(arguments[0]); s.value = arguments[1]; s.dispatchEvent(new Event('change'))",
        selector,
        value,
    )


def test_filters_narrow_tables_and_rows_and_the_address_restores_them(opened):
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    browser = opened()
    choose(browser, "#dataset", "alpha")
    assert count(browser, ".board") == 1
    choose(browser, "#protocol", "leave-one-out")
    choose(browser, "#metric", "ndcg@10")
    click(browser, "#floors")
    click(browser, "#knockouts")
    assert names_in(browser, kind="floor") == names_in(browser, kind="knockout") == []
    click(browser, '[data-sort="name"]')
    browser.find_element(By.ID, "model").send_keys("sr")
    WebDriverWait(browser, 5).until(lambda _: "model=sr" in browser.current_url)
    assert names_in(browser) == ["MSM4SR", "SASRec"]
    address = "#" + browser.current_url.split("#")[1]
    assert "dataset=alpha" in address and "sort=name" in address and "hide=floors" in address

    opened(address)
    assert names_in(browser) == ["MSM4SR", "SASRec"] and count(browser, ".board") == 1
    assert browser.find_element(By.ID, "metric").get_attribute("value") == "ndcg@10"
    assert text_of(browser, "th[aria-sort=ascending]").startswith("Model")
    assert count(browser, "th[aria-sort] button[data-sort='test:ndcg@10']") == 1
    click(browser, "#clear")
    assert count(browser, ".board") == 2 and "#" not in browser.current_url


def test_filters_that_match_nothing_say_what_to_do(opened):
    browser = opened("#dataset=alpha&protocol=cold-items")
    assert "choose others, or press Clear" in text_of(browser, "#main")
    opened("#model=nobody")
    assert "No row of this table matches" in text_of(browser, "#main")
    opened("#dataset=unknown&sort=nonsense&metric=nonsense&run=nonsense")
    assert count(browser, ".board") == 2 and names_in(browser) == ["MSM4SR", "SASRec", "MMSBR"]


def test_plots_have_a_mark_for_every_value(opened):
    browser = opened("#dataset=alpha")
    assert count(browser, "[data-panel=cost] figure .mark") == 6
    assert count(browser, "[data-panel=knockouts] .mark") == 2
    assert count(browser, "[data-panel=knockouts] .mark.hollow") == 1  # its interval holds zero
    assert count(browser, "[data-panel=slices] .mark") == 4 * 4  # rows in the plot times bands
    assert "Fewer than 30 test rows in cold" in text_of(browser, "[data-panel=slices]")
    assert count(browser, "[data-panel=curves] svg") == 6  # loss and validation of pre-training, fine-tuning, training
    assert count(browser, "[data-panel=curves] path.line") == 2 * (3 + 3 + 2 * 3)
    assert count(browser, "[data-panel=curves] circle.best") == 3 + 3 + 2 * 3
    assert "No curve of Pop" in text_of(browser, "[data-panel=curves]")
    choose(browser, "[data-choice=slice]", "history")
    assert count(browser, "[data-panel=slices] .mark") == 4 * 2
    choose(browser, "[data-choice=cost]", "seconds_per_epoch")
    assert count(browser, "[data-panel=cost] figure .mark") == 5 and "1 row without" in text_of(
        browser, "[data-panel=cost]"
    )
    choose(browser, "[data-choice=cost]", "parameters")  # a floor has none: zero keeps a place on a logarithmic axis
    assert count(browser, "[data-panel=cost] figure .mark") == 6
    ticks = "return [...document.querySelectorAll('[data-panel=cost] figure text')].map((text) => text.textContent)"
    assert "0" in browser.execute_script(ticks)
    click(browser, ".chip button")
    assert count(browser, "[data-panel=slices] .mark") == 3 * 2
    named = (
        "return [...document.querySelectorAll('svg[role=img]')].every((svg) => svg.querySelector('title').textContent)"
    )
    assert browser.execute_script(named)


def test_nothing_is_drawn_outside_its_plot(opened):
    outside = """
    return [...document.querySelectorAll('svg.plot')].flatMap((svg) => {
      const frame = svg.getBoundingClientRect();
      return [...svg.querySelectorAll('text, .mark, .line')].filter((part) => {
        const box = part.getBoundingClientRect();
        return box.left < frame.left - 1 || box.right > frame.right + 1
          || box.top < frame.top - 1 || box.bottom > frame.bottom + 1;
      }).map((part) => `${svg.querySelector('title').textContent}: ${part.textContent}`);
    })"""
    for width in (1280, 360):
        assert opened("#dataset=alpha", width=width).execute_script(outside) == []


def test_details_of_a_run_open_on_demand_with_its_command(opened):
    browser = opened()
    assert count(browser, ".run") == 0
    click(browser, '[data-open^="row|alpha"]')
    assert count(browser, ".run") == 3 and "Row minus SASRec" in text_of(browser, ".detail-box")
    assert count(browser, ".run dl") == 0
    click(browser, ".run summary")
    browser.execute_async_script("requestAnimationFrame(() => setTimeout(arguments[0]))")
    details = text_of(browser, ".run")
    for text in ("epochs: 30", "21fd151ab742", "aabbccddeeff", "46b1d346f9e4", "torch 2.13.0", "123,456", "1 GiB"):
        assert text in details
    assert "python run_recbole_mm.py --model=MSM4SR --dataset=alpha --seed=1 --epochs=30" in details
    assert "python -m recbole_mm.verify 000000000000" in details
    click(browser, ".run .copy")
    browser.execute_async_script("setTimeout(arguments[0], 50)")
    assert text_of(browser, ".run .copy") in ("Copied", "Selected, press Ctrl+C")
    click(browser, '[data-open^="row|alpha"]')
    assert count(browser, ".run") == 0


def test_an_address_can_name_a_run(opened):
    browser = opened("#run=000000000004")
    browser.execute_async_script("requestAnimationFrame(() => setTimeout(arguments[0]))")
    assert "--model=SASRec --dataset=alpha --seed=2" in text_of(browser, ".run[open]")


WIDEST = "return [document.documentElement.scrollWidth, document.documentElement.clientWidth]"


def test_on_a_phone_the_table_scrolls_and_the_page_does_not(opened):
    browser = opened(width=360)
    click(browser, '[data-open^="row|alpha"]')
    click(browser, ".run summary")
    click(browser, "#help summary")
    click(browser, ".failed summary")
    browser.execute_async_script("requestAnimationFrame(() => setTimeout(arguments[0]))")
    widest, width = browser.execute_script(WIDEST)
    assert widest == width == 360
    scrolled = """
    const box = document.querySelector('.scroll'), name = box.querySelector('tbody [data-row] .name');
    box.scrollLeft = 300;
    const left = (element) => element.getBoundingClientRect().left;
    return [box.scrollWidth > box.clientWidth, box.scrollLeft, left(name) - left(box),
            document.querySelector('.detail-box').getBoundingClientRect().width <= box.clientWidth + 1]"""
    assert browser.execute_script(scrolled) == [True, 300, 1, True]


CONTRAST = """
const parse = (text) => text.match(/[\\d.]+/g).map(Number);
const linear = (value) => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4;
const light = (rgb) => rgb.slice(0, 3).map((value) => linear(value / 255))
  .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
const ground = (element) => {
  for (let part = element; part; part = part.parentElement) {
    const colour = parse(getComputedStyle(part).backgroundColor);
    if (colour.length === 3 || colour[3] === 1) return colour;
  }
  return [255, 255, 255];
};
const ratio = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
const hasText = (element) => [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
const contrast = (e, property) => ratio(light(parse(getComputedStyle(e)[property])), light(ground(e)));
const worst = (selector, property, needed) => [...document.querySelectorAll(selector)]
  .filter((e) => property === 'fill' || e.checkVisibility() && hasText(e))
  .map((e) => [contrast(e, property), e.tagName, e.getAttribute('class'), e.textContent.slice(0, 20)])
  .filter(([value]) => value < needed);
return [worst('body *:not(svg *):not(option):not(script)', 'color', 4.5), worst('svg.plot text', 'fill', 4.5),
        worst('svg .mark:not(.hollow)', 'fill', 3), light(parse(getComputedStyle(document.body).backgroundColor))];
"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_and_marks_stand_out_in_light_and_dark(opened, scheme):
    browser = opened(scheme=scheme)
    click(browser, '[data-open^="row|alpha"]')
    click(browser, "#help summary")
    text, labels, marks, ground = browser.execute_script(CONTRAST)
    assert text == labels == marks == []
    assert ground < 0.05 if scheme == "dark" else ground > 0.9


def test_hostile_names_and_errors_are_shown_as_text(opened, tmp_path):
    board = small_board(3)
    row = board["tables"][0]["rows"][0]
    row |= {"name": HOSTILE, "warnings": [HOSTILE]}
    board["tables"][0] |= {"dataset": HOSTILE, "protocol_note": HOSTILE, "sentences": [HOSTILE], "notes": [HOSTILE]}
    board["tables"][0]["failed"][0]["error"] = HOSTILE
    board["problems"] = [HOSTILE]
    run = board["runs"]["000000000000"]
    run["command"] = HOSTILE
    run["settings_given"] = {HOSTILE: HOSTILE, "__proto__": 1}
    write_page(board, tmp_path / "hostile.html")
    browser = opened("#run=000000000000", url=(tmp_path / "hostile.html").as_uri())
    browser.execute_async_script("requestAnimationFrame(() => setTimeout(arguments[0]))")
    click(browser, ".failed summary")
    assert count(browser, "img") == 0 and browser.title == "Leaderboard"
    assert browser.execute_script("return document.querySelector('h2').textContent") == HOSTILE
    for selector in ("tr[data-row]", ".sentences", "#problems", ".run pre", ".run dl", ".failed .error"):
        assert "</script><img src=x" in text_of(browser, selector), selector


def test_an_empty_board_says_how_to_fill_it(opened, tmp_path):
    write_page(board_of([], {}), tmp_path / "empty.html")
    browser = opened(url=(tmp_path / "empty.html").as_uri())
    assert "python run_recbole_mm.py --model=MSM4SR --dataset=demo" in text_of(browser, "#main")


def test_a_table_without_costs_slices_curves_and_knockouts_says_so(opened, tmp_path):
    runs: dict[str, dict] = {}
    row = row_of("SASRec", 0.3, "alpha", runs, random.Random(0), 0) | {"cost": {}, "slices": {}, "budget": {}}
    write_page(board_of([table_of("alpha", "", "", [row])], runs), tmp_path / "bare.html")
    browser = opened(url=(tmp_path / "bare.html").as_uri())
    for panel, text in {
        "cost": "No cost was recorded",
        "knockouts": "--knockouts=auto",
        "slices": "No slices were recorded",
        "curves": "No learning curves",
    }.items():
        assert text in text_of(browser, f"[data-panel={panel}]")


@pytest.mark.slow
def test_ten_thousand_runs_make_a_page_that_stays_usable(opened, tmp_path):
    import time

    source = random.Random(3)
    runs: dict[str, dict] = {}
    rows = [row_of(f"Model{number}", source.random(), "alpha", runs, source, 60) for number in range(3334)]
    board = board_of([table_of("alpha", "leave-one-out", "", rows)], runs)
    start = time.perf_counter()
    write_page(board, tmp_path / "large.html")
    assert time.perf_counter() - start < 15
    assert (tmp_path / "large.html").stat().st_size < 30e6
    start = time.perf_counter()
    browser = opened(url=(tmp_path / "large.html").as_uri())
    assert len(names_in(browser)) == 200 and "Show all 3,334 rows" in text_of(browser, ".board")
    click(browser, '[data-sort="name"]')
    assert names_in(browser)[0] == "Model0"
    click(browser, "[data-open]")
    assert count(browser, ".run") == 3
    assert count(browser, "[data-panel=cost] figure .mark") == 3334
    assert time.perf_counter() - start < 30
