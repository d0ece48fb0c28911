"""Checkpoints of the papers' code become ours: names, shapes, refusals, and equal outputs."""

from __future__ import annotations

import pickle
import re
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor, nn

from benchmarks.literal_mmsbr import LiteralMMSBR
from benchmarks.literal_msm4sr import LiteralMSM4SR
from benchmarks.mmsbr_models import MadeUpDataset, build_fast, settings_of
from recbole_mm import checkpoint
from recbole_mm.errors import CheckpointError, DatasetError, SettingError
from recbole_mm.model.mmsbrreleased import MMSBRReleased
from recbole_mm.released import import_checkpoint, main, read_state, read_tokens
from recbole_mm.released_weights import Order, families, import_released, joined

WORDS = {"text": "desc", "image": "img"}
SMALL = {"hidden_size": 8, "inner_size": 16, "n_experts": 3, "attention_size": 4, "train_stage": "finetune"}


# ---------------------------------------------------------------- a release's state, in made-up names


def exported(model: nn.Module, style: str) -> dict[str, Tensor]:
    """A model's weights as a released checkpoint: stock names of SASRec, made-up ones for the rest.

    Styles: "named" says what each part of an expert is, "numbered" leaves that to the order in a Sequential.
    """
    state = {name.removeprefix("encoder."): value for name, value in model.encoder.state_dict().items()}
    if model.item_embedding is not None:
        state["item_embedding.weight"] = model.item_embedding.weight
    for modality, tower in model.towers.items():
        word, (n_experts, width) = WORDS[modality], tower.adaptor.norm_weight.shape
        linear, norm = ("lin", "norm") if style == "named" else ("0", "2")
        for k in reversed(range(n_experts)):
            expert, rows = f"{word}_moe.experts.{k}", slice(k * width, (k + 1) * width)
            state[f"{expert}.{norm}.weight"] = tower.adaptor.norm_weight[k]
            state[f"{expert}.{norm}.bias"] = tower.adaptor.norm_bias[k]
            state[f"{expert}.{linear}.weight"] = tower.adaptor.project.weight[rows]
            state[f"{expert}.{linear}.bias"] = tower.adaptor.project.bias[rows]
        state[f"{word}_moe.w_gate"] = tower.adaptor.gate.weight.T
        state[f"{word}_moe.w_noise"] = torch.randn_like(tower.adaptor.gate.weight.T)
        state[f"{word}_att.projection.0.weight"] = tower.pooling.inner.weight
        state[f"{word}_att.projection.0.bias"] = torch.randn(len(tower.pooling.inner.weight))
        state[f"{word}_att.projection.1.weight"] = tower.pooling.outer.weight
        state[f"{word}_att.projection.1.bias"] = torch.randn(1)
        state[f"{word}_embedding.weight"] = torch.randn(model.n_items, tower.features.width)
        if model.projections:
            state[f"{word}_fc.weight"] = model.projections[modality].weight
            state[f"{word}_fc.bias"] = model.projections[modality].bias
    return {name: value.detach().clone() for name, value in state.items()}


@pytest.fixture
def pair(built, planted):
    """Two models with unlike weights; with one row per text, the literal model needs no zero rows."""

    def build(**settings):
        _, dataset, train, *_, source = built("MSM4SRReleased", planted, max_rows=1, **{**SMALL, **settings})
        target = built("MSM4SRReleased", planted, max_rows=1, **{**SMALL, **settings})[-1]
        for model, seed in ((source, 1), (target, 2)):
            torch.manual_seed(seed)
            for parameter in model.parameters():
                nn.init.normal_(parameter, std=0.5)
        return source, target, next(iter(train)), dataset.field2id_token["item_id"]

    return build


def alphabetical(tokens) -> Order:
    return Order(sorted(tokens[1:]), tokens)


def reordered(state: dict[str, Tensor], order: Order) -> dict[str, Tensor]:
    """With the item embeddings in the order of their tokens."""
    row = {token: i for i, token in enumerate(order.ours)}
    rows = torch.tensor([0, *(row[token] for token in order.theirs)])
    return {**state, "item_embedding.weight": state["item_embedding.weight"][rows]}


