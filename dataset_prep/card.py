"""The dataset card: ``DATASET.md`` and pictures of a prepared folder, for whoever finds the folder a year later.

    source, edition, licence note ─┐
    filters with their counts      ├── DATASET.md      card/lengths.png  card/popularity.png
    figures of the files           │                   card/prices.png   card/items.png
    features, pictures, hashes    ─┘

Everything stands in the manifest or is counted in the files; the same folder gives the same bytes. The pictures need
matplotlib; without it the card says so and has none.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dataset_prep.description import Description, Spread, day, describe
from dataset_prep.features import read_items
from dataset_prep.text import clean_text
from recbole_mm.data.files import file_info, write_atomically
from recbole_mm.data.layout import Manifest

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CARD = "DATASET.md"
FOLDER = "card"
N_SAMPLES = 12  # items on the card
SEED = 2020  # of their choice
TITLE_SHOWN = 44  # characters
BLUE, GREY = "#3b6fb6", "#666666"
LEAKS = (
    "Split by RecBole when a model is trained: of each user the last interaction is the test, the last but one "
    "validation. These lie at different times, so that training sees what is the future for other users."
)
NO_MATPLOTLIB = (
    'They need matplotlib: `pip install "recbole_mm[prep]"`, then `python -m dataset_prep describe FOLDER --card`.'
)
BY_TIME = "Split already: the folder holds training, validation and test rows."


def write_card(folder: Path) -> Description:
    """Write the card of a folder and enter it into the manifest; replaces an older card.

    Raises:
        DatasetError: the folder has no interactions, or a file that cannot be read.
    """
    folder = Path(folder)
    found = describe(folder)
    figures, remark = _figures(folder, found)
    for name, picture in figures.items():
        write_atomically(folder / FOLDER / name, lambda out, picture=picture: out.write(picture))
    text = card_text(found, pictures=list(figures), remark=remark)
    write_atomically(folder / CARD, lambda out: out.write(text.encode()))
    manifest = Manifest.load(folder)
    written = {CARD: file_info(folder / CARD)}
    written |= {f"{FOLDER}/{name}": file_info(folder / FOLDER / name) for name in figures}
    others = {name: info for name, info in manifest.files.items() if name != CARD and not name.startswith("card/")}
    replace(manifest, files={**others, **written}).save(folder)
    return found


def refresh_card(folder: Path) -> None:
    """Write the card anew if the folder has one; for commands that add to a folder."""
    if CARD in Manifest.load(folder).files:
        write_card(folder)


# ---------------------------------------------------------------- text


def card_text(found: Description, *, pictures: Sequence[str] = (), remark: str = "") -> str:
    """The card in Markdown.

    Args:
        pictures: names of the files in ``card/`` that are there.
        remark: said where the pictures would be.
    """
    settings, source = found.manifest.settings, found.manifest.settings.get("source", {})
    parts = [
        f"# {found.name}",
        _figures_table(found),
        _section("Source", _source(source, found.manifest)),
        _section("What was done", _steps(settings)),
        _section("Split", _split(found, settings)),
        _section("Histories and items", _histories(found, pictures)),
        _section("Content of the items", _content(found, pictures)),
        _section("Features", _features(found)),
        _section("Samples", _picture("items.png", "twelve items with picture, title and price", pictures)),
        _section("Pictures of this card", remark),
        _section("Settings", _settings(settings)),
        _section("Files", _files(found)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _section(title: str, body: str) -> str:
    return f"## {title}\n\n{body}" if body else ""


def _table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    lines = [list(header), ["---"] * len(header), *([str(cell) for cell in row] for row in rows)]
    return "\n".join(
        "| " + " | ".join(" ".join(cell.replace("|", "\\|").split()) for cell in line) + " |" for line in lines
    )


def _figures_table(found: Description) -> str:
    return _table(
        (found.owner, "items", "interactions", "density", "mean length"),
        [
            (
                f"{len(found.lengths):,}",
                f"{found.n_items:,}",
                f"{found.n_interactions:,}",
                f"{found.density:.3%}",
                f"{found.lengths.mean():.2f}",
            )
        ],
    )


def _source(source: dict[str, Any], manifest: Manifest) -> str:
    lines = []
    for key, value in source.items():
        if value not in (None, {}, []):
            lines.append(f"* {key.replace('_', ' ')}: {_plain(value)}")
    if "licence" not in source:
        lines.append("* licence: not stated; ask whoever made the data before passing them on")
    if manifest.raw_files:
        lines += ["", _table(("file", "sha256"), sorted(manifest.raw_files.items()))]
    return "\n".join(lines)


def _steps(settings: dict[str, Any]) -> str:
    """Filters and their counts, of whichever command made the folder."""
    counts = settings.get("counts", {})
    if not isinstance(counts, dict):
        return ""
    lines = []
    if "n_read" in counts:
        lines.append(f"{counts['n_read']:,} interactions were read.")
    dropped = counts.get("dropped", {})
    if isinstance(dropped, dict) and dropped:
        lines += ["", _table(("dropped", "interactions"), [(why, f"{n:,}") for why, n in dropped.items()])]
    for title, key in (("items dropped", "items_dropped"), ("cleaned", "cleaned"), ("rows set aside", "rejected")):
        if isinstance(counts.get(key), dict) and counts[key]:
            lines += [
                "",
                _table(
                    (title, "number"),
                    [(why, f"{n:,}" if isinstance(n, int) else _plain(n)) for why, n in counts[key].items()],
                ),
            ]
    if isinstance(settings.get("remarks"), list):
        lines += ["", *(f"* {remark}" for remark in settings["remarks"])]
    return "\n".join(lines).strip()


def _split(found: Description, settings: dict[str, Any]) -> str:
    lines = [LEAKS if found.kind == "interactions" else BY_TIME]
    if found.parts:
        lines += ["", _table(("part", "rows"), [(part, f"{n:,}") for part, n in found.parts.items()])]
    if found.cold is not None:
        lines += ["", f"{found.cold:,} items occur in validation or test and not in training (cold items)."]
    return "\n".join(lines)


def _histories(found: Description, pictures: Sequence[str]) -> str:
    lines = [
        f"* length of a history: {Spread.of(found.lengths)}",
        f"* interactions of an item: {Spread.of(found.popularity)}",
        f"* the most popular fifth of the items has {found.head_share:.0%} of the interactions",
    ]
    if found.first is not None:
        lines.append(f"* from {day(found.first)} to {day(found.last)}")
    shown = [
        _picture("lengths.png", "how long the histories are", pictures),
        _picture("popularity.png", "how often each item occurs", pictures),
    ]
    return "\n".join([*lines, *(["", *filter(None, shown)] if any(shown) else [])])


def _content(found: Description, pictures: Sequence[str]) -> str:
    lines = []
    if found.columns:
        rows = [(name, f"{n:,}", f"{n / found.n_items:.1%}") for name, n in found.columns.items()]
        lines.append(_table(("column", "items that have it", "share"), rows))
    if found.pictures:
        lines += ["", _table(("pictures", "number"), [(status, f"{n:,}") for status, n in found.pictures.items()])]
    if len(found.prices):
        lines += ["", f"Prices: {Spread.of(found.prices)}.", "", _picture("prices.png", "prices", pictures)]
    return "\n".join(lines).strip()


def _features(found: Description) -> str:
    if not found.features:
        return "None yet: `python -m dataset_prep features --help`."
    rows = [
        (name, f"{made.n_covered:,} ({made.n_covered / found.n_items:.1%})", f"{made.n_rows:,} x {made.width}")
        + (made.encoder, made.model, made.source)
        for name, made in found.features.items()
    ]
    return _table(("feature", "items", "rows x width", "encoder", "model", "made of"), rows)


def _settings(settings: dict[str, Any]) -> str:
    shown = {key: value for key, value in settings.items() if key not in ("counts", "source", "remarks", "pictures")}
    rows = [(key, _plain(value)) for key, value in _flat(shown) if value not in ({}, [])]
    return _table(("setting", "value"), rows) if rows else ""


def _flat(settings: dict[str, Any], above: str = "") -> Iterable[tuple[str, Any]]:
    """Settings within settings in one list, ``prices.method``."""
    for key, value in settings.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{above}{key}.")
        else:
            yield f"{above}{key}", value


def _files(found: Description) -> str:
    files = {
        name: info
        for name, info in sorted(found.manifest.files.items())
        if name != CARD and not name.startswith(f"{FOLDER}/")
    }
    lines = [f"Fingerprint of the interactions: `{found.fingerprint}`."]
    if files:
        rows = [(name, f"{info.bytes:,}", info.sha256) for name, info in files.items()]
        lines += ["", _table(("file", "bytes", "sha256"), rows)]
    return "\n".join(lines)


def _picture(name: str, what: str, pictures: Sequence[str]) -> str:
    return f"![{what}]({FOLDER}/{name})" if name in pictures else ""


def _plain(value: Any) -> str:
    """A setting as people write it."""
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_plain(inner)}" for key, inner in value.items())
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_plain, value))
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    if isinstance(value, float):
        return f"{value:.0f}" if value.is_integer() else f"{value:g}"
    return str(value)


# ---------------------------------------------------------------- pictures


def _figures(folder: Path, found: Description) -> tuple[dict[str, bytes], str]:
    """PNG files by name; and what to say if there are none."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return {}, NO_MATPLOTLIB
    owner = found.owner.removesuffix("s")
    made = {
        "lengths.png": _histogram(found.lengths, f"interactions of a {owner}", found.owner),
        "popularity.png": _ranks(found.popularity),
    }
    if len(found.prices):
        made["prices.png"] = _histogram(found.prices, "price (the source's currency)", "items")
    samples = _items_shown(folder, found)
    if samples:
        made["items.png"] = _samples(samples)
    return {name: _png(figure) for name, figure in made.items()}, ""


