"""The released six lists: imported as they are, every mistake named, and nothing in a pickle run."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from random import Random

import numpy as np
import pytest

from dataset_prep.__main__ import main
from dataset_prep.released import FEATURE_FILES, draw_sessions, import_released, read_array
from dataset_prep.safe_pickle import load_plain_pickle
from dataset_prep.six_lists import Problems
from recbole_mm.data.files import read_table, sha256_of
from recbole_mm.data.layout import Manifest, check_folder, read_feature
from recbole_mm.errors import DatasetError, SettingError, UnsafeFileError


def six_lists(sessions: list[list[int]], price_levels: list[int], categories: list[int]) -> tuple[list, ...]:
    """A released file's content out of whole sessions."""
    prefixes = [session[:-1] for session in sessions]
    look_ups = [[[table[item - 1] for item in prefix] for prefix in prefixes] for table in (price_levels, categories)]
    return prefixes, *look_ups, price_levels, categories, [session[-1] for session in sessions]


def write_released(
    folder: Path, *, n_items: int = 12, n_train: int = 40, n_test: int = 6, protocol: int = 4, features: bool = True
) -> tuple[list[list[int]], list[list[int]]]:
    """Made-up released files; returns the sessions of training and test. Every item is in some training session."""
    random = Random(f"released {n_items} {n_train}")
    price_levels, categories = ([random.randint(1, top) for _ in range(n_items)] for top in (9, 4))

    def session(first: int) -> list[int]:
        return [first + 1, *(random.randint(1, n_items) for _ in range(random.choice([1, 1, 1, 2, 3])))]

    train, test = ([session(i % n_items) for i in range(n)] for n in (n_train, n_test))
    folder.mkdir(parents=True, exist_ok=True)
    for file, sessions in (("train.txt", train), ("test.txt", test)):
        content = pickle.dumps(six_lists(sessions, price_levels, categories), protocol=protocol)
        (folder / file).write_bytes(content)
    for number, file in enumerate(FEATURE_FILES.values() if features else ()):
        rows = np.random.default_rng(number).normal(size=(n_items, 64))
        np.save(folder / file, rows)
    return train, test


@pytest.fixture
def released(tmp_path) -> Path:
    write_released(tmp_path / "released")
    return tmp_path / "released"


def change(released: Path, file: str, edit: Callable[[list], None]) -> None:
    """Replace a released file by one in which ``edit`` has changed the six lists in place."""
    content = list(pickle.loads((released / file).read_bytes()))
    edit(content)
    (released / file).write_bytes(pickle.dumps(tuple(content)))


def rows_of(folder: Path, part: str) -> list[tuple[str, list[int]]]:
    """Session id and whole session of each row of a part."""
    frame = read_table(folder / f"{folder.name}.{part}.inter", needed=["session_id", "item_id_list", "item_id"])
    return [
        (session, [int(token) for token in f"{prefix} {target}".split(" ")])
        for session, prefix, target in zip(frame["session_id"], frame["item_id_list"], frame["item_id"], strict=True)
    ]


# ---------------------------------------------------------------- what is imported


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_session_is_there_once_and_the_test_is_as_released(tmp_path, protocol):
    train, test = write_released(tmp_path / "released", protocol=protocol, features=False)
    folder = tmp_path / "out" / "Phones"
    report = import_released(tmp_path / "released", folder)
    assert rows_of(folder, "test") == [(f"test{i}", session) for i, session in enumerate(test)]
    rest, valid = rows_of(folder, "train"), rows_of(folder, "valid")
    assert sorted(rest + valid) == sorted((f"train{i}", session) for i, session in enumerate(train))
    assert [int(name.removeprefix("train")) for name, _ in rest] == sorted(int(name[5:]) for name, _ in rest)
    assert len(valid) == 4 and report.n_sessions == report.n_rows == {"train": 36, "valid": 4, "test": 6}
    assert check_folder(folder) == [] and os.listdir(tmp_path / "out") == ["Phones"]