@pytest.mark.parametrize("style", ["named", "numbered"])
@pytest.mark.parametrize("settings", [{}, {"proj": True}, {"train_stage": "pretrain"}], ids=["plain", "proj", "stage"])
def test_equal_weights_give_equal_outputs(pair, style, settings):
    source, target, interaction, tokens = pair(**settings)
    state, order = exported(source, style), alphabetical(tokens)
    if not source.pretraining:
        state = reordered(state, order)
    report = import_released(target, state, orders={"item": order})
    assert report.fresh == {} and report.taken.keys() == dict(target.named_parameters()).keys()
    assert {name.partition("_")[2] for name in report.dropped} == {
        "moe.w_noise", "embedding.weight", "att.projection.0.bias", "att.projection.1.bias"
    }  # fmt: skip
    torch.testing.assert_close(dict(target.state_dict()), dict(source.state_dict()), rtol=0, atol=0)
    if not settings:
        with torch.no_grad():
            literal = LiteralMSM4SR(source).eval().full_sort_predict(interaction)
            torch.testing.assert_close(target.eval().full_sort_predict(interaction), literal, rtol=1e-4, atol=1e-5)


def test_the_report_says_what_became_of_each_tensor(pair):
    source, target, _, tokens = pair()
    before = target.item_embedding.weight.clone()
    state = exported(source, "named")
    text = str(import_released(target, state))
    assert (
        "towers.text.adaptor.project.weight <- desc_moe.experts.0.lin.weight … desc_moe.experts.2.lin.weight (3 parts)"
        in text
    )
    assert "encoder.LayerNorm.weight <- LayerNorm.weight" in text
    assert "desc_moe.w_noise: noise of the gates" in text
    assert (
        "starting anew:\n  item_embedding.weight: the rows of item_embedding.weight have an order of their own" in text
    )
    assert torch.equal(target.item_embedding.weight, before)


def test_items_that_the_release_does_not_know_start_anew(pair):
    source, target, _, tokens = pair()
    before, theirs = target.item_embedding.weight.clone(), [*tokens[5:2:-1], "another"]
    table = torch.randn(len(theirs), 8)
    state = {**exported(source, "named"), "item_embedding.weight": table}  # without a row for padding
    report = import_released(target, state, orders={"item": Order(theirs, tokens)})
    assert "in 27 rows that are not in theirs, such as" in report.fresh["item_embedding.weight"]
    torch.testing.assert_close(target.item_embedding.weight[[5, 4, 3]], table[:3])
    torch.testing.assert_close(target.item_embedding.weight[:3], before[:3])
    state["item_embedding.weight"] = torch.randn(9, 8)
    with pytest.raises(CheckpointError, match=r"made of item_embedding.weight \[9, 8\]: 4 tokens are given"):
        import_released(target, state, orders={"item": Order(theirs, tokens)})


def test_a_user_names_what_is_ambiguous(pair):
    source, target, *_ = pair()
    state = exported(source, "named")
    renamed = {
        re.sub("desc_moe|desc_att", lambda m: {"desc_moe": "a", "desc_att": "b"}[m[0]], n): v for n, v in state.items()
    }
    with pytest.raises(CheckpointError) as error:
        import_released(target, renamed)
    for problem in (
        "towers.text.adaptor.project.weight [24, 12] is missing",
        "a.experts.0.lin.weight [8, 12] is left over",
        "b.projection.1.bias [1] is left over",
    ):
        assert f"\n  - {problem}" in str(error.value)
    names = {
        "towers.text.pooling.inner.weight": "b.projection.0.weight",
        "towers.text.pooling.outer.weight": "b.projection.1.weight",
        "towers.text.adaptor.gate.weight": "a.w_gate.T",
        "towers.text.adaptor.project.weight": [f"a.experts.{k}.lin.weight" for k in range(3)],
        "towers.text.adaptor.project.bias": "a.experts.*.lin.bias",
        "towers.text.adaptor.norm_weight": "a.experts.*.norm.weight",
        "towers.text.adaptor.norm_bias": "a.experts.*.norm.bias",
        "drop": ["b.projection.*.bias"],
    }
    import_released(target, renamed, names)
    ours = {name: value for name, value in source.state_dict().items() if name != "item_embedding.weight"}
    torch.testing.assert_close({name: target.state_dict()[name] for name in ours}, ours, rtol=0, atol=0)


