"""Reducing features: PCA against NumPy's SVD, what it is fitted on, and what a folder holds afterwards."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from dataset_prep.__main__ import main
from dataset_prep.reduction import fit_projection, original_name, reduce_features, training_items
from recbole_mm.data.files import write_table
from recbole_mm.data.layout import Manifest, check_folder, read_feature, write_feature
from recbole_mm.errors import DatasetError, SettingError

N, F = 30, 8


def random_rows(n: int, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    return (random.normal(size=(n, F)) * np.arange(1, F + 1) + random.normal(size=F)).astype(np.float32)


def literal_pca(fitted: np.ndarray, rows: np.ndarray, width: int, *, whiten: bool = False) -> np.ndarray:
    """By NumPy's SVD, one direction at a time."""
    fitted = fitted.astype(np.float64)
    mean = fitted.mean(axis=0)
    _, values, directions = np.linalg.svd(fitted - mean)
    columns = []
    for value, direction in zip(values[:width], directions[:width], strict=True):
        if direction[np.abs(direction).argmax()] < 0:
            direction = -direction
        column = (rows - mean) @ direction
        columns.append(column / (value / np.sqrt(len(fitted) - 1)) if whiten else column)
    return np.array(columns).T


def projected(rows: np.ndarray, width: int, *, whiten: bool = False, scale: str = "none") -> np.ndarray:
    rows = np.asarray(rows, dtype=np.float64)
    return fit_projection(lambda: iter([rows.copy()]), width=width, whiten=whiten, scale=scale, called="x")(rows)


@pytest.fixture
def shop(tmp_path) -> Path:
    """Items i0 to i29; the last ten occur in nobody's training part. Texts have several rows each, i7 has none."""
    folder = tmp_path / "shop"
    folder.mkdir()
    tokens = [f"i{i}" for i in range(N)]
    write_table(folder / "shop.item", {"item_id:token": tokens})
    rows = [(f"u{i}", token, float(step)) for i in range(10) for step, token in enumerate(tokens[i::10])]
    users, items, times = zip(*rows[::-1], strict=True)  # the last first
    write_table(folder / "shop.inter", {"user_id:token": users, "item_id:token": items, "timestamp:float": times})
    write_feature(folder, "image", tokens=tokens, rows=random_rows(N, 1), encoder="e", source="s", settings={"k": 1})
    backwards = tokens[::-1]
    write_feature(folder, "image_from_text", tokens=backwards, rows=random_rows(N, 2) + 5, encoder="n", source="s")
    listed = [token for token in tokens if token != "i7"]
    counts = np.arange(len(listed)) % 3 + 1
    rows = random_rows(int(counts.sum()), 3)
    write_feature(folder, "text", tokens=listed, rows=rows, counts=counts, encoder="e", source="s")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


# ---------------------------------------------------------------- PCA


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("width", [1, 3, F])
def test_pca_equals_numpys_svd(width, whiten):
    rows = random_rows(50, 0)
    expected = literal_pca(rows, rows, width, whiten=whiten)
    np.testing.assert_allclose(projected(rows, width, whiten=whiten), expected, rtol=1e-5, atol=1e-5)


def test_pca_equals_scikit_learns_but_for_signs():
    from sklearn.decomposition import PCA

    rows = random_rows(50, 0)
    pca = PCA(3, svd_solver="full").fit(rows.astype(np.float64))
    expected = pca.transform(rows.astype(np.float64))
    np.testing.assert_allclose(np.abs(projected(rows, 3)), np.abs(expected), rtol=1e-4, atol=1e-4)
    projection = fit_projection(
        lambda: iter([rows.astype(np.float64)]), width=3, whiten=False, scale="none", called="x"
    )
    assert projection.explained == pytest.approx(pca.explained_variance_ratio_.sum(), rel=1e-6)


def test_whitened_rows_have_variance_one_and_no_correlation():
    made = projected(random_rows(60, 4), 5, whiten=True).astype(np.float64)
    np.testing.assert_allclose(np.cov(made.T), np.eye(5), atol=1e-5)
    np.testing.assert_allclose(made.mean(axis=0), 0, atol=1e-6)


def test_unit_rows_have_length_one_and_the_same_direction():
    rows = random_rows(40, 5)
    plain, unit = projected(rows, 3), projected(rows, 3, scale="unit")
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(unit * np.linalg.norm(plain, axis=1, keepdims=True), plain, rtol=1e-4, atol=1e-5)


