"""Encoding that is stopped, killed, repeated and spread: the same bytes in the end, and nothing done twice."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from encoding_stubs import Corners, Dying, Failing, Letters
from PIL import Image
from tiny_text_models import save_bert, save_clip

from dataset_prep import features
from dataset_prep.__main__ import main
from dataset_prep.encoders import build_encoder
from dataset_prep.encoding.engine import Running, without_names
from dataset_prep.features import make_feature
from recbole_mm.data import files
from recbole_mm.data.files import write_table
from recbole_mm.data.layout import Manifest, check_folder, read_feature
from recbole_mm.errors import DatasetError, SettingError

ROOT = Path(__file__).resolve().parents[3]
HERE = Path(__file__).resolve().parent
N_ITEMS = 9
N_SHARDS = 5  # of two texts


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch):
    monkeypatch.setattr(features, "TEXTS_AT_ONCE", 2)
    monkeypatch.setattr(features, "PICTURES_AT_ONCE", 3)


@pytest.fixture
def new_shop(tmp_path):
    """Makes folders of nine items, each with a text of its own and a picture; the last but one has neither."""

    def make(name: str) -> Path:
        folder = tmp_path / name / "shop"
        (folder / "images").mkdir(parents=True)
        tokens = [str(number) for number in range(N_ITEMS)]
        texts = [f"{'ab' * number} c {number}" for number in range(N_ITEMS)]
        pictures = [f"images/{number}.png" for number in range(N_ITEMS)]
        texts[7] = pictures[7] = ""
        for number, picture in enumerate(pictures):
            if picture:
                Image.new("RGB", (8, 8), (number + 4, 2 * number, 1)).save(folder / picture)
        (folder / pictures[4]).write_bytes(b"no picture")
        users = {"user_id:token": ["u"] * N_ITEMS, "item_id:token": tokens, "timestamp:float": [1.0] * N_ITEMS}
        write_table(folder / "shop.inter", users)
        write_table(folder / "shop.item", {"item_id:token": tokens, "title:token_seq": texts, "image:token": pictures})
        return folder

    return make


@pytest.fixture
def shop(new_shop) -> Path:
    return new_shop("a")


def letters(folder: Path, **arguments):
    encoder = {} if "build" in arguments or "encoder" in arguments else {"encoder": Letters()}
    return make_feature(folder, "text", progress=False, **encoder, **arguments)


def made(folder: Path) -> dict[str, bytes]:
    """Everything in a folder by its path."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Killed(BaseException):
    """Nobody catches it, as nobody catches a SIGKILL."""


def raise_at(monkeypatch, k: int, error: BaseException, function: str = "replace") -> None:
    """Let the k-th call of a function of the system, from ``write_atomically``, fail."""
    calls, real = iter(range(1_000_000)), getattr(os, function)

    class System:
        def __getattr__(self, name):
            return getattr(os, name)

    def called(*arguments):
        if next(calls) == k:
            raise error
        return real(*arguments)

    system = System()
    setattr(system, function, called)
    monkeypatch.setattr(files, "os", system)


# ---------------------------------------------------------------- one run


def test_items_get_the_rows_of_their_contents(shop):
    report = letters(shop)
    feature = read_feature(shop, "text")
    assert feature.tokens == [str(n) for n in range(N_ITEMS) if n != 7]
    texts = [f"{'ab' * n} c {n}".strip() for n in range(N_ITEMS) if n != 7]
    assert feature.rows.tolist() == [[t.count("a"), t.count("b"), t.count("c"), len(t)] for t in texts]
    assert report.missing == {"no text": 1} and report.remarks == ("3 contents truncated",)
    assert not (shop / "features/.work").exists()
    check_folder(shop)