def test_everything_wrong_is_listed_at_once_and_the_model_stays_as_it_is(pair):
    source, target, *_ = pair()
    before = {name: value.clone() for name, value in target.state_dict().items()}
    state = exported(source, "named")
    state["position_embedding.weight"] = torch.randn(50, 8)
    state["LayerNorm.bias"][0] = torch.nan
    state["step"] = 7
    state["desc_second.projection.0.weight"] = state["desc_att.projection.0.weight"]
    state["other"] = torch.zeros(2, 3)
    del state["img_moe.experts.1.lin.weight"]
    with pytest.raises(CheckpointError) as error:
        import_released(target, state, {"some.thing": "LayerNorm.weight", "encoder.LayerNorm.weight": "nowhere"})
    for problem in (
        "step is a int, not a tensor",
        "LayerNorm.bias [8] has values that are not finite",
        "some.thing, given by names, is no parameter of the model",
        "encoder.LayerNorm.weight: nowhere, given by names, is not in the checkpoint",
        "encoder.position_embedding.weight [10, 8] cannot be made of position_embedding.weight [50, 8]",
        "towers.text.pooling.inner.weight [4, 12] is ambiguous: desc_att.projection.0.weight or desc_second",
        "towers.image.adaptor.project.weight [24, 12] is missing; these match, but do not fit: img_moe.experts.",
        "encoder.LayerNorm.bias [8] is missing",
        "other [2, 3] is left over",
    ):
        assert f"\n  - {problem}" in str(error.value), problem
    torch.testing.assert_close(dict(target.state_dict()), before, rtol=0, atol=0)


@pytest.mark.parametrize("wrong", [None, 3, [1], {"a": "b"}])
def test_names_are_names(pair, wrong):
    source, target, *_ = pair()
    with pytest.raises(SettingError, match="names: encoder.LayerNorm.bias must have a name or a list of names, found"):
        import_released(target, exported(source, "named"), {"encoder.LayerNorm.bias": wrong})


def test_a_name_given_twice_is_refused(pair):
    source, target, *_ = pair()
    names = {
        "encoder.LayerNorm.bias": ["LayerNorm.bias", "LayerNorm.bias"],
        "encoder.LayerNorm.weight": "LayerNorm.bias",
    }
    with pytest.raises(
        CheckpointError, match="LayerNorm.bias, given by names, is not in the checkpoint, or used twice"
    ):
        import_released(target, exported(source, "named"), names)


@pytest.mark.parametrize(("change", "problem"), [
    (lambda state: state.update({"trm_encoder.layer.2.LayerNorm.weight": torch.ones(8)}), r"layer\.2\..* is left over"),
    (lambda state: state.update({"desc_moe.experts.3.lin.weight": torch.ones(8, 12)}), "missing; these match"),
    (lambda state: state.pop("desc_moe.w_gate"), r"towers\.text\.adaptor\.gate\.weight \[3, 12\] is missing"),
    (lambda state: state.pop("item_embedding.weight"), r"item_embedding\.weight \[31, 8\] is missing"),
])  # fmt: skip
def test_one_tensor_more_or_less_is_refused(pair, change, problem):
    source, target, *_ = pair()
    state = exported(source, "named")
    change(state)
    with pytest.raises(CheckpointError, match=problem):
        import_released(target, state)


# ---------------------------------------------------------------- names and shapes


def test_families_differ_in_one_number():
    shapes = {f"e.{k}.{part}.bias": (4,) for k in range(3) for part in (0, 2)} | {"e.10.0.bias": (4,), "b": (4,)}
    shapes["e.4.0.bias"] = (5,)
    found = families(shapes)
    assert ["e.0.0.bias", "e.1.0.bias", "e.2.0.bias", "e.10.0.bias"] in found
    assert ["e.0.2.bias", "e.1.2.bias", "e.2.2.bias"] in found and ["b"] in found and ["e.4.0.bias"] in found
    assert ["e.1.0.bias", "e.1.2.bias"] in found


def test_parts_are_joined_to_the_shape_that_is_wanted():
    a, b = torch.randn(2, 3), torch.randn(2, 3)
    torch.testing.assert_close(joined([a, b], (4, 3)), torch.cat([a, b]))
    torch.testing.assert_close(joined([a.T, b.T], (4, 3)), torch.cat([a, b]))
    torch.testing.assert_close(joined([a[0], b[0]], (2, 3)), torch.stack([a[0], b[0]]))
    torch.testing.assert_close(joined([a[0]], (1, 3)), a[:1])
    square, number = torch.randn(3, 3), torch.tensor(2.0)
    torch.testing.assert_close(joined([square], (3, 3)), square)
    torch.testing.assert_close(joined([square], (3, 3), turned=True), square.T)
    torch.testing.assert_close(joined([number], ()), number)
    assert joined([a, b], (4, 4)) is None and joined([a, a[0]], (3, 3)) is None