def test_the_manifest_tells_where_the_data_come_from_and_how_they_were_split(released, tmp_path):
    import_released(released, tmp_path / "Phones", seed=5, valid_share=0.25)
    manifest = Manifest.load(tmp_path / "Phones")
    assert manifest.settings["made_by"] == "python -m dataset_prep released"
    assert "whole training sessions, a seeded random draw" in manifest.settings["split"]
    assert (manifest.settings["seed"], manifest.settings["valid_share"]) == (5, 0.25)
    assert manifest.settings["n_sessions"] == {"train": 30, "valid": 10, "test": 6}
    files = ["train.txt", "test.txt", *FEATURE_FILES.values()]
    assert manifest.raw_files == {file: sha256_of(released / file) for file in files}


def test_items_have_the_price_level_and_category_of_the_tables(released, tmp_path):
    import_released(released, tmp_path / "Phones")
    items = read_table(tmp_path / "Phones" / "Phones.item")
    assert items.attrs["types"] == {"item_id": "token", "price_level": "token", "category": "token"}
    _, _, _, price_levels, categories, _ = pickle.loads((released / "train.txt").read_bytes())
    assert items["item_id"].tolist() == [str(number) for number in range(1, 13)]
    assert items["price_level"].astype(int).tolist() == price_levels
    assert items["category"].astype(int).tolist() == categories


def test_row_r_of_a_feature_file_belongs_to_item_r_plus_1(released, tmp_path):
    report = import_released(released, tmp_path / "Phones")
    assert report.features == dict.fromkeys(("image", "text", "text_from_image", "image_from_text"), (12, 64))
    for name, file in (
        ("image", "imgMatrixpca.npy"),
        ("text", "textMatrixpca.npy"),
        ("text_from_image", "imgTextMatrixpca.npy"),
        ("image_from_text", "textImgMatrixpca.npy"),
    ):
        feature = read_feature(tmp_path / "Phones", name)
        assert feature.tokens == [str(number) for number in range(1, 13)]
        assert np.array_equal(feature.rows, np.load(released / file).astype(np.float32))
        info = Manifest.load(tmp_path / "Phones").features[name]
        assert (info.encoder, info.source, info.settings["file"]) == ("released", file, file)
    assert "image and image_from_text come from two PCAs" in str(report)


def test_an_all_zero_row_is_an_item_without_content(released, tmp_path):
    rows = np.load(released / "textMatrixpca.npy")
    rows[[0, 4]] = 0
    np.save(released / "textMatrixpca.npy", rows)
    np.save(released / "imgMatrixpca.npy", np.ones((12, 64)))
    report = import_released(released, tmp_path / "Phones")
    feature = read_feature(tmp_path / "Phones", "text")
    assert "1" not in feature.tokens and "5" not in feature.tokens and len(feature.tokens) == 10
    assert np.array_equal(feature.rows[0], rows[1].astype(np.float32))
    assert "feature 'text': 2 rows are all zero" in str(report)
    assert "feature 'image': all rows are equal, it carries no information" in str(report)


def test_a_folder_without_features_is_imported_too(tmp_path):
    write_released(tmp_path / "released", features=False)
    report = import_released(tmp_path / "released", tmp_path / "Phones")
    assert report.features == {} and "no imgMatrixpca.npy, textMatrixpca.npy, imgTextMatrixpca.npy" in str(report)


def test_items_get_their_names_if_these_are_plain_text(released, tmp_path):
    names = [f"B00{number}" for number in range(12)]
    np.save(released / "asinlist.npy", np.array(names))
    import_released(released, tmp_path / "Phones")
    assert read_table(tmp_path / "Phones" / "Phones.item")["item_id"].tolist() == names
    assert read_feature(tmp_path / "Phones", "image").tokens == names
    first = pickle.loads((released / "test.txt").read_bytes())[0][0]
    prefix = read_table(tmp_path / "Phones" / "Phones.test.inter")["item_id_list"].iloc[0]
    assert prefix.split(" ") == [names[number - 1] for number in first]
    assert "asinlist.npy" in Manifest.load(tmp_path / "Phones").raw_files