def test_a_text_that_many_items_have_is_encoded_once(shop):
    write_table(shop / "shop.item", {"item_id:token": list("123"), "title:token_seq": ["ab", "c", "ab"]})
    encoded = []
    encoder = Letters()
    encode, encoder.encode = encoder.encode, lambda batch: encoded.extend(batch) or encode(batch)
    letters(shop, encoder=encoder)
    assert sorted(encoded) == ["ab", "c"]
    assert read_feature(shop, "text").rows[:, 3].tolist() == [2, 1, 2]


def test_pictures_go_to_their_items_and_the_unusable_are_counted(shop):
    report = make_feature(shop, "image", encoder=Corners(), progress=False)
    feature = read_feature(shop, "image")
    usable = [n for n in range(N_ITEMS) if n not in (4, 7)]
    assert feature.tokens == [str(n) for n in usable]
    assert feature.rows.tolist() == [[n + 4, 2 * n, 1] for n in usable]
    assert report.missing == {"picture not a picture": 1, "no picture named": 1}
    assert Manifest.load(shop).features["image"].counts is None


def test_an_encoder_may_make_several_rows_of_a_picture_or_none(shop):
    report = make_feature(shop, "image", encoder=Corners(several=True), progress=False)
    feature = read_feature(shop, "image")
    counts = {str(n): (n + 4) % 4 for n in range(N_ITEMS) if n not in (4, 7) and (n + 4) % 4}
    assert dict(zip(feature.tokens, feature.counts, strict=True)) == counts
    assert report.missing["nothing recognised in its picture"] == 2


def index_of(shop: Path, lines: list[str]) -> None:
    columns = "item_id number source status file bytes sha256 width height".split()
    (shop / "pictures").mkdir()
    (shop / "pictures/index.tsv").write_text("\n".join("\t".join(line) for line in [columns, *lines]) + "\n")


def test_pictures_come_from_the_index_up_to_so_many_per_item(shop):
    lines = []
    for item, files_of in {"0": ["0", "1", "2"], "1": ["3"], "2": []}.items():
        for number, file in enumerate(files_of):
            lines.append([item, str(number), "x", "ok", f"../images/{file}.png", "1", "0" * 64, "8", "8"])
    lines.append(["2", "0", "x", "http 404", "", "0", "", "0", "0"])
    index_of(shop, lines)
    report = make_feature(shop, "image", encoder=Corners(), per_item=2, progress=False)
    feature = read_feature(shop, "image")
    assert feature.tokens == ["0", "1"] and feature.counts.tolist() == [2, 1]
    assert feature.rows[:, 0].tolist() == [4, 5, 7]
    assert report.missing == {"no picture named": 6, "picture http 404": 1}
    assert Manifest.load(shop).features["image"].source == "pictures"
    make_feature(shop, "image", encoder=Corners(), progress=False)
    assert read_feature(shop, "image").rows[:, 0].tolist() == [4, 7]
    make_feature(shop, "image", encoder=Corners(), column="image", progress=False)
    assert len(read_feature(shop, "image").tokens) == 7


def test_values_that_are_not_finite_name_the_encoder_and_the_text(shop):
    with pytest.raises(DatasetError, match="the encoder letters made NaN or infinity: 'c 0'"):
        letters(shop, encoder=Letters(factor=float("inf")), running=Running(workers=1))


def test_an_encoder_that_loses_contents_is_refused(shop):
    encoder = Letters()
    encoder.encode = lambda batch: []
    with pytest.raises(ValueError, match="the encoder letters made 0 vectors of 2 contents"):
        letters(shop, encoder=encoder)


@pytest.mark.parametrize("workers", [1, 3])
def test_what_a_part_of_an_encoder_counts_is_reported_whatever_thread_counted_it(new_shop, tmp_path, workers):
    shop = new_shop(f"{workers}-clip")
    clip = save_clip(tmp_path / "clip")
    encoder = build_encoder("clip_text", feature="text", model=str(clip))
    report = letters(shop, encoder=encoder, running=Running(workers=workers))
    assert report.remarks == ("1 contents truncated",)  # 16 letters of the longest, and its beginning and end


# ---------------------------------------------------------------- reuse