def test_parts_fill_stacks_block_by_block_and_are_not_turned_unasked():
    maps, gains = torch.randn(6, 2, 3), torch.randn(3, 4)
    torch.testing.assert_close(
        joined(list(maps), (3, 4, 3)), torch.stack([torch.cat([*maps[i : i + 2]]) for i in (0, 2, 4)])
    )
    torch.testing.assert_close(joined(list(gains), (3, 1, 4)), gains.unsqueeze(1))
    assert joined(list(maps), (6, 3, 2)) is None
    torch.testing.assert_close(joined(list(maps), (6, 3, 2), turned=True), maps.transpose(1, 2))
    assert joined(list(gains), (2, 6)) is None  # the right number of values, but parts would straddle rows


# ---------------------------------------------------------------- files


def test_tensors_are_read_from_a_plain_file_and_from_a_plain_checkpoint(tmp_path):
    state = {"a.weight": torch.eye(2)}
    torch.save(state, tmp_path / "plain.pth")
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "run.pth")
    for name in ("plain.pth", "run.pth"):
        torch.testing.assert_close(read_state(tmp_path / name), state)


class Settings:
    """Stands for RecBole's Config, which the released checkpoints hold."""


def test_a_pickled_config_is_refused_with_the_remedy(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    path = tmp_path / "their.pth"
    torch.save({"config": Settings(), "state_dict": {"a": torch.eye(2)}}, path)
    with pytest.raises(CheckpointError) as error:
        read_state(path)
    assert "their.pth holds more than tensors and plain data" in str(error.value)
    remedy = str(error.value)[str(error.value).index("import torch") :].replace("\n    ", "\n")
    monkeypatch.chdir(tmp_path)
    exec(remedy, {})  # what it tells the owner to do does it
    torch.testing.assert_close(read_state("plain.pth"), {"a": torch.eye(2)})


def test_what_holds_no_tensors_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="no checkpoint .*missing.pth"):
        read_state(tmp_path / "missing.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(CheckpointError, match="holds no tensors by name, but a list"):
        read_state(tmp_path / "list.pth")
    (tmp_path / "raw.pth").write_bytes(pickle.dumps({"a": Settings()}, protocol=2))
    with pytest.raises(CheckpointError, match="raw.pth holds more than tensors"):
        read_state(tmp_path / "raw.pth")


def test_tokens_are_read_one_a_line(tmp_path):
    file = tmp_path / "tokens.txt"
    file.write_text("[PAD]\nB2\nA1\n")
    assert read_tokens(file) == ["B2", "A1"]
    file.write_text("B2\nA1\nB2\n")
    with pytest.raises(DatasetError, match="has a token twice, such as 'B2'"):
        read_tokens(file)
    with pytest.raises(DatasetError, match="cannot read the tokens in nowhere.txt"):
        read_tokens("nowhere.txt")


# ---------------------------------------------------------------- the command


RUN = {
    **SMALL,
    "max_rows": 1,
    "MAX_ITEM_LIST_LENGTH": 10,
    "topk": [5, 10],
    "valid_metric": "Recall@10",
    "use_gpu": False,
}


@pytest.fixture
def release(pair, tmp_path) -> Path:
    """``plain.pth``, its item tokens, its names; returns the folder."""
    source, _, _, tokens = pair()
    order = alphabetical(tokens)
    torch.save(reordered(exported(source, "named"), order), tmp_path / "plain.pth")
    (tmp_path / "tokens.txt").write_text("\n".join(["[PAD]", *order.theirs]) + "\n")
    (tmp_path / "names.yaml").write_text(yaml.safe_dump({"encoder.LayerNorm.bias": "LayerNorm.bias"}))
    torch.save(dict(source.state_dict()), tmp_path / "source.pth")
    return tmp_path


def command(*arguments: str, **settings) -> list[str]:
    given = {key: value for key, value in {**RUN, **settings}.items() if value is not None}
    return [*arguments, *(f"--{key}={value}" for key, value in given.items())]


def test_the_command_makes_a_checkpoint_that_training_starts_from(release, planted, capsys):
    from recbole_mm.quick_start import run

    files = ("--checkpoint=plain.pth", "--out=saved/imported.pth", "--names=names.yaml")
    arguments = command("--model=MSM4SRReleased", "--dataset=planted", *files, train_stage=None)
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert (
        "item_embedding.weight: pre-training has no item embedding" in printed and "saved saved/imported.pth" in printed
    )
    state = checkpoint.load("saved/imported.pth")
    assert state["config"]["train_stage"] == "pretrain" and "item_embedding.weight" not in state["state_dict"]
    settings = {**RUN, "pretrained_path": "saved/imported.pth", "epochs": 1, "show_progress": False}
    record = run("MSM4SRReleased", "planted", settings=settings, runs_file=None)
    assert [stage["stage"] for stage in record.stages] == ["finetune"]


def test_with_item_tokens_the_checkpoint_is_a_fine_tuned_model(release, planted, built):
    from recbole_mm.trainer import Trainer

    report = import_checkpoint(
        "MSM4SRReleased", "planted", "plain.pth", "saved/imported.pth", items="tokens.txt",
        settings={key: value for key, value in RUN.items() if key != "train_stage"},
    )  # fmt: skip
    assert report.fresh == {}
    state = checkpoint.load("saved/imported.pth")
    torch.testing.assert_close(dict(state["state_dict"]), torch.load("source.pth"), rtol=0, atol=0)
    assert state["config"]["feature_encoders"].keys() == {"text", "image"}
    config, _, _, _, test, model = built("MSM4SRReleased", planted, **SMALL, max_rows=1)
    trainer = Trainer(config, model)
    actual = trainer.evaluate(test, model_file="saved/imported.pth")
    model.load_state_dict(torch.load("source.pth"))
    assert actual == trainer.evaluate(test, load_best_model=False)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--model=MSM4SR"], 2, "SettingError: MSM4SR reads no released checkpoint; "),
        (["--model=MSM4SRReleased", "--proj=true"], 6, "projections.text.weight [8, 8] is missing"),
        (["--model=MSM4SRReleased", "--n_layers=1"], 6, "trm_encoder.layer.1.multi_head_attention.query.weight"),
        (["--model=MSM4SRReleased", "--items=nowhere.txt"], 3, "cannot read the tokens"),
        (["--model=MSM4SRReleased", "surplus"], 2, "cannot read the argument 'surplus'"),
        (["--model=MSM4SRReleased", "--proj"], 2, "--proj has no value"),
        (["--model=MSM4SRReleased", "--prj", "true"], 2, "unknown setting 'prj' (from --prj); did you mean 'proj'"),
    ],
)
def test_refusals_have_a_message_and_a_code(release, planted, capsys, arguments, code, message):
    files = ["--dataset=planted", "--checkpoint=plain.pth", "--out=saved/imported.pth"]
    assert main(command(*arguments, *files, train_stage=None)) == code
    assert message in capsys.readouterr().err and not Path("saved/imported.pth").exists()