def test_prefixes_of_training_sessions_only(released, tmp_path):
    import_released(released, tmp_path / "plain")
    report = import_released(released, tmp_path / "more", prefixes="train")
    expected = []
    for name, session in rows_of(tmp_path / "plain", "train"):
        expected += [(name, session[:end]) for end in range(2, len(session) + 1)]
    assert rows_of(tmp_path / "more", "train") == expected and len(expected) > 36
    for part in ("valid", "test"):
        assert rows_of(tmp_path / "more", part) == rows_of(tmp_path / "plain", part)
    assert f", {len(expected)} training rows" in str(report)


def test_long_sessions_keep_their_newest_items(released, tmp_path):
    long = [1 + i % 12 for i in range(25)]
    tables = pickle.loads((released / "test.txt").read_bytes())[3:5]
    (released / "test.txt").write_bytes(pickle.dumps(six_lists([long, [1, 2], [5, 5]], *tables)))
    report = import_released(released, tmp_path / "Phones")
    assert [session for _, session in rows_of(tmp_path / "Phones", "test")] == [long[-20:], [1, 2], [5, 5]]
    assert report.counts["sessions_cut_to_their_newest_items"] == 1
    assert "1 sessions cut to their newest items" in str(report)
    import_released(released, tmp_path / "Phones", longest=3, overwrite=True)
    assert rows_of(tmp_path / "Phones", "test")[0] == ("test0", long[-3:])


def test_repeats_and_targets_unseen_in_training_are_kept_and_counted(tmp_path):
    tables = [[1, 2, 3, 4], [1, 1, 2, 2]]
    (tmp_path / "released").mkdir()
    for file, sessions in (("train.txt", [[1, 2], [2, 1], [1, 1]]), ("test.txt", [[1, 3], [2, 2, 2]])):
        (tmp_path / "released" / file).write_bytes(pickle.dumps(six_lists(sessions, *tables)))
    report = import_released(tmp_path / "released", tmp_path / "Phones")
    assert report.counts == {
        "sessions_cut_to_their_newest_items": 0,
        "last_items_that_are_in_their_session_before": 2,
        "last_items_of_validation_that_no_training_session_has": 0,
        "last_items_of_test_that_no_training_session_has": 1,
        "items_that_no_session_has": 1,
    }
    assert report.counts == Manifest.load(tmp_path / "Phones").settings["counts"]
    assert [session for _, session in rows_of(tmp_path / "Phones", "test")] == [[1, 3], [2, 2, 2]]


# ---------------------------------------------------------------- the draw


def test_the_draw_is_a_share_of_whole_sessions_from_everywhere():
    drawn = draw_sessions(1000, share=0.1, seed=2020)
    assert len(drawn) == 100 and drawn == draw_sessions(1000, share=0.1, seed=2020)
    assert drawn != draw_sessions(1000, share=0.1, seed=2021) and drawn <= set(range(1000))
    assert 25 < sum(i < 500 for i in drawn) < 75  # the tail would be none
    assert len(draw_sessions(2, share=0.01, seed=0)) == len(draw_sessions(2, share=0.99, seed=0)) == 1


def test_the_same_files_and_seed_give_the_same_bytes(released, tmp_path):
    contents = []
    for place, seed in (("one", 1), ("two", 1), ("three", 2)):
        import_released(released, tmp_path / place / "Phones", seed=seed)
        contents.append({p.name: p.read_bytes() for p in sorted((tmp_path / place).rglob("*")) if p.is_file()})
    assert contents[0] == contents[1] and contents[0].keys() == contents[2].keys()
    assert contents[0]["Phones.valid.inter"] != contents[2]["Phones.valid.inter"]
    assert contents[0]["Phones.test.inter"] == contents[2]["Phones.test.inter"]


# ---------------------------------------------------------------- code in pickles