def test_what_is_unchanged_is_left_alone_and_force_makes_it_again(shop, tmp_path):
    log = tmp_path / "log"
    letters(shop, encoder=Letters(log=str(log)))
    before, n = made(shop), len(log.read_text())
    report = letters(shop, encoder=Letters(log=str(log)))
    assert report.up_to_date and "8 of 9 items, 8 rows of width 4; up to date" in str(report)
    assert len(log.read_text()) == n and made(shop) == before
    assert not letters(shop, encoder=Letters(log=str(log)), force=True).up_to_date
    assert len(log.read_text()) == 2 * n and made(shop) == before


def test_what_is_up_to_date_tells_what_is_missing_as_the_first_run_did(shop):
    for _ in range(2):
        report = make_feature(shop, "image", encoder=Corners(), progress=False)
        assert report.missing == {"picture not a picture": 1, "no picture named": 1}
        assert "1 without: picture not a picture (such as item '4')" in str(report)
    assert report.up_to_date


def test_F44_the_same_model_under_another_name_and_the_same_pictures_elsewhere_are_the_same(shop, tmp_path):
    def encoder(folder: Path, **options) -> object:
        return build_encoder("bert", feature="text", model=str(folder), device="cpu", **options)

    first = save_bert(tmp_path / "bert")
    copy = shutil.copytree(first, tmp_path / "copy")
    letters(shop, encoder=encoder(first, batch_size=3))
    assert letters(shop, encoder=encoder(copy), running=Running(workers=1)).up_to_date
    (copy / "vocab.txt").write_text("another\n")
    assert not letters(shop, encoder=encoder(copy)).up_to_date
    assert not letters(shop, encoder=encoder(copy, pooling="mean")).up_to_date
    place = shutil.copytree(shop / "images", tmp_path / "elsewhere/images")
    make_feature(shop, "image", encoder=Corners(), images=shop, progress=False)
    assert make_feature(shop, "image", encoder=Corners(), images=place.parent, progress=False).up_to_date
    assert Manifest.load(shop).features["image"].settings["images"] == "shop"


def test_F44_names_count_where_no_hash_tells_as_much():
    assert without_names({"model": "ViT-B-32", "weights_sha256": {"a": "b"}}) == {
        "model": "ViT-B-32",
        "weights_sha256": {"a": "b"},
    }
    hashed = {"model": "a", "revision": "b", "configuration_sha256": "c"}
    assert without_names({"clip": hashed, "n": 1}) == {"clip": {"configuration_sha256": "c"}, "n": 1}
    assert without_names({"model": "a", "configuration_sha256": None})["model"] == "a"
    assert without_names({"vocabulary": "a", "vocabulary_sha256": "b"}) == {"vocabulary_sha256": "b"}


def test_F44_a_feature_of_another_model_preprocessing_or_content_is_not_taken_for_this_one(shop):
    letters(shop)
    assert not letters(shop, encoder=Letters(factor=2)).up_to_date
    assert read_feature(shop, "text").rows[0].tolist() == [0, 0, 2, 6]
    assert not letters(shop, encoder=Letters(factor=2), rows="item").up_to_date
    assert letters(shop, encoder=Letters(factor=2), rows="item").up_to_date
    table = (shop / "shop.item").read_text()
    (shop / "shop.item").write_text(table.replace("c 3", "c x"))
    assert not letters(shop, encoder=Letters(factor=2), rows="item").up_to_date
    make_feature(shop, "image", encoder=Corners(), progress=False)
    assert make_feature(shop, "image", encoder=Corners(), progress=False).up_to_date
    Image.new("RGB", (8, 8), "white").save(shop / "images/0.png")
    assert not make_feature(shop, "image", encoder=Corners(), progress=False).up_to_date


@pytest.mark.parametrize("file", ["text.npy", "text.items.txt", "text.counts.npy"])
def test_a_feature_whose_files_were_changed_or_lost_is_made_again(shop, file):
    letters(shop)
    before, path = made(shop), shop / "features" / file
    path.write_bytes(path.read_bytes()[:-1] + b"\7")
    assert not letters(shop).up_to_date and made(shop) == before
    path.unlink()
    assert not letters(shop).up_to_date and made(shop) == before