def test_an_unknown_model_is_refused():
    with pytest.raises(SettingError, match="no model 'MSM5SR'"):
        import_checkpoint("MSM5SR", "planted", "plain.pth", "out.pth")


# ---------------------------------------------------------------- MMSBR: tables by item, price level and category


N_ITEMS, N_LEVELS, N_CATEGORIES = 24, 11, 3  # 11 levels: "10" comes after "9", not after "1"
PRICES = [1 + 7 * item % N_LEVELS for item in range(N_ITEMS)]
CATEGORIES = [1 + item * item % N_CATEGORIES + item % 2 for item in range(N_ITEMS)]
MMSBR_SMALL = {
    "hidden_size": 8,
    "inner_size": 32,
    "n_heads": 2,
    "n_rounds": 2,
    "n_negatives": 5,
    "MAX_ITEM_LIST_LENGTH": 20,
}
MMSBR_NAMES = {  # what words and shapes do not tell
    "tables.pseudo_text": "text_of_image_table.weight",
    "tables.pseudo_image": "image_of_text_table.weight",
    "sequences.text.first.weight": "text_mlp.*.0.weight",
    "sequences.text.second_weight": "text_mlp.*.3.weight",
    "sequences.image.first.weight": "image_mlp.*.0.weight",
    "sequences.image.second_weight": "image_mlp.*.3.weight",
    **{
        f"transformer.{ours}_weight": [f"layers.{number}.{part}.weight" for number in (1, 0, 3, 2) for part in parts]
        for ours, parts in {
            "qkv": ["att.query", "att.key", "att.value"], "out": ["att.dense"], "inner": ["ffn.0"], "outer": ["ffn.3"],
            "norm": ["norm"],
        }.items()
    },
    "interest.item.weight": "session_item.weight",
    "price_attention.mean_qkv.weight": [f"price_attention.mean_{role}.weight" for role in ("query", "key", "value")],
    "price_attention.spread_qkv.weight": [f"price_attention.cov_{role}.weight" for role in ("query", "key", "value")],
}  # fmt: skip