class Bomb:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_the_bomb_is_one(tmp_path):
    pickle.loads(pickle.dumps(Bomb(tmp_path / "marker")))
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize("file", ["train.txt", "test.txt"])
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_code_in_a_pickle_is_refused_and_not_run(released, tmp_path, capsys, file, protocol):
    marker = tmp_path / "marker"
    content = pickle.loads((released / file).read_bytes())
    (released / file).write_bytes(pickle.dumps((*content[:5], [Bomb(marker), *content[5][1:]]), protocol=protocol))
    assert main(["released", "--folder", str(released), "--name", "Phones", "--out", str(tmp_path / "out")]) == 6
    captured = capsys.readouterr()
    assert re.search(rf"UnsafeFileError: .*{file} is a pickle that asks to import (posix|nt)\.system", captured.err)
    assert "nothing was run" in captured.err and "Traceback" not in captured.err and captured.out == ""
    assert not marker.exists() and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "content",
    [
        b"cos\nsystem\n(S'touch MARKER'\ntR.",
        b"(S'touch MARKER'\nios\nsystem\n.",
        b"(cos\nsystem\nS'touch MARKER'\no.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93(\x8c\x0ctouch MARKER\x85R.",
        b'c__builtin__\neval\n(S\'open("MARKER", "w")\'\ntR.',
        b"ccopyreg\n_reconstructor\n(cbuiltins\nobject\ncbuiltins\nobject\nNtR.",
        b"cbuiltins\nlist\n.",
        b"Pname\n.",
        b"S'name'\nQ.",
    ],
)
def test_whatever_asks_for_a_class_or_function_is_refused(content, tmp_path):
    with pytest.raises(UnsafeFileError, match="asks to import"):
        load_plain_pickle(content, name="train.txt")
    assert not (tmp_path / "MARKER").exists()  # the working directory


def test_an_extension_code_is_refused_too(monkeypatch):
    import copyreg

    monkeypatch.setitem(copyreg._inverted_registry, 77, ("os", "system"))
    with pytest.raises(UnsafeFileError, match=r"asks to import os\.system"):
        load_plain_pickle(b"\x80\x02\x82\x4d.", name="train.txt")


def test_the_numbers_of_numpy_are_refused_with_a_remedy():
    content = pickle.dumps([np.int64(3)])
    with pytest.raises(UnsafeFileError, match=r"asks to import numpy\.[\w.]+(.|\n)*write it again with int\(number\)"):
        load_plain_pickle(content, name="train.txt")


def test_plain_content_is_read():
    content = ([[1, 2], [300]], [70_000, -1, 2**70], (), "text", 1.5, None, True)
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        assert load_plain_pickle(pickle.dumps(content, protocol=protocol), name="x") == content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no whole pickle"),
        (b"hello", "no whole pickle"),
        (b"PK\x03\x04" + bytes(40), "no pickle but a zip archive"),
        (b"PK\x03\x04\n" + bytes(40), "no pickle but a zip archive"),
        (pickle.dumps([1, 2]) + b"more", "4 bytes after the end"),
        (b"\x80\x04\x8d\xff\xff\xff\xff\xff\xff\xff\x7fabc.", "no whole pickle"),
    ],
)
def test_what_is_no_pickle_is_said_to_be_none(content, message):
    with pytest.raises(ValueError, match=message):
        load_plain_pickle(content, name="train.txt")


def test_a_pickle_cut_short_anywhere_is_noticed():
    content = pickle.dumps(six_lists([[1, 2], [2, 1, 300]], [1, 2] + [1] * 298, [1] * 300))
    for length in range(len(content)):
        with pytest.raises(ValueError, match="no whole pickle"):
            load_plain_pickle(content[:length], name="train.txt")


@pytest.mark.parametrize("file", ["imgMatrixpca.npy", "asinlist.npy"])
def test_an_array_of_objects_is_refused_and_not_read(released, tmp_path, capsys, file):
    marker = tmp_path / "marker"
    np.save(released / file, np.array([Bomb(marker)] * 12, dtype=object), allow_pickle=True)
    assert main(["released", "--folder", str(released), "--name", "Phones"]) == 6
    assert f"{file} holds Python objects, a pickle, which can run any code" in capsys.readouterr().err
    (released / file).write_bytes(pickle.dumps(Bomb(marker)))
    with pytest.raises(UnsafeFileError, match="move it away and import without it"):
        import_released(released, tmp_path / "Phones")
    assert not marker.exists() and not Path("dataset").exists()


