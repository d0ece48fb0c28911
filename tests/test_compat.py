"""RecBole on today's packages: each test runs a fresh interpreter, because the cures happen at import."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

TINY = """
def tiny(**more):
    return dict(
        data_path="data", epochs=2, train_batch_size=256, eval_batch_size=256, hidden_size=16, inner_size=16,
        embedding_size=16, n_layers=1, n_heads=1, MAX_ITEM_LIST_LENGTH=8, train_neg_sample_args=None, state="ERROR",
        show_progress=False, load_col=dict(inter=["user_id", "item_id", "timestamp"]), metrics=["Hit", "MRR"], topk=[5],
        valid_metric="MRR@5", eval_args=dict(split=dict(LS="valid_and_test"), order="TO", group_by="user", mode="full"),
    ) | more
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working directory with two data sets: users and items with features, and sessions that are split already."""
    (tmp_path / "data/tiny").mkdir(parents=True)
    (tmp_path / "data/split").mkdir()
    rows = [f"u{u}\ti{(u * 5 + n * 7 + n * n) % 12}\t{1000 + 10 * n + 0.1 * u}" for u in range(30) for n in range(6)]
    inter = "user_id:token\titem_id:token\ttimestamp:float\n" + "\n".join(rows) + "\n"
    (tmp_path / "data/tiny/tiny.inter").write_text(inter)
    items = [
        f"i{i}\t{['', 'red', 'blue', 'NAVY'][i % 4]}\t{' '.join(f'c{j}' for j in range(1 + i % 3))}"
        f"\t{'' if i == 4 else i / 7}\t{' '.join(str(i / 3 + j) for j in range(2))}"
        for i in range(12)
    ]
    header = "item_id:token\tcolour:token\tcategories:token_seq\tprice:float\tvector:float_seq\n"
    (tmp_path / "data/tiny/tiny.item").write_text(header + "\n".join(items) + "\n")
    for name, n in (("train", 40), ("valid", 10), ("test", 10)):
        lines = [
            f"s{name}{k}\t{' '.join(f'i{(k + j * 3) % 12}' for j in range(1 + k % 4))}\ti{(k * 5 + n) % 12}"
            for k in range(n)
        ]
        text = "session_id:token\titem_id_list:token_seq\titem_id:token\n" + "\n".join(lines) + "\n"
        (tmp_path / f"data/split/split.{name}.inter").write_text(text)
    return tmp_path


def run(folder: Path, script: str, *, python_path: Path | None = None) -> dict:
    """Run a script in ``folder`` with a fresh interpreter; it prints its findings as JSON in the last line."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TORCH_FORCE")}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(python_path or ""), str(ROOT)]))
    (folder / "script.py").write_text(TINY + textwrap.dedent(script))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "script.py"], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_importing_the_package_imports_neither_torch_nor_recbole_nor_ray(folder):
    found = run(
        folder,
        """
        import json, sys
        import recbole_mm
        from recbole_mm import compat
        n_finders = len(sys.meta_path)
        compat.apply()
        heavy = [name for name in ("torch", "recbole", "ray", "scipy", "hyperopt") if name in sys.modules]
        print(json.dumps({"heavy": heavy, "finders_added": len(sys.meta_path) - n_finders}))
        """,
    )
    assert found == {"heavy": [], "finders_added": 0}