def literal_mmsbr() -> LiteralMMSBR:
    torch.manual_seed(3)
    sizes = {"width": 8, "n_heads": 2, "n_layers": 4, "n_negatives": 5}
    literal = LiteralMMSBR(
        N_ITEMS, N_LEVELS, N_CATEGORIES, torch.tensor(PRICES), torch.tensor(CATEGORIES), **sizes
    ).eval()
    for parameter in literal.parameters():
        nn.init.normal_(parameter, std=0.5)
    return literal


def released_mmsbr(literal: LiteralMMSBR, *, padding_rows: bool = False) -> dict[str, Tensor]:
    """Its parameters in made-up names, beside some that the release has and does not use."""
    renamed = (
        (r"(text|image)_from_(text|image)\.", r"\1_of_\2_table."),
        (r"^(text|image|category|price_mean)\.", r"\1_table."),
        (r"^price_variance\.", "price_cov_table."),
        (r"pivots\.", "pivot."),
        (r"sequences_(text|image)\.(\d)\.first", r"\1_mlp.\2.0"),
        (r"sequences_(text|image)\.(\d)\.second", r"\1_mlp.\2.3"),
        (r"rounds\.(\d)\.text", lambda m: f"layers.{2 * int(m[1]) + 1}"),
        (r"rounds\.(\d)\.image", lambda m: f"layers.{2 * int(m[1])}"),
        (r"(layers\.\d)\.(query|key|value)", r"\1.att.\2"),
        (r"(layers\.\d)\.output", r"\1.att.dense"),
        (r"(layers\.\d)\.widen", r"\1.ffn.0"),
        (r"(layers\.\d)\.narrow", r"\1.ffn.3"),
        (r"fusion\.first", "fuse.0"),
        (r"fusion\.second", "fuse.1"),
        (r"interest_weight", "beta"),
        (r"interest_", "session_"),
        (r"attention\.mean\.(\w+)", r"attention.mean_\1"),
        (r"attention\.variance\.(\w+)", r"attention.cov_\1"),
    )
    state = {}
    for name, value in literal.state_dict().items():
        for old, new in renamed:
            name = re.sub(old, new, name)
        if padding_rows and ("table" in name or "pivot" in name):
            value = torch.cat([torch.full((1, 8), 9.0), value])
        state[name] = value.clone()
    state |= {"item_table.weight": torch.randn(N_ITEMS, 8), "pos_forward.weight": torch.randn(2000, 8)}
    return state


def same_order(n: int) -> Order:
    numbers = [str(number) for number in range(1, n + 1)]
    return Order(numbers, ["[PAD]", *numbers])


MMSBR_ORDERS = {
    "item": same_order(N_ITEMS), "price_level": same_order(N_LEVELS), "category": same_order(N_CATEGORIES)
}  # fmt: skip


def empty_mmsbr() -> MMSBRReleased:
    torch.manual_seed(4)
    settings = settings_of("MMSBR", "MMSBRReleased", **MMSBR_SMALL)
    return MMSBRReleased(settings, MadeUpDataset(torch.tensor(PRICES), torch.tensor(CATEGORIES)))


@pytest.mark.parametrize("padding_rows", [False, True])
def test_mmsbr_with_equal_weights_gives_equal_outputs(padding_rows):
    literal, target = literal_mmsbr(), empty_mmsbr()
    report = import_released(
        target, released_mmsbr(literal, padding_rows=padding_rows), MMSBR_NAMES, orders=MMSBR_ORDERS
    )
    assert report.fresh == {} and report.taken.keys() == dict(target.named_parameters()).keys()
    assert report.dropped == {
        "item_table.weight": "the ID table, which no score uses",
        "pos_forward.weight": "positions, which are never added",
    }
    sessions = torch.tensor([[3, 1, 24], [7, 0, 0]]), torch.tensor([3, 1])
    with torch.no_grad():
        actual = target.eval().scores(target.item_tower(), *sessions)[:, 1:]
        torch.testing.assert_close(actual, literal.scores(*sessions), rtol=1e-4, atol=1e-4)
        (contrast,) = target.auxiliary_losses(target.item_tower(), None)
        torch.testing.assert_close(contrast, literal.contrastive_weight * literal.contrastive())