# ---------------------------------------------------------------- mistakes


def set_at(content: list, value: object, *path: int) -> None:
    for step in path[:-1]:
        content = content[step]
    content[path[-1]] = value


@pytest.mark.parametrize(
    ("edit", "messages"),
    [
        (lambda c: c.pop(), [r"train.txt: found 5 members, expected a tuple of 6 lists"]),
        (lambda c: set_at(c, "abc", 5), [r"field 5 \(last items\): found str 'abc', expected a list of whole numbers"]),
        (lambda c: set_at(c, 7, 0, 3), [r"field 0 \(item prefixes\)\[3\]: found 7, expected a list of whole numbers"]),
        (lambda c: set_at(c, 1.0, 1, 3, 0), [r"prefixes\)\[3\]\[0\]: found float 1.0, expected a whole number"]),
        (lambda c: set_at(c, True, 5, 2), [r"field 5 \(last items\)\[2\]: found bool True, expected a whole number"]),
        (lambda c: set_at(c, [1], 4, 0), [r"field 4 \(categories\)\[0\]: found list \[1\], expected a whole number"]),
        (lambda c: c[5].pop(), [r"field 5 \(last items\): found 39 sessions, expected 40, as in field 0"]),
        (lambda c: c[1].pop(), [r"field 1 \(price-level prefixes\): found 39 sessions, expected 40"]),
        (lambda c: c[4].pop(), [r"train.txt, field 4 \(categories\): found 11 items, expected 12, as in field 3"]),
        (lambda c: c[0][4].clear(), [r"prefixes\)\[4\]: found an empty list, expected at least one item"]),
        (lambda c: c[2][4].append(1), [r"field 2 \(category prefixes\)\[4\]: found \d numbers, expected \d, as many"]),
        (lambda c: set_at(c, 0, 0, 6, 0), [r"prefixes\)\[6\]\[0\]: found 0, expected an item, 1 to 12"]),
        (lambda c: set_at(c, 13, 5, 6), [r"field 5 \(last items\)\[6\]: found 13, expected an item, 1 to 12"]),
        (lambda c: set_at(c, -(10**5000), 5, 6), [r"found a number of 16610 bits, expected an item, 1 to 12"]),
        (
            lambda c: set_at(c, 99, 1, 6, 0),
            [r"field 1 \(price-level prefixes\)\[6\]\[0\], item 7: found 99, expected \d, its number in field 3"],
        ),
        (
            lambda c: set_at(c, 99, 2, 6, 0),
            [r"field 2 \(category prefixes\)\[6\]\[0\], item 7: found 99, expected \d, its number in field 4"],
        ),
        (
            lambda c: set_at(c, 0, 3, 2),
            [
                r"train.txt, field 3 \(price levels\)\[2\], item 3: found 0, expected 1 to",
                r"train.txt, field 1 .* item 3: found \d, expected 0, its number in field 3",
                r"test.txt, field 3 \(price levels\)\[2\], item 3: found \d, expected 0 as in train.txt",
            ],
        ),
        (
            lambda c: (c[3].append(1), c[4].append(1)),
            [
                r"test.txt, field 3 \(price levels\): found 12 items, expected 13 as in train.txt",
                r"imgMatrixpca.npy: found \(12, 64\) of float64, expected \(13, width\) of floats, a row per item",
            ],
        ),
        (lambda c: [values.clear() for values in c], [r"field 0 \(item prefixes\): found an empty list"]),
        (lambda c: [c[field].__delitem__(slice(1, None)) for field in (0, 1, 2, 5)], ["found 1 session, expected 2"]),
    ],
)
def test_a_mistake_is_named_with_place_found_and_expected(released, tmp_path, edit, messages):
    change(released, "train.txt", edit)
    with pytest.raises(DatasetError) as error:
        import_released(released, tmp_path / "Phones")
    for message in messages:
        assert re.search(message, str(error.value)), str(error.value)
    assert not isinstance(error.value, UnsafeFileError) and sorted(os.listdir(tmp_path)) == ["released"]