def test_standardized_dimensions_count_alike_whatever_their_unit():
    rows = random_rows(40, 6)
    scaled = rows * np.array([1, 100, 0.01, 1, 5, 1, 1, 1]) + 3
    np.testing.assert_allclose(
        projected(scaled, 4, scale="standardize"), projected(rows, 4, scale="standardize"), rtol=1e-3, atol=1e-3
    )
    standard = (rows - rows.mean(axis=0)) / rows.std(axis=0, ddof=1)
    np.testing.assert_allclose(
        projected(rows, 4, scale="standardize"), literal_pca(standard, standard, 4), rtol=1e-3, atol=1e-4
    )


def test_a_constant_dimension_changes_nothing():
    rows = random_rows(40, 7)
    wider = np.c_[rows[:, :3], np.full(40, 0.1, dtype=np.float32), rows[:, 3:]]
    for scale in ("none", "unit", "standardize"):
        for whiten in (False, True):
            expected = projected(rows, 4, whiten=whiten, scale=scale)
            actual = projected(wider, 4, whiten=whiten, scale=scale)
            np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_the_order_of_rows_and_their_blocks_change_nothing():
    rows = random_rows(40, 8).astype(np.float64)
    arguments = {"width": 4, "whiten": True, "scale": "none", "called": "x"}
    whole = fit_projection(lambda: iter([rows.copy()]), **arguments)(rows)
    parts = fit_projection(lambda: iter([rows[25:].copy(), rows[:1].copy(), rows[1:25].copy()]), **arguments)(rows)
    np.testing.assert_allclose(parts, whole, rtol=1e-5, atol=1e-6)


def test_a_width_that_cannot_be_had_names_the_largest():
    with pytest.raises(
        SettingError, match="width is 9, but the 40 rows of x of width 8 vary in 8 directions only; choose"
    ):
        projected(random_rows(40, 0), 9)
    with pytest.raises(SettingError, match="the 4 rows of x of width 8 vary in 3 directions only; choose at most 3"):
        projected(random_rows(4, 0), 4)
    flat = random_rows(40, 0)[:, :2] @ np.ones((2, F), dtype=np.float32)
    with pytest.raises(SettingError, match="vary in 1 directions only; choose at most 1"):
        projected(flat, 2)
    with pytest.raises(SettingError, match="the 5 rows of x of width 8 vary in 0 directions: all are equal"):
        projected(np.full((5, F), 0.1), 1)


# ---------------------------------------------------------------- training items


def test_training_items_are_those_before_the_last_two_of_each_user(shop):
    assert training_items(shop) == {f"i{i}" for i in range(10)}


def test_short_histories_and_equal_times_are_parted_as_leave_one_out_does(tmp_path):
    folder = tmp_path / "shop"
    folder.mkdir()
    rows = [("a", "one"), ("b", "first"), ("b", "second"), ("c", "x"), ("c", "y"), ("c", "z"), ("c", "w")]
    users, items = zip(*rows, strict=True)
    table = {"user_id:token": users, "item_id:token": items, "timestamp:float": [7.0] * len(rows)}
    write_table(folder / "shop.inter", table)
    assert training_items(folder) == {"one", "first", "x", "y"}


def test_training_items_of_splits_are_those_of_the_first(tmp_path):
    folder = tmp_path / "shop"
    folder.mkdir()
    for split, rows in (("train", [("a b", "c"), ("", "d")]), ("valid", [("a", "e")]), ("test", [("f", "a")])):
        lists, items = zip(*rows, strict=True)
        table = {"session_id:token": list(range(len(rows))), "item_id_list:token_seq": lists, "item_id:token": items}
        write_table(folder / f"shop.{split}.inter", table)
    assert training_items(folder) == {"a", "b", "c", "d"}


# ---------------------------------------------------------------- the folder