def _axes(x: str, y: str) -> tuple[Figure, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.2), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)  # no window system, no global state
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.7)
    axes.set_axisbelow(True)
    axes.set_xlabel(x, color=GREY)
    axes.set_ylabel(y, color=GREY)
    axes.tick_params(colors=GREY)
    return figure, axes


def _histogram(values: np.ndarray, x: str, y: str) -> Figure:
    """Bars of equal width, on a logarithmic axis where the values span more than a hundredfold."""
    figure, axes = _axes(x, y)
    low, high = float(values.min()), float(values.max())
    whole = bool((values == np.round(values)).all())
    if low > 0 and high / low > 100:
        edges = np.geomspace(low, high, 41)
        axes.set_xscale("log")
    elif whole and high - low <= 60:
        edges = np.arange(low - 0.5, high + 1)
    else:
        edges = np.linspace(low, high if high > low else low + 1, 41)
    axes.hist(values, bins=edges, color=BLUE, edgecolor="white", linewidth=0.4)
    _whole_ticks(axes.yaxis)
    _plain_ticks(axes.yaxis)
    if whole:
        _whole_ticks(axes.xaxis)
    if low > 0 and high / low > 100:
        _plain_ticks(axes.xaxis)
    return figure


def _ranks(popularity: np.ndarray) -> Figure:
    figure, axes = _axes("items, the most frequent first", "interactions")
    axes.plot(np.arange(1, len(popularity) + 1), popularity, color=BLUE, linewidth=1.8)
    if len(popularity) >= 10:
        axes.set_xscale("log")
    if popularity[0] >= 10 * popularity[-1]:  # within a power of ten a logarithmic axis has hardly a label
        axes.set_yscale("log")
    for axis in (axes.xaxis, axes.yaxis):
        _whole_ticks(axis)
        _plain_ticks(axis)
    return figure