def test_a_small_file_that_names_one_list_many_times_is_refused_at_once(released, tmp_path):
    many = [[1] * 100_000] * 100_000  # ten thousand million numbers in half a megabyte
    change(released, "test.txt", lambda content: content.__setitem__(0, many))
    with pytest.raises(DatasetError, match="found [0-9]+ numbers in [0-9]+ bytes, expected each list written out"):
        import_released(released, tmp_path / "Phones")


def test_all_problems_are_listed_at_once_and_many_alike_are_counted(released, tmp_path):
    change(released, "train.txt", lambda content: set_at(content, [50] * 40, 5))
    change(released, "test.txt", lambda content: (content[0][0].clear(), set_at(content, 3, 5, 1)))
    rows = np.load(released / "textMatrixpca.npy")
    rows[[2, 7], 5] = np.nan, np.inf
    np.save(released / "textMatrixpca.npy", rows)
    np.save(released / "imgMatrixpca.npy", np.ones((12, 64), dtype=int))
    (released / "imgTextMatrixpca.npy").write_bytes((released / "imgTextMatrixpca.npy").read_bytes()[:-1])
    np.save(released / "textImgMatrixpca.npy", np.zeros((12, 64)))
    np.save(released / "asinlist.npy", np.array(["a", "b c", "a", "", "[PAD]", *"defghij"]))
    with pytest.raises(DatasetError) as error:
        import_released(released, tmp_path / "Phones")
    text = str(error.value)
    assert text.startswith(
        f"{released}: 52 problem(s)\n  - train.txt, field 5 (last items)[0]: found 50, expected an item"
    )
    assert text.count("found 50") == 5 and "train.txt: 35 more like these (ids of field 5)" in text
    for part in (
        "test.txt, field 0 (item prefixes)[0]: found an empty list, expected at least one item",
        "test.txt, field 1 (price-level prefixes)[0]: found",
        "test.txt, field 2 (category prefixes)[0]: found",
        "textMatrixpca.npy, row 2 (item 3): found NaN or infinity",
        "textMatrixpca.npy, row 7 (item 8): found NaN or infinity",
        "imgMatrixpca.npy: found (12, 64) of int64, expected (12, width) of floats",
        "imgTextMatrixpca.npy: found no plain .npy array, or one cut short",
        "textImgMatrixpca.npy: found zeros in all rows",
        "asinlist.npy, [1]: found 'b c', which holds a space",
        "asinlist.npy, [2]: found 'a', expected another name than [0]",
        "asinlist.npy, [3]: found '', which is empty",
        "asinlist.npy, [4]: found '[PAD]', which is RecBole's padding",
    ):
        assert part in text, (part, text)


@pytest.mark.parametrize(
    "content", [b"PK\x03\x04 no archive", b"\x93NUMPY\x01\x00", b"\x93NUMPY\x01\x00\x76\x00" + b"(" * 118, b"", b"text"]
)
def test_F43_a_file_that_is_no_array_is_said_to_be_none(tmp_path, content):
    (tmp_path / "x.npy").write_bytes(content)
    problems = Problems()
    assert read_array(tmp_path / "x.npy", problems) is None
    with pytest.raises(DatasetError, match="x.npy: found no plain .npy array, or one cut short"):
        problems.raise_if_any(tmp_path)


def test_both_files_are_looked_at_even_if_one_cannot_be_read(released, tmp_path):
    (released / "train.txt").write_bytes((released / "train.txt").read_bytes()[:-20])
    (released / "test.txt").unlink()
    with pytest.raises(DatasetError) as error:
        import_released(released, tmp_path / "Phones")
    assert "2 problem(s)\n  - train.txt: found no whole pickle, but one cut short" in str(error.value)
    assert "test.txt: found no such file, only [" in str(error.value) and "unpacked if it came" in str(error.value)