def test_all_that_is_ambiguous_in_mmsbr_is_listed():
    with pytest.raises(CheckpointError) as error:
        import_released(empty_mmsbr(), released_mmsbr(literal_mmsbr()), orders=MMSBR_ORDERS)
    tables = "text_of_image_table.weight"
    for problem in (
        f"tables.pseudo_text [25, 8] is ambiguous: image_of_text_table.weight or {tables}",
        f"tables.pseudo_image [25, 8] is ambiguous: image_of_text_table.weight or {tables}",
        "sequences.text.first.weight [32, 8] is ambiguous: text_mlp.0.0.weight … text_mlp.3.0.weight (4 parts) or "
        "text_mlp.0.3.weight … text_mlp.3.3.weight (4 parts)",
        "sequences.image.second_weight [4, 8, 8] is ambiguous: image_mlp.0.0.weight",
        "transformer.qkv_weight [4, 24, 8] is ambiguous: made of these, in which order? layers.0.att.key.weight, ",
        "transformer.out_weight [4, 8, 8] is ambiguous: made of these, in which order? layers.0.att.dense.weight, ",
        "transformer.inner_weight [4, 32, 8] is ambiguous: made of these, in which order? layers.0.ffn.0.weight, ",
        "transformer.norm_weight [4, 1, 8] is ",
        "interest.item.weight [8, 8] is ambiguous: session_item.weight or session_mean.weight",
        "price_attention.mean_qkv.weight [24, 8] is ambiguous: made of these, in which order? price_attention.mean_key",
    ):
        assert f"\n  - {problem}" in str(error.value), problem
    for certain in ("tables.text", "tables.image", "pivots", "category", "price_mean", "interest.weight", "fusion"):
        assert f"\n  - {certain}" not in str(error.value), certain


def test_layers_that_differ_in_a_number_alone_are_not_put_in_its_order():
    """Text is in the odd ones, but comes first."""
    names = {ours: theirs for ours, theirs in MMSBR_NAMES.items() if ours != "transformer.out_weight"}
    with pytest.raises(CheckpointError, match=r"transformer.out_weight \[4, 8, 8\] is ambiguous: made of these, in wh"):
        import_released(empty_mmsbr(), released_mmsbr(literal_mmsbr()), names, orders=MMSBR_ORDERS)


def test_names_with_a_number_are_joined_number_by_number():
    literal, target = literal_mmsbr(), empty_mmsbr()
    state = {
        re.sub(r"layers\.(\d)", lambda m: f"round.{int(m[1]) // 2}.{'it'[int(m[1]) % 2]}", name): value
        for name, value in released_mmsbr(literal).items()
    }
    roles = [f"round.*.{modality}.att.{role}.weight" for modality in "ti" for role in ("query", "key", "value")]
    parts = {"out": "att.dense", "inner": "ffn.0", "outer": "ffn.3", "norm": "norm"}
    names = {**MMSBR_NAMES, "transformer.qkv_weight": roles}
    for ours, part in parts.items():
        names[f"transformer.{ours}_weight"] = [f"round.*.t.{part}.weight", f"round.*.i.{part}.weight"]
    import_released(target, state, names, orders=MMSBR_ORDERS)
    expected = {name: value for name, value in build_fast(literal).named_parameters() if "transformer" in name}
    actual = {name: dict(target.named_parameters())[name] for name in expected}
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)

    names["transformer.norm_weight"] = ["round.*.t.norm.weight", "round.0.i.norm.weight"]
    with pytest.raises(CheckpointError, match=r"stand for equally many, found round.\*.t.norm.weight for 2, round.0.i"):
        import_released(empty_mmsbr(), state, names, orders=MMSBR_ORDERS)


def test_matrices_that_are_swapped_are_refused():
    swapped = {
        **MMSBR_NAMES,
        "transformer.inner_weight": MMSBR_NAMES["transformer.outer_weight"],
        "transformer.outer_weight": MMSBR_NAMES["transformer.inner_weight"],
    }
    with pytest.raises(CheckpointError, match=r"inner_weight \[4, 32, 8\] cannot be made of layers.1.ffn.3.weight"):
        import_released(empty_mmsbr(), released_mmsbr(literal_mmsbr()), swapped, orders=MMSBR_ORDERS)