@pytest.mark.slow
def test_a_stock_script_trains_saves_reloads_and_resumes(folder):
    found = run(
        folder,
        """
        import json, glob
        import recbole_mm
        from recbole.quick_start import load_data_and_model, run_recbole
        import torch
        from recbole.trainer import Trainer
        from recbole.utils.case_study import full_sort_scores

        metrics = ["Hit", "MRR", "ItemCoverage", "AveragePopularity", "GiniIndex", "TailPercentage", "ShannonEntropy"]
        result = run_recbole(model="SASRec", dataset="tiny", config_dict=tiny(metrics=metrics))
        [path] = glob.glob("saved/SASRec*.pth")
        checkpoint = torch.load(path)
        config, model, dataset, train, valid, test = load_data_and_model(path)
        _, again, *_ = load_data_and_model(path)
        users = dataset.token2id("user_id", ["u0", "u7"])
        scores = [full_sort_scores(users, m, test, device="cpu").tolist() for m in (model, again)]

        trainer = Trainer(config, model)
        trainer.resume_checkpoint(path)
        trainer.eval_collector.data_collect(train)  # as fit does; the counts of items come from there
        print(json.dumps({
            "metrics": {k: float(v) for k, v in result["test_result"].items()},
            "evaluated": {k: float(v) for k, v in trainer.evaluate(test, model_file=path).items()},
            "anomaly": torch.is_anomaly_enabled(),
            "config": type(checkpoint["config"]).__name__,
            "rebuilt": [type(config).__name__, config["data_path"], str(config["MODEL_TYPE"]), config["topk"]],
            "start_epoch": [trainer.start_epoch, checkpoint["epoch"] + 1],
            "same_scores": scores[0] == scores[1],
            "left_over": glob.glob("saved/*partial*"),
        }))
        """,
    )
    assert set(found["metrics"]) > {"hit@5", "mrr@5", "itemcoverage@5", "giniindex@5", "tailpercentage@5"}
    assert 0 < found["metrics"]["itemcoverage@5"] <= 1
    assert found["evaluated"] == found["metrics"]
    assert found["anomaly"] is False
    assert found["config"] == "dict"
    assert found["rebuilt"] == ["Config", "data/tiny", "ModelType.SEQUENTIAL", [5]]
    assert found["start_epoch"][0] == found["start_epoch"][1]
    assert found["same_scores"]
    assert found["left_over"] == []


@pytest.mark.slow
def test_recbole_may_be_imported_first(folder):
    """And item features, item-based models, graph models and pre-training work, on whichever pandas and SciPy."""
    found = run(
        folder,
        """
        import json, glob
        import numpy as np
        for name in ("bool8", "float_", "complex_", "unicode_"):  # without these NumPy 2 cannot even import it
            if name not in vars(np):
                setattr(np, name, {"bool8": np.bool_, "float_": float, "complex_": complex, "unicode_": str}[name])
        from recbole.quick_start import load_data_and_model, objective_function, run_recbole
        import recbole.model.sequential_recommender
        import torch
        before = torch.is_anomaly_enabled()
        import recbole_mm

        found = {"anomaly": [before, torch.is_anomaly_enabled()]}
        columns = dict(
            inter=["user_id", "item_id", "timestamp"], item=["item_id", "colour", "categories", "price", "vector"]
        )
        sasrecf = tiny(load_col=columns, selected_features=["colour", "categories"], pooling_mode="mean",
                       normalize_field=["vector"])
        result = run_recbole(model="SASRecF", dataset="tiny", config_dict=sasrecf)
        config, model, dataset, *_, test = load_data_and_model(glob.glob("saved/SASRecF*.pth")[0])
        from recbole.trainer import Trainer
        again = Trainer(config, model).evaluate(test, load_best_model=False)
        found["features"] = [float(result["test_result"]["mrr@5"]), float(again["mrr@5"])]
        price = dataset.item_feat["price"]
        found["price"] = [bool(torch.isfinite(price).all()), float(price[0]), float(price[1:].mean())]
        found["colours"] = len(dataset.field2id_token["colour"])

        general = dict(eval_args=dict(split=dict(RS=[8, 1, 1]), order="RO", group_by="user", mode="full"))
        for name in ("LightGCN", "EASE", "ItemKNN"):
            settings = tiny(**general, train_neg_sample_args=dict(distribution="uniform", sample_num=1))
            result = run_recbole(model=name, dataset="tiny", config_dict=settings)
            config, model, *_, test = load_data_and_model(glob.glob(f"saved/{name}*.pth")[0])
            again = Trainer(config, model).evaluate(test, load_best_model=False)
            found[name] = [float(result["test_result"]["mrr@5"]), float(again["mrr@5"])]

        s3rec = tiny(load_col=dict(inter=columns["inter"], item=["item_id", "categories"]), item_attribute="categories",
                     train_stage="pretrain", pretrain_epochs=1, save_step=1, mask_ratio=0.2)
        run_recbole(model="S3Rec", dataset="tiny", config_dict=s3rec)
        pretrained = glob.glob("saved/S3Rec-*.pth")[0]
        result = run_recbole(model="S3Rec", dataset="tiny", saved=False,
                             config_dict={**s3rec, "train_stage": "finetune", "pre_model_path": pretrained})
        found["S3Rec"] = sorted(result["test_result"])

        split = tiny(benchmark_filename=["train", "valid", "test"], alias_of_item_id=["item_id_list"],
                     USER_ID_FIELD="session_id", load_col=dict(inter=["session_id", "item_id_list", "item_id"]))
        found["split"] = sorted(run_recbole(model="GRU4Rec", dataset="split", config_dict=split)["test_result"])

        from hyperopt import hp
        from recbole.trainer import HyperTuning

        def objective(config_dict=None, config_file_list=None):
            return objective_function(
                {**tiny(epochs=1, model="SASRec", dataset="tiny"), **config_dict}, config_file_list, saved=False
            )

        tuning = HyperTuning(objective, space={"learning_rate": hp.choice("learning_rate", [0.1, 0.01])},
                             algo="exhaustive", max_evals=3)
        tuning.run()
        found["tried"] = len(tuning.params2result)
        print(json.dumps(found))
        """,
    )
    assert found["anomaly"] == [True, False]
    for name in ("features", "LightGCN", "EASE", "ItemKNN"):
        assert found[name][0] == pytest.approx(found[name][1], abs=1e-9), name
    prices = [i / 7 for i in range(12) if i != 4]
    assert found["price"] == [
        True,
        pytest.approx(sum(prices) / 11, rel=1e-6),
        pytest.approx(sum(prices) / 11, rel=1e-6),
    ]
    assert found["colours"] == 4
    assert found["S3Rec"] == found["split"] == ["hit@5", "mrr@5"]
    assert found["tried"] == 2