@pytest.mark.parametrize("array", [np.array(["a"] * 11), np.arange(12), np.array([["a"] * 12])])
def test_names_that_do_not_fit_are_refused(released, tmp_path, array):
    np.save(released / "asinlist.npy", array)
    with pytest.raises(DatasetError, match=r"asinlist.npy: found \(.*\) of .*, expected \(12,\) of texts"):
        import_released(released, tmp_path / "Phones")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"valid_share": 0.0}, "valid_share is 0.0, expected a share between 0 and 1"),
        ({"valid_share": float("nan")}, "valid_share is nan"),
        ({"prefixes": "all"}, r"prefixes is 'all', expected one of \['none', 'train'\]"),
        ({"longest": 1}, "longest is 1, expected at least 2"),
    ],
)
def test_wrong_settings_are_refused(released, tmp_path, settings, message):
    with pytest.raises(SettingError, match=message):
        import_released(released, tmp_path / "Phones", **settings)


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(DatasetError, match="no folder .*nowhere; it holds train.txt and test.txt"):
        import_released(tmp_path / "nowhere", tmp_path / "Phones")


# ---------------------------------------------------------------- writing


def test_a_folder_is_replaced_only_if_asked_for_and_made_here(released, tmp_path):
    import_released(released, tmp_path / "Phones")
    with pytest.raises(DatasetError, match="is there already; replace it with --overwrite"):
        import_released(released, tmp_path / "Phones", seed=7)
    import_released(released, tmp_path / "Phones", seed=7, overwrite=True)
    assert Manifest.load(tmp_path / "Phones").settings["seed"] == 7
    (tmp_path / "Phones" / "own.txt").touch()
    with pytest.raises(DatasetError, match="its manifest does not name own.txt"):
        import_released(released, tmp_path / "Phones", overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["Phones", "released"]


@pytest.mark.parametrize("step", ["released.write_feature", "folder_writer.put_in_place"])
def test_a_run_that_is_stopped_leaves_what_was_there(released, tmp_path, monkeypatch, step):
    import_released(released, tmp_path / "Phones")
    before = (tmp_path / "Phones" / "manifest.json").read_bytes()

    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(f"dataset_prep.{step}", stop)
    with pytest.raises(KeyboardInterrupt):
        import_released(released, tmp_path / "Phones", seed=9, overwrite=True)
    assert (tmp_path / "Phones" / "manifest.json").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["Phones", "released"]


def test_the_old_folder_comes_back_if_the_new_one_cannot_be_put_in_place(released, tmp_path, monkeypatch):
    import_released(released, tmp_path / "Phones")
    rename = Path.rename

    def refuse(self, target):
        if self.name == "Phones" and self.parent.name.startswith(".partial-Phones"):
            raise OSError("no rights")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(OSError, match="no rights"):
        import_released(released, tmp_path / "Phones", seed=9, overwrite=True)
    assert Manifest.load(tmp_path / "Phones").settings["seed"] == 2020


# ---------------------------------------------------------------- command line


def test_the_command_line_imports_and_says_what_it_did(released, tmp_path, capsys):
    run = ["released", "--folder", str(released), "--name", "Phones", "--out", str(tmp_path / "out")]
    assert main([*run, "--valid-share", "0.2", "--prefixes", "train", "--longest", "3", "--seed", "4"]) == 0
    out = capsys.readouterr().out
    assert "12 items; sessions: 32 train, 8 valid, 6 test" in out and "feature 'text': 12 rows of width 64" in out
    assert f"python -m dataset_prep check {tmp_path / 'out' / 'Phones'}" in out
    settings = Manifest.load(tmp_path / "out" / "Phones").settings
    assert [settings[name] for name in ("valid_share", "prefixes", "longest", "seed")] == [0.2, "train", 3, 4]
    assert main(["check", str(tmp_path / "out" / "Phones")]) == 0
    assert main(run) == 3 and main([*run, "--overwrite"]) == 0


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", ".hidden"])
def test_a_name_with_a_path_is_refused(released, capsys, name):
    assert main(["released", "--folder", str(released), "--name", name]) == 2
    assert "expected the name of a folder without a path" in capsys.readouterr().err