def test_a_modality_and_its_pseudo_twin_are_fitted_as_one_on_training_items(shop):
    image, pseudo = (read_feature(shop, name).rows.copy() for name in ("image", "image_from_text"))
    report = reduce_features(shop, ["image", "image_from_text"], width=3, progress=False)
    fitted = np.concatenate([image[:10], pseudo[20:]])  # i0 to i9 of each; the second runs backwards
    for name, rows in (("image", image), ("image_from_text", pseudo)):
        feature = read_feature(shop, name)
        np.testing.assert_allclose(feature.rows, literal_pca(fitted, rows, 3), rtol=1e-4, atol=1e-4)
        assert feature.rows.dtype == np.float32
        np.testing.assert_array_equal(read_feature(shop, f"{name}_full").rows, rows)
    assert report.n_items == 10 and report.widths == {"image": (F, 3), "image_from_text": (F, 3)}
    assert "fitted on 10 items of the training part\nfeature 'image': width 8 to 3, " in str(report)
    check_folder(shop)


def test_fitting_on_all_items_and_several_rows_per_item(shop):
    before = read_feature(shop, "text")
    rows, counts = before.rows.copy(), before.counts.copy()
    reduce_features(shop, ["text"], width=4, fit_on="all", whiten=True, progress=False)
    after = read_feature(shop, "text")
    assert after.tokens == before.tokens and after.counts.tolist() == counts.tolist()
    np.testing.assert_allclose(after.rows, literal_pca(rows, rows, 4, whiten=True), rtol=1e-4, atol=1e-4)
    reduce_features(shop, ["text"], width=4, progress=False)
    fitted = rows[: counts[:9].sum()]  # i0 to i9 without i7
    np.testing.assert_allclose(read_feature(shop, "text").rows, literal_pca(fitted, rows, 4), rtol=1e-4, atol=1e-4)


def test_features_that_are_no_twins_are_fitted_apart(shop):
    reduce_features(shop, ["image", "text"], width=3, progress=False)
    together = read_feature(shop, "image").rows.copy()
    reduce_features(shop, ["image"], width=3, progress=False)
    np.testing.assert_array_equal(read_feature(shop, "image").rows, together)


def test_the_manifest_says_how_and_of_what(shop):
    sha256 = Manifest.load(shop).files["features/image.npy"].sha256
    reduce_features(shop, ["image"], width=3, scale="unit", progress=False)
    manifest = Manifest.load(shop)
    info, full = manifest.features["image"], manifest.features["image_full"]
    assert (info.encoder, info.source, info.shape) == ("pca", "image_full", (N, 3))
    reduction = dict(info.settings["reduction"])
    assert 0 < reduction.pop("explained_variance") < 1 and len(reduction.pop("interactions")) == 12
    assert reduction == {
        "whiten": False,
        "scale": "unit",
        "fit_on": "train",
        "width": 3,
        "fitted_with": ["image"],
        "n_rows": 10,
        "made_of": {"image": sha256},
    }
    assert info.settings["of"] == {"encoder": "e", "source": "s", "settings": {"k": 1}}
    assert (full.encoder, full.source, full.settings) == ("e", "s", {"k": 1})


def test_reducing_again_starts_from_the_originals(shop):
    names = ["image", "image_from_text"]
    reduce_features(shop, names, width=5, progress=False)
    once = contents(shop)
    reduce_features(shop, names, width=2, whiten=True, progress=False)
    assert read_feature(shop, "image").rows.shape == (N, 2)
    reduce_features(shop, names, width=5, progress=False)
    assert contents(shop) == once


def test_a_reduction_that_is_there_is_left_alone_until_something_changes(shop):
    names = ["image", "image_from_text", "text"]

    def reduce(**how) -> tuple[str, ...]:
        return reduce_features(shop, names, **{"width": 3, "progress": False, **how}).up_to_date

    def changed(name: str) -> None:
        """Another vector for the first item."""
        tokens, rows, counts = read_feature(shop, name)
        rows = rows + np.eye(len(rows), rows.shape[1], dtype=np.float32)
        write_feature(shop, name, tokens=tokens, rows=rows, counts=counts if name == "text" else None, encoder="e",
                      source="s")  # fmt: skip

    first = reduce()
    once = {path: (shop / path).stat().st_mtime_ns for path in contents(shop)}
    assert first == () and set(reduce()) == set(names)
    assert once == {path: (shop / path).stat().st_mtime_ns for path in contents(shop)}
    report = reduce_features(shop, names, width=3, progress=False)
    assert str(report).count("the original is text_full; up to date, nothing was done") == 1 and report.n_items == 10

    assert reduce(whiten=True) == reduce(scale="unit") == reduce(fit_on="all") == reduce(width=2) == reduce() == ()
    changed("image_full")  # its twin is fitted with it
    assert reduce() == ("text",)
    (shop / "features" / "text.npy").write_bytes(b"broken")
    assert set(reduce()) == {"image", "image_from_text"}
    tokens, full, counts = read_feature(shop, "text_full")
    write_feature(
        shop, "text_full", tokens=tokens, rows=full, counts=np.sort(counts)[::-1], encoder="e", source="s"
    )  # the same rows, of other items
    assert set(reduce()) == {"image", "image_from_text"}
    assert read_feature(shop, "text").counts.tolist() == sorted(counts, reverse=True)