def test_a_table_of_other_rows_than_the_tokens_is_refused():
    orders = {**MMSBR_ORDERS, "price_level": same_order(N_LEVELS - 2)}
    names = {**MMSBR_NAMES, "price_mean.weight": "price_mean_table.weight"}
    with pytest.raises(CheckpointError, match=r"price_mean_table.weight \[11, 8\]: 9 tokens are given, one row each"):
        import_released(empty_mmsbr(), released_mmsbr(literal_mmsbr()), names, orders=orders)


@pytest.fixture
def sessions_folder(tmp_path) -> Path:
    """``dataset/phones``, made of released files; its items have names."""
    import numpy as np

    from dataset_prep.released import import_released as prepare

    random, released = np.random.default_rng(0), tmp_path / "release"
    released.mkdir()
    for file, n_sessions in (("train.txt", 40), ("test.txt", 10)):
        items = [random.permutation(N_ITEMS)[:4] + 1 for _ in range(n_sessions)]
        prefixes = [session[:-1].tolist() for session in items]
        tables = [[[table[i - 1] for i in prefix] for prefix in prefixes] for table in (PRICES, CATEGORIES)]
        lists = (prefixes, *tables, PRICES, CATEGORIES, [int(session[-1]) for session in items])
        (released / file).write_bytes(pickle.dumps(lists))
    np.save(released / "asinlist.npy", np.array([f"B{97 * i % 89:02d}" for i in range(N_ITEMS)]))
    prepare(released, tmp_path / "dataset" / "phones")
    return tmp_path / "dataset" / "phones"


def test_the_command_reads_tables_in_the_order_of_the_released_files(sessions_folder, tmp_path, built, capsys):
    literal = literal_mmsbr()
    torch.save(released_mmsbr(literal, padding_rows=True), tmp_path / "plain.pth")
    (tmp_path / "names.yaml").write_text(yaml.safe_dump(MMSBR_NAMES))
    settings = {**MMSBR_SMALL, "use_gpu": False, "topk": [5, 10], "valid_metric": "Recall@10"}
    arguments = ["--model=MMSBRReleased", "--dataset=phones", "--checkpoint=plain.pth", "--out=saved/imported.pth"]
    assert main([*arguments, "--names=names.yaml", *(f"--{key}={value}" for key, value in settings.items())]) == 0
    printed = capsys.readouterr().out
    assert "pivots <- pivot.0.weight … pivot.3.weight (4 parts)" in printed and "starting anew" not in printed
    state = checkpoint.load("saved/imported.pth")
    assert state["config"]["field_hashes"].keys() == {"price_level", "category"}

    _, dataset, *_, model = built("MMSBRReleased", sessions_folder, **MMSBR_SMALL)
    model.load_state_dict(state["state_dict"])
    token_of = [f"B{97 * i % 89:02d}" for i in range(N_ITEMS)]
    ids = torch.tensor([0, *(dataset.token2id("item_id", token) for token in token_of)])  # theirs -> ours
    sessions, lengths = torch.tensor([[3, 1, 24], [7, 0, 0]]), torch.tensor([3, 1])
    assert ids[1:].tolist() != sorted(ids[1:].tolist())
    with torch.no_grad():
        actual = model.eval().scores(model.item_tower(), ids[sessions], lengths)[:, ids[1:]]
        torch.testing.assert_close(actual, literal.scores(sessions, lengths), rtol=1e-4, atol=1e-4)


def test_other_folders_know_no_order(sessions_folder, tmp_path, built, planted):
    torch.save(released_mmsbr(literal_mmsbr()), tmp_path / "plain.pth")
    manifest = sessions_folder / "manifest.json"
    manifest.write_text(
        manifest.read_text().replace('"items_that_no_session_has": 0', '"items_that_no_session_has": 1')
    )
    settings = {**MMSBR_SMALL, "use_gpu": False, "topk": [5, 10], "valid_metric": "Recall@10"}
    names = {**MMSBR_NAMES, "tables.text": "text_table.weight", "tables.image": "image_table.weight"}
    names |= {"price_mean.weight": "price_mean_table.weight", "price_spread.weight": "price_cov_table.weight"}
    report = import_checkpoint(
        "MMSBRReleased", "phones", "plain.pth", "saved/imported.pth", names=names, settings=settings
    )
    assert report.fresh.keys() == set(MMSBRReleased.released_rows)
    assert "have an order of their own, which is not given" in report.fresh["pivots"]
    assert report.dropped["pivot.2.weight"] == "no order of its rows is given, one row per item"