# ---------------------------------------------------------------- stopped and continued


@pytest.mark.parametrize("kind", ["text", "image"])
def test_F45_killed_at_any_write_the_next_run_ends_with_the_same_bytes(new_shop, monkeypatch, kind, tmp_path):
    def run(folder):
        encoder = Letters(log=str(tmp_path / "log")) if kind == "text" else Corners()
        return make_feature(folder, kind, encoder=encoder, progress=False)

    whole = new_shop("whole")
    run(whole)
    shards = 4 if kind == "text" else 3
    n_writes = shards + (4 if kind == "text" else 3)  # and the feature's files and the manifest
    for k in range(n_writes + 1):
        folder = new_shop(str(k))
        with monkeypatch.context() as patched:
            raise_at(patched, k, Killed())
            if k < n_writes:
                with pytest.raises(Killed):
                    run(folder)
            else:
                run(folder)
        if k < n_writes:
            assert kind not in Manifest.load(folder).features
            finished = len(list((folder / "features/.work").rglob("*.npz")))
            assert finished == min(k, shards)
            (folder / f"features/{kind}.npy.partial-123").write_text("half")
            (tmp_path / "log").unlink(missing_ok=True)
            run(folder)
            if kind == "text" and finished < shards:
                assert len((tmp_path / "log").read_text().splitlines()) == shards - finished
        assert made(folder) == made(whole)


def test_F45_a_feature_that_is_replaced_is_never_half_old_and_half_new(new_shop, monkeypatch):
    whole = new_shop("whole")
    letters(whole, encoder=Letters(factor=2))
    for k in range(12):
        folder = new_shop(str(k))
        letters(folder)
        with monkeypatch.context() as patched:
            raise_at(patched, k, Killed())
            try:
                letters(folder, encoder=Letters(factor=2))
            except Killed:
                check_folder(folder)
        letters(folder, encoder=Letters(factor=2))
        assert made(folder) == made(whole)


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_F48_a_full_disk_ends_with_code_4_and_the_next_run_with_the_same_bytes(new_shop, monkeypatch, capsys, function):
    arguments = ["--feature", "text", "--width", "3"]
    whole = new_shop("whole")
    assert main(["features", "--dataset", str(whole), *arguments]) == 0
    failed = 0
    for k in range(20):
        folder = new_shop(str(k))
        with monkeypatch.context() as patched:
            raise_at(patched, k, OSError(errno.ENOSPC, "No space left on device"), function)
            code = main(["features", "--dataset", str(folder), *arguments])
        if code:
            failed += 1
            error = capsys.readouterr().err
            assert code == 4 and "needs about 1 MB in" in error and "make room and repeat the command" in error
            assert not list(folder.rglob("*.partial-*")) and check_folder(folder) is not None
            assert main(["features", "--dataset", str(folder), *arguments]) == 0
        assert made(folder) == made(whole)
    assert failed >= 8


def test_F48_too_little_room_is_said_after_the_first_shard(shop, monkeypatch):
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(OSError, match="no space left: needs about 1 MB in .*features"):
        letters(shop)
    monkeypatch.undo()