def _whole_ticks(axis: Any) -> None:
    """No marks between whole numbers, on an axis that counts."""
    from matplotlib.ticker import MaxNLocator

    if axis.get_scale() == "linear":
        axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def _plain_ticks(axis: Any) -> None:
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _items_shown(folder: Path, found: Description) -> list[tuple[str, Any]]:
    """Captions and pictures of items drawn by lot, those with a picture first: a look at what the data are."""
    if not (folder / f"{folder.name}.item").is_file():
        return []
    items = read_items(folder)
    items = items[items["item_id"].isin(found.tokens)]
    paths = _picture_of(folder, items)
    order = np.random.default_rng(SEED).permutation(len(items)).tolist()
    tokens = items["item_id"].tolist()
    chosen = sorted(order, key=lambda row: tokens[row] not in paths)[:N_SAMPLES]
    return [(_caption(items.iloc[row]), _thumbnail(paths.get(tokens[row]))) for row in chosen]


def _samples(shown: list[tuple[str, Any]]) -> Figure:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = 4
    n_rows = -(-len(shown) // columns)
    with_pictures = any(picture is not None for _, picture in shown)
    figure = Figure(figsize=(9, (2.5 if with_pictures else 1.1) * n_rows), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    for number, (caption, picture) in enumerate(shown):
        axes = figure.add_subplot(n_rows, columns, number + 1)
        axes.axis("off")
        if picture is not None:
            axes.imshow(picture)
        elif with_pictures:
            axes.text(0.5, 0.5, "no picture", ha="center", va="center", color=GREY, transform=axes.transAxes)
        axes.set_title(caption, fontsize=8, loc="center", parse_math=False)
    return figure


def _caption(item: Any) -> str:
    """Title in two short lines, and the price."""
    import textwrap

    title = _drawable(clean_text(item["title"])) if "title" in item else ""
    lines = textwrap.wrap(title or _drawable(item["item_id"]), TITLE_SHOWN // 2, max_lines=2, placeholder="…")
    price = _drawable(item["price"])[: TITLE_SHOWN // 2] if "price" in item else ""
    return "\n".join([*lines, *([price] if price else [])])


def _drawable(text: str) -> str:
    """What matplotlib's own font has of a text; of a text that is mostly in other scripts, nothing."""
    letters = _letters()
    kept = "".join(character for character in text if ord(character) in letters)
    return kept.strip() if 2 * len(kept) > len(text) else ""


@cache
def _letters() -> frozenset[int]:
    from matplotlib.font_manager import FontProperties, findfont, get_font

    return frozenset(get_font(findfont(FontProperties())).get_charmap())


def _picture_of(folder: Path, items: Any) -> dict[str, Path]:
    """The first picture of each item, as far as there are files."""
    from dataset_prep.pictures import picture_files
    from dataset_prep.pictures.store import file_inside

    indexed = picture_files(folder)
    if indexed is not None:
        return {token: files[0] for token, files in indexed.items() if files}
    if "image" not in items:
        return {}
    root = Path(os.path.realpath(folder))
    named = {
        token: file_inside(root, name) for token, name in zip(items["item_id"], items["image"], strict=True) if name
    }
    return {token: path for token, path in named.items() if path is not None and os.path.isfile(path)}


def _thumbnail(path: Path | None) -> Any:
    from dataset_prep.pictures.decode import PictureError, read_picture

    if path is None:
        return None
    try:
        picture = read_picture(path)
    except (FileNotFoundError, PictureError):
        return None
    picture.thumbnail((200, 200))
    return picture


def _png(figure: Figure) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", metadata={"Software": None}, facecolor="white")
    return out.getvalue()