def test_an_original_is_not_reduced_itself(shop):
    reduce_features(shop, ["image"], width=5, progress=False)
    with pytest.raises(SettingError, match="image_full keeps the original of image; reduce image, which starts"):
        reduce_features(shop, ["text", "image_full"], width=3, progress=False)
    write_feature(shop, "half_full", tokens=["i0", "i1", "i2"], rows=random_rows(3, 1), encoder="e", source="s")
    with pytest.raises(SettingError, match="reduce half, which starts from it"):
        reduce_features(shop, ["half_full"], width=1, fit_on="all", progress=False)
    reduce_features(shop, ["half"], width=1, fit_on="all", progress=False)
    assert read_feature(shop, "half").rows.shape == (3, 1)


def test_a_feature_that_was_made_anew_is_its_own_original_again(shop):
    assert original_name(Manifest.load(shop), "image") == "image"
    reduce_features(shop, ["image"], width=5, progress=False)
    assert original_name(Manifest.load(shop), "image") == "image_full"
    anew = random_rows(N, 99)
    write_feature(shop, "image", tokens=[f"i{i}" for i in range(N)], rows=anew, encoder="e", source="s")
    reduce_features(shop, ["image"], width=5, progress=False)
    np.testing.assert_array_equal(read_feature(shop, "image_full").rows, anew)


@pytest.mark.parametrize(
    ("names", "arguments", "kind", "message"),
    [
        (["image"], {"width": 0}, SettingError, "width is 0, expected at least 1"),
        (["image"], {"width": 9}, SettingError, "width is 9, but the 10 rows of image of width 8 .* choose at most 8"),
        (["image"], {"scale": "max"}, SettingError, "scale is 'max', expected one of .*'standardize'"),
        (["image"], {"fit_on": "test"}, SettingError, "fit_on is 'test', expected one of .*'train'"),
        (["image", "sound"], {}, DatasetError, "shop has no feature 'sound', only .*make it with: .*--feature sound"),
        (["late"], {}, DatasetError, "shop: no item with a row in late occurs in training"),
        (["late", "late_from_text"], {}, SettingError, r"need one width, found {'late': 8, 'late_from_text': 7}; make"),
    ],
)
def test_what_cannot_be_done_is_refused_and_leaves_the_folder_as_it_is(shop, names, arguments, kind, message):
    write_feature(shop, "late", tokens=["i29"], rows=random_rows(1, 0), encoder="-", source="-")
    write_feature(shop, "late_from_text", tokens=["i0"], rows=random_rows(1, 0)[:, 1:], encoder="-", source="-")
    before = contents(shop)
    with pytest.raises(kind, match=f"(?s){message}"):
        reduce_features(shop, names, **{"width": 3, "progress": False, **arguments})
    assert contents(shop) == before


# ---------------------------------------------------------------- command line


def test_the_command_line_reduces(shop, capsys):
    run = ["reduce", "--dataset", str(shop), "--features", "image,image_from_text", "--width", "4"]
    assert main([*run, "--whiten", "--scale", "unit", "--fit", "all"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"fitted on 30 items\nfeature 'image': width 8 to 4, \d+\.\d% of the variance", out)
    reduction = Manifest.load(shop).features["image"].settings["reduction"]
    assert (reduction["whiten"], reduction["scale"], reduction["fit_on"]) == (True, "unit", "all")
    assert main([*run[:-1], "9"]) == 2
    assert "choose at most 8" in capsys.readouterr().err
    assert main([*run[:4], "sound", *run[5:]]) == 3
    with pytest.raises(SystemExit):
        main([*run[:-1], "0"])