FAKE_RAY = {
    "broken": "raise AttributeError('np.bool8')",
    "new": "def report(metrics, *, checkpoint=None):\n    print('reported', sorted(metrics))",
}


@pytest.mark.parametrize("kind", FAKE_RAY)
def test_ray_may_be_broken_or_new(folder, kind):
    (folder / "fake/ray").mkdir(parents=True)
    (folder / "fake/ray/__init__.py").write_text("import ray.half")
    (folder / "fake/ray/half.py").write_text("")
    (folder / "fake/ray/tune.py").write_text(FAKE_RAY[kind])
    found = run(
        folder,
        """
        import json, sys
        import recbole_mm
        from recbole.quick_start import quick_start
        quick_start.tune.report(mrr=1)
        print(json.dumps(sorted(name for name in sys.modules if name.split(".")[0] == "ray")))
        """,
        python_path=folder / "fake",
    )
    assert found == {"broken": [], "new": ["ray", "ray.half", "ray.tune"]}[kind]


def test_safe_reading_gives_the_ids_and_tensors_of_stock_recbole(folder):
    found = run(
        folder,
        """
        import json
        import numpy as np, pandas as pd, torch
        import recbole_mm
        from recbole.config import Config
        from recbole.data.dataset import SequentialDataset
        from recbole_mm.data.reading import SafeReading

        class Ours(SafeReading, SequentialDataset):
            pass

        def compare(settings, dataset):
            ours, stock = (
                kind(Config("SASRec", dataset, config_dict=settings)) for kind in (Ours, SequentialDataset)
            )
            found = {"ids": ours.field2id_token.keys() == stock.field2id_token.keys()}
            for field, tokens in stock.field2id_token.items():
                found[field] = tokens.tolist() == ours.field2id_token[field].tolist()
                found[field + " ids"] = ours.field2token_id[field] == stock.field2token_id[field]
            assert ours.inter_feat.dtypes.get("timestamp", np.dtype("float64")) == np.float64
            ours_parts, stock_parts = ours.build(), stock.build()
            found["lengths"] = {k: int(v) if isinstance(v, (int, np.integer)) else list(v)
                                for k, v in ours.field2seqlen.items()} == {
                                k: int(v) if isinstance(v, (int, np.integer)) else list(v)
                                for k, v in stock.field2seqlen.items()}
            for part, (a, b) in enumerate(zip(ours_parts, stock_parts)):
                tables = [("inter", a.inter_feat, b.inter_feat)]
                if a.item_feat is not None:
                    tables.append(("item", a.item_feat, b.item_feat))
                for name, mine, theirs in tables:
                    found[f"{name} columns {part}"] = list(mine.interaction) == list(theirs.interaction)
                    for field in theirs.interaction:
                        x, y = mine[field], theirs[field]
                        found[f"{name} {field} {part}"] = x.dtype == y.dtype and torch.equal(x, y)
            return [k for k, same in found.items() if not same], len(found)

        columns = dict(inter="*", item="*")
        print(json.dumps([
            compare(tiny(load_col=columns, seq_len=dict(categories=2)), "tiny"),
            compare(tiny(load_col=None, unload_col=dict(item=["price"])), "tiny"),
            compare(tiny(benchmark_filename=["train", "valid", "test"], alias_of_item_id=["item_id_list"],
                         USER_ID_FIELD="session_id", load_col=dict(inter=["session_id", "item_id_list", "item_id"])),
                    "split"),
        ]))
        """,
    )
    assert [different for different, _ in found] == [[], [], []]
    assert all(n_compared > 15 for _, n_compared in found)