def test_F53_memory_that_runs_out_names_the_setting_to_change(shop):
    for error, message in (
        (MemoryError, ""),
        (RuntimeError, "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
        (type("OutOfMemoryError", (RuntimeError,), {}), "CUDA out of memory"),
    ):
        with pytest.raises(OSError, match=r"choose a smaller --batch-size \(now 8\) or fewer --workers") as caught:
            letters(shop, encoder=Failing(error=error, message=message), running=Running(batch_size=8))
        assert caught.value.errno == errno.ENOMEM


def test_other_errors_of_an_encoder_are_not_taken_for_a_lack_of_memory(shop):
    with pytest.raises(RuntimeError, match="other"):
        letters(shop, encoder=Failing(error=RuntimeError, message="other"))


def command(folder: Path, log: Path) -> list[str]:
    options = ["--option", f"log={log}", "--option", "seconds=0.3", "--workers", "1"]
    arguments = ["features", "--dataset", str(folder), "--feature", "text", "--encoder", "letters", *options]
    return [sys.executable, str(HERE / "encoding_stubs.py"), *arguments]


def started(folder: Path, log: Path) -> subprocess.Popen:
    """The command in a process of its own, when its second shard is finished."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command(folder, log), env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while len(list((folder / "features").rglob("*.npz"))) < 2:
        assert process.poll() is None and time.monotonic() < deadline, process.stderr.read()
        time.sleep(0.01)
    return process


@pytest.mark.slow
def test_F45_after_a_real_kill_only_unfinished_shards_are_made(new_shop, tmp_path):
    log, whole, folder = tmp_path / "log", new_shop("whole"), new_shop("killed")
    process = started(folder, log)
    assert main(["features", "--dataset", str(folder), "--feature", "other", "--encoder", "tfidf"]) == 3  # F61: locked
    process.send_signal(signal.SIGKILL)
    process.communicate()
    finished = len(list((folder / "features").rglob("*.npz")))
    assert 2 <= finished < 4 and check_folder(folder) == [] and not (folder / "manifest.json").exists()
    log.write_text("")
    letters(folder, encoder=Letters(log=str(log)))
    assert len(log.read_text().splitlines()) == 4 - finished
    letters(whole)
    assert made(folder) == made(whole)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_asked_to_stop_ends_with_code_5_and_keeps_what_is_finished(shop, tmp_path, number):
    process = started(shop, tmp_path / "log")
    process.send_signal(number)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 5 and "Traceback" not in error
    assert "stopped; what is finished is kept, and the same command continues" in error
    assert len(list((shop / "features").rglob("*.npz"))) >= 2


def test_unfinished_shards_are_in_nobodys_way(shop, monkeypatch):
    from dataset_prep.folder_writer import refuse_existing

    with monkeypatch.context() as patched:
        raise_at(patched, 2, Killed())
        with pytest.raises(Killed):
            letters(shop)
    assert list(shop.rglob("*.npz")) and check_folder(shop) == []
    with pytest.raises(DatasetError, match="its manifest does not name") as caught:
        refuse_existing(shop, overwrite=True)
    assert ".work" not in str(caught.value)


# ---------------------------------------------------------------- threads, processes


def test_any_number_of_threads_gives_the_same_bytes(new_shop):
    folders = [new_shop(str(workers)) for workers in (1, 2, 7)]
    for folder, workers in zip(folders, (1, 2, 7), strict=True):
        letters(folder, running=Running(workers=workers))
        make_feature(folder, "image", encoder=Corners(), running=Running(workers=workers), progress=False)
    assert made(folders[0]) == made(folders[1]) == made(folders[2])


def test_a_network_gives_the_same_bits_in_one_thread_and_in_three(new_shop):
    torch = pytest.importorskip("torch")

    class Network(Letters):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.layers = torch.nn.Sequential(torch.nn.Linear(4, 500), torch.nn.Tanh(), torch.nn.Linear(500, 300))

        def encode(self, batch):
            assert torch.get_num_threads() == 1
            with torch.inference_mode():
                return list(self.layers(torch.tensor(np.stack(super().encode(batch)))).numpy())

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        folders = [new_shop(str(workers)) for workers in (1, 3)]
        for folder, workers in zip(folders, (1, 3), strict=True):
            letters(folder, encoder=Network(), running=Running(workers=workers))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert made(folders[0]) == made(folders[1])


@pytest.mark.slow
def test_processes_give_the_same_bytes_as_threads(new_shop):
    here, there = new_shop("threads"), new_shop("processes")
    for folder, running in ((here, Running()), (there, Running(processes=2))):
        letters(folder, build=Letters, running=running)
        build = partial(build_encoder, "histogram", feature="image", size=32)
        make_feature(folder, "image", build=build, running=running, progress=False)
    assert made(here) == made(there)


@pytest.mark.slow
def test_a_process_that_dies_costs_its_shard_only_which_is_tried_again(new_shop, tmp_path):
    here, there = new_shop("threads"), new_shop("processes")
    for folder in (here, there):
        table = (folder / "shop.item").read_text()
        (folder / "shop.item").write_text(table.replace("c 3", "die 3"))
    build = partial(Dying, log=str(tmp_path / "deaths"))
    letters(there, build=build, running=Running(processes=2))
    assert (tmp_path / "deaths").read_text() == "x"
    letters(here)
    assert made(here) == made(there)


@pytest.mark.slow
def test_a_shard_whose_process_dies_three_times_is_named_and_the_others_are_kept(shop, tmp_path):
    table = (shop / "shop.item").read_text()
    (shop / "shop.item").write_text(table.replace("c 3", "die 3"))
    build = partial(Dying, log=str(tmp_path / "deaths"), times=99)
    message = r"shard 1 \(2 texts, from 'abab c 2' to 'ababab die 3'\): its process died 3 times, last by signal 9"
    with pytest.raises(ChildProcessError, match=message):
        letters(shop, build=build, running=Running(processes=1))
    assert (tmp_path / "deaths").read_text() == "xxx"
    assert len(list(shop.rglob("*.npz"))) >= 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "raised", "message"),
    [
        (SettingError, SettingError, "wrong"),
        (MemoryError, OSError, r"choose a smaller --batch-size \(now its default\)"),
        (KeyError, RuntimeError, "Traceback(.|\n)*wrong"),
    ],
)
def test_an_error_in_a_process_arrives_here(shop, error, raised, message):
    with pytest.raises(raised, match=message):
        letters(shop, build=partial(Failing, error=error, message="wrong"), running=Running(processes=1))


@pytest.mark.slow
def test_a_process_that_makes_another_encoder_is_refused(shop, tmp_path):
    encoder = Letters(factor=2)
    with pytest.raises(SettingError, match="a worker has another encoder than this process: .*1.0.* expected .*2"):
        letters(shop, encoder=encoder, build=Letters, running=Running(processes=1))


def test_an_encoder_that_learns_runs_here_and_says_so(shop):
    build = partial(build_encoder, "tfidf", feature="text", width=3)
    report = make_feature(shop, "text", build=build, running=Running(processes=2), progress=False)
    assert "the encoder tfidf learns from the whole catalogue, so it ran in this process alone" in report.remarks


def test_an_encoder_that_no_process_can_make_is_refused(shop):
    with pytest.raises(ValueError, match="another process cannot make this encoder; give build"):
        letters(shop, running=Running(processes=2))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"workers": 0}, "workers is 0, expected at least 1"),
        ({"processes": -1}, "processes is -1, expected at least 0"),
        ({"processes": 1, "ray": "local"}, "--processes and --ray are two ways to run"),
    ],
)
def test_wrong_ways_to_run_are_refused(arguments, message):
    with pytest.raises(SettingError, match=message):
        Running(**arguments)


# ---------------------------------------------------------------- what is not installed


def test_F64_without_its_library_an_encoder_says_how_to_install_it_and_others_work(shop, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    assert main(["features", "--dataset", str(shop), "--feature", "text", "--encoder", "sentence"]) == 2
    assert 'pip install "recbole_mm[encoders]"' in capsys.readouterr().err
    assert main(["features", "--dataset", str(shop), "--feature", "text"]) == 0


def test_F64_without_ray_only_ray_is_refused(shop, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["features", "--dataset", str(shop), "--feature", "image", "--ray"]) == 2
    assert 'pip install "recbole_mm[ray]"' in capsys.readouterr().err
    assert main(["features", "--dataset", str(shop), "--feature", "image"]) == 0