def test_safe_reading_keeps_what_stock_recbole_loses(folder):
    """Ids NA and null, quotes, empty sequences, and decimals to the last bit; a broken file is named with its line."""
    (folder / "data/odd").mkdir()
    rows = [f"u{k % 2}\t{token}\t{0.1 + k / 7!r}" for k, token in enumerate(["NA", "null", '"', "007", "7"] * 2)]
    (folder / "data/odd/odd.inter").write_text(
        "user_id:token\titem_id:token\ttimestamp:float\n" + "\n".join(rows) + "\n"
    )
    item = folder / "data/odd/odd.item"
    item.write_text('item_id:token\ttags:token_seq\tv:float_seq\nNA\t\t\nnull\t\t\n"\t\t\n007\t\t\n7\t\t\n')
    found = run(
        folder,
        """
        import json
        from pathlib import Path
        import recbole_mm
        from recbole.config import Config
        from recbole.data.dataset import SequentialDataset
        from recbole_mm.data.reading import SafeReading
        from recbole_mm.errors import RecBoleMMError

        class Ours(SafeReading, SequentialDataset):
            pass

        def read(**more):
            return Ours(Config("SASRec", "odd", config_dict=tiny(load_col=None, **more)))

        def error(**more):
            try:
                read(**more)
            except RecBoleMMError as error:
                return str(error)

        dataset = read()
        found = {"ids": dataset.field2id_token["item_id"].tolist()}
        found["exact"] = dataset.inter_feat["timestamp"].tolist() == [0.1 + k / 7 for k in range(10)]
        dataset.build()
        found["tags"] = list(dataset.item_feat["tags"].shape)
        found["separator"] = error(field_separator=",")
        item = Path("data/odd/odd.item")
        good = item.read_text()
        item.write_text(good.replace("007\\t\\t", "007\\t\\t1 x 2"))
        found["float"] = error()
        item.write_text(good.replace("007\\t\\t", "007\\t[PAD]\\t"))
        found["padding"] = error()
        print(json.dumps(found))
        """,
    )
    assert found["ids"] == ["[PAD]", "NA", "null", '"', "007", "7"]
    assert found["exact"]
    assert found["tags"] == [6, 0]
    assert "field_separator is ','" in found["separator"]
    assert "odd.item, line 5: v holds 'x'" in found["float"]
    assert "tags holds the token [PAD]" in found["padding"]
