"""A made-up outdoor shop with texts, pictures, prices and a taste to learn; everything follows from a seed.

The planted taste
    Every article has a *kind* (15, such as tent or lantern), a *style* (12, such as nordic), a colour, a price tier
    (1 to 3) and a popularity within its kind and style that falls like Zipf's law: 1, 1/2, 1/3, ...
    - The **text** tells the kind (in title and categories), the colour, and for about half of the articles the style,
      by one word in the description.
    - The **picture** tells the style: 4 palettes x 3 textures (stripes, dots, chequers). The colour is that of a shape
      of random form and place in front. It says nothing about the kind.
    - So either knows one half well, and only both together know kind and style of every article.
    - The **price level**, which compares articles of a kind, tells the tier.
    A user likes one or two styles, popular ones more often (Zipf again), and one price tier, and walks through the
    shop. Each step is
    - with probability 0.1 an aside: any article at all, after which the walk goes on as if nothing had happened;
    - else a move. The style stays with probability 0.85; else it becomes the user's other style, or any other one if
      there is none. The kind goes along the table ``NEXT_KINDS`` (from tent to sleeping bag, lantern, camp stove or
      hammock, with probabilities 0.4, 0.3, 0.2 and 0.1). Then an article of that kind and style is drawn by
      popularity, those of the user's tier four times as often.
    Nobody buys an article twice; if a user has all of a kind and style, the step takes another article of the style.
    Histories have 4 to 20 articles, about 8 in the mean. Half of the steps are made in the same visit, 20 to 110
    seconds apart; the others after days.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

from dataset_prep.features import make_feature
from dataset_prep.price import PriceSettings
from dataset_prep.pseudo import make_pseudo_feature
from dataset_prep.session_folder import add_price_levels
from recbole_mm.data.files import file_info, write_table
from recbole_mm.data.layout import Manifest
from recbole_mm.errors import DatasetError

if TYPE_CHECKING:
    from PIL.Image import Image

ASIDE_PROB = 0.1
KEEP_STYLE_PROB = 0.85
NEXT_KIND_PROBS = (0.4, 0.3, 0.2, 0.1)
SAME_TIER_WEIGHT = 4.0
STYLE_FALL = 1.0  # exponent of Zipf's law among styles
STYLE_WORD_PROB = 0.5
SHORTEST, LONGEST = 4, 20
FIRST_DAY, N_DAYS = 1_672_531_200, 500  # 1 January 2023 [unix seconds]
MADE_BY = "python -m dataset_prep demo"
N_PRICE_LEVELS = 20

# Kind: department, price of the middle tier [USD], a sentence of the description.
KINDS = {
    "tent": ("Camping", 160, "Pitches in minutes and stands firm in a storm."),
    "sleeping bag": ("Camping", 90, "Keeps its loft for years and packs down small."),
    "lantern": ("Camping", 30, "Lights a whole table for twelve hours."),
    "camp stove": ("Kitchen", 55, "Boils half a litre of water in three minutes."),
    "cooking pot": ("Kitchen", 35, "Heats evenly and nests with its own lid."),
    "water bottle": ("Kitchen", 20, "Does not leak, even upside down in a bag."),
    "backpack": ("Hiking", 110, "The hip belt carries the weight, not the shoulders."),
    "hiking boots": ("Hiking", 130, "The sole grips on wet rock and loose gravel."),
    "trekking poles": ("Hiking", 60, "Three sections lock with one turn of the wrist."),
    "rain jacket": ("Clothing", 120, "Taped seams keep out a whole day of rain."),
    "wool hat": ("Clothing", 25, "Soft on the forehead and warm below zero."),
    "gloves": ("Clothing", 30, "Fingertips work on a telephone screen."),
    "hammock": ("Leisure", 45, "Hangs between two trees with the straps supplied."),
    "folding chair": ("Leisure", 50, "Carries 120 kilos and folds flat."),
    "picnic blanket": ("Leisure", 28, "The underside stays dry on wet grass."),
}
# Where the walk goes from each kind, most likely first.
NEXT_KINDS = {
    "tent": ("sleeping bag", "lantern", "camp stove", "hammock"),
    "sleeping bag": ("lantern", "wool hat", "camp stove", "tent"),
    "lantern": ("camp stove", "folding chair", "hammock", "picnic blanket"),
    "camp stove": ("cooking pot", "water bottle", "lantern", "folding chair"),
    "cooking pot": ("water bottle", "picnic blanket", "camp stove", "backpack"),
    "water bottle": ("backpack", "trekking poles", "picnic blanket", "hiking boots"),
    "backpack": ("hiking boots", "rain jacket", "trekking poles", "tent"),
    "hiking boots": ("trekking poles", "gloves", "rain jacket", "backpack"),
    "trekking poles": ("rain jacket", "gloves", "hiking boots", "water bottle"),
    "rain jacket": ("wool hat", "tent", "gloves", "backpack"),
    "wool hat": ("gloves", "sleeping bag", "rain jacket", "hiking boots"),
    "gloves": ("tent", "sleeping bag", "wool hat", "trekking poles"),
    "hammock": ("picnic blanket", "lantern", "folding chair", "cooking pot"),
    "folding chair": ("hammock", "cooking pot", "picnic blanket", "water bottle"),
    "picnic blanket": ("folding chair", "cooking pot", "hammock", "wool hat"),
}
# Style: the words that give it away in a description.
STYLES = {
    "alpine": ("alpine", "glacier", "summit"),
    "nordic": ("nordic", "fjord", "birch"),
    "marine": ("nautical", "harbour", "tidal"),
    "desert": ("desert", "dune", "canyon"),
    "heritage": ("heritage", "vintage", "antique"),
    "autumn": ("autumnal", "chestnut", "harvest"),
    "forest": ("woodland", "mossy", "fern"),
    "tropical": ("tropical", "jungle", "palm"),
    "meadow": ("meadow", "clover", "garden"),
    "festival": ("festival", "carnival", "party"),
    "sunset": ("sunset", "dusk", "ember"),
    "retro": ("retro", "disco", "arcade"),
}
# Background and texture colour (RGB); style number s has palette s // 3 and texture s % 3.
PALETTES = (
    ((214, 228, 240), (70, 110, 160)),
    ((236, 214, 176), (150, 96, 48)),
    ((206, 226, 188), (52, 112, 62)),
    ((250, 206, 214), (170, 40, 120)),
)
TEXTURES = ("stripes", "dots", "chequers")
COLOURS = {
    "red": (206, 40, 44),
    "orange": (240, 140, 30),
    "yellow": (246, 220, 60),
    "green": (40, 160, 80),
    "teal": (20, 140, 150),
    "blue": (40, 80, 200),
    "violet": (120, 60, 190),
    "black": (34, 34, 38),
}
FORMS = ("disc", "square", "triangle", "ring")
TIER_FACTORS = (0.55, 1.0, 1.9)
NAMES = "Arlo Bram Cora Dune Elva Finn Gale Hilo Iris Juno Kite Lark Milo Nova Otto Pine Quill Rook Sol Tarn".split()
PLAIN_WORDS = ("sturdy", "simple", "handy", "everyday", "reliable", "practical")
LOOKS = (
    "A {word} design that goes with the rest of the range.",
    "Made for friends of the {word} look.",
    "Our {word} edition, back by popular demand.",
    "One more piece of the {word} series.",
)
MATERIALS = ("recycled nylon", "waxed canvas", "ripstop polyester", "aluminium", "merino wool", "cork and steel")
CARES = (
    "Wipe clean with a damp cloth.",
    "Guaranteed for three years.",
    "Spare parts are available.",
    "Designed &amp; tested outdoors.",
    "<b>New</b> this season!",
    "Comes in a cotton pouch.<br>Weighs next to nothing.",
)
N_STYLES, N_KINDS = len(STYLES), len(KINDS)
STYLE_WEIGHTS = tuple(1 / rank**STYLE_FALL for rank in range(1, N_STYLES + 1))
_KIND_NAMES = tuple(KINDS)
_NEXT = tuple(tuple(_KIND_NAMES.index(kind) for kind in NEXT_KINDS[name]) for name in KINDS)


@dataclass(frozen=True)
class Article:
    """One article with its hidden attributes.

    Attributes:
        kind, style: positions in ``KINDS`` and ``STYLES``.
        popularity: weight among the articles of its kind and style.
        tier: 1 to 3; price [USD].
    """

    token: str
    kind: int
    style: int
    popularity: float
    tier: int
    price: float
    colour: str
    title: str
    description: str

    @property
    def picture(self) -> str:
        return f"images/{self.token.removeprefix('i')}.png"

    @property
    def department(self) -> str:
        return KINDS[_KIND_NAMES[self.kind]][0]


def make_demo(
    folder: Path, *, seed: int = 2020, n_items: int = 600, n_users: int = 3000, progress: bool = True
) -> None:
    """Make the shop as an ordinary prepared folder, with price levels, texts and pictures.

    Features: ``text`` (a vector per sentence), ``image``, and ``text_from_image`` and ``image_from_text``, which are
    means over the articles most alike (see ``pseudo.py``). Price levels are 1 to 20 in each category, that is, kind.

    Everything is made in a folder beside it and renamed at the end: a run that is stopped leaves no half-made shop.
    A shop made here before is replaced. Same arguments, same bytes (with the same NumPy, scikit-learn and Pillow).

    Args:
        folder: to make; its files carry its name.
        n_items: at least 20.
        n_users: at least 1.
        progress: show a progress bar on stderr.

    Raises:
        ValueError: too few items or users.
        DatasetError: ``folder`` is there and holds something else.
    """
    from tqdm import tqdm

    if n_items < LONGEST or n_users < 1:
        raise ValueError(f"{n_items} items and {n_users} users, expected at least {LONGEST} and 1")
    folder = Path(folder).resolve()
    _refuse_foreign(folder)
    _clear_old_workshops(folder.parent)
    workshop = folder.parent / f".partial-{os.getpid()}"
    partial = workshop / folder.name
    try:
        (partial / "images").mkdir(parents=True)
        articles = make_articles(seed=seed, n_items=n_items)
        with tqdm(total=5, desc=f"{folder.name}: users", disable=not progress, leave=False) as bar:
            _write_tables(partial, articles, make_histories(articles, seed=seed, n_users=n_users))
            settings = {"made_by": MADE_BY, "seed": seed, "n_items": n_items, "n_users": n_users}
            files = {file: file_info(partial / file) for file in (f"{folder.name}.inter", f"{folder.name}.item")}
            Manifest(name=folder.name, files=files, settings=settings).save(partial)
            add_price_levels(partial, PriceSettings(n_levels=N_PRICE_LEVELS))
            _step(bar, f"{folder.name}: pictures")
            for article in articles:
                draw_picture(article, seed=seed).save(partial / article.picture)
            _step(bar, f"{folder.name}: text feature")
            make_feature(partial, "text", progress=False)
            _step(bar, f"{folder.name}: image feature")
            make_feature(partial, "image", progress=False)
            _step(bar, f"{folder.name}: pseudo features")
            for name in ("text_from_image", "image_from_text"):
                make_pseudo_feature(partial, name)
            _step(bar, folder.name)
        if folder.exists():
            folder.rename(workshop / "replaced")
        partial.rename(folder)
    finally:
        shutil.rmtree(workshop, ignore_errors=True)


def _step(bar: object, description: str) -> None:
    bar.update(1)
    bar.set_description(description)


def _refuse_foreign(folder: Path) -> None:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not folder.is_dir() or Manifest.load(folder).settings.get("made_by") != MADE_BY:
        raise DatasetError(
            f"{folder} is there already and was not made by this command; remove it, or choose another place with --out"
        )


def _clear_old_workshops(place: Path) -> None:
    """Remove what killed runs left behind; an hour old, because a younger one may be at work."""
    for workshop in place.glob(".partial-*"):
        if workshop.is_dir() and time.time() - workshop.stat().st_mtime > 3600:
            shutil.rmtree(workshop, ignore_errors=True)


def _write_tables(folder: Path, articles: list[Article], histories: list[list[tuple[float, Article]]]) -> None:
    rows = sorted(
        (moment, user, article.token) for user, history in enumerate(histories, start=1) for moment, article in history
    )
    write_table(
        folder / f"{folder.name}.inter",
        {
            "user_id:token": [f"u{user}" for _, user, _ in rows],
            "item_id:token": [token for _, _, token in rows],
            "timestamp:float": [moment for moment, _, _ in rows],
        },
    )
    write_table(
        folder / f"{folder.name}.item",
        {
            "item_id:token": [a.token for a in articles],
            "title:token_seq": [a.title for a in articles],
            "description:token_seq": [a.description for a in articles],
            "price:float": [a.price for a in articles],
            "categories:token_seq": [f"{a.department} {_KIND_NAMES[a.kind].replace(' ', '_')}" for a in articles],
            "image:token": [a.picture for a in articles],
        },
    )


# ---------------------------------------------------------------- articles


def make_articles(*, seed: int, n_items: int) -> list[Article]:
    """The catalogue, spread evenly over kinds and styles, in random order."""
    random = Random(f"articles {seed}")  # a text as seed gives the same numbers on every machine
    cells = [(kind, style) for kind in range(N_KINDS) for style in range(N_STYLES)]
    random.shuffle(cells)
    places = [(*cells[i % len(cells)], 1 / (i // len(cells) + 1)) for i in range(n_items)]
    random.shuffle(places)
    return [_article(f"i{i}", *place, random) for i, place in enumerate(places, start=1)]


def _article(token: str, kind: int, style: int, popularity: float, random: Random) -> Article:
    name, tier, colour = _KIND_NAMES[kind], random.randrange(3) + 1, random.choice(list(COLOURS))
    _, middle_price, use = KINDS[name]
    price = round(middle_price * TIER_FACTORS[tier - 1] * random.uniform(0.85, 1.15)) - 0.01
    words = list(STYLES.values())[style] if random.random() < STYLE_WORD_PROB else PLAIN_WORDS
    title = f"{random.choice(NAMES)} {name} in {colour}"
    look = random.choice(LOOKS).format(word=random.choice(words))
    rest = [use, f"Made of {random.choice(MATERIALS)}."]
    if random.random() < 0.4:
        rest.append(random.choice(CARES))
    random.shuffle(rest)
    description = " ".join([look, *rest])
    return Article(token, kind, style, popularity, tier, round(price, 2), colour, title, description)


def draw_picture(article: Article, *, seed: int, size: int = 48) -> Image:
    """RGB picture of an article: its style as background and texture, its colour as a shape."""
    from PIL import Image, ImageDraw

    random = Random(f"picture {seed} {article.token}")

    def near(colour: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(min(255, max(0, channel + random.randint(-10, 10))) for channel in colour)

    background, ink = (near(colour) for colour in PALETTES[article.style // 3])
    image = Image.new("RGB", (size, size), background)
    draw = ImageDraw.Draw(image)
    _draw_texture(draw, TEXTURES[article.style % 3], ink, size=size, random=random)
    width = random.randint(size * 3 // 8, size // 2)
    left, top = (random.randint(2, size - width - 2) for _ in range(2))
    box = (left, top, left + width, top + width)
    fill, form = near(COLOURS[article.colour]), random.choice(FORMS)
    if form == "disc":
        draw.ellipse(box, fill=fill)
    elif form == "square":
        draw.rectangle(box, fill=fill)
    elif form == "triangle":
        draw.polygon([(left, box[3]), (left + width // 2, top), (box[2], box[3])], fill=fill)
    else:
        draw.ellipse(box, outline=fill, width=width // 4)
    return image


def _draw_texture(draw: object, texture: str, ink: tuple[int, ...], *, size: int, random: Random) -> None:
    step, start = random.randint(7, 9), random.randint(-6, 0)
    if texture == "stripes":  # slanted, so that their edges have one direction
        for x in range(start - size, size, step):
            draw.line([(x, 0), (x + size, size)], fill=ink, width=2)
        return
    for column, x in enumerate(range(start, size, step)):
        for row, y in enumerate(range(start, size, step)):
            if texture == "dots":
                draw.ellipse((x + 2, y + 2, x + 5, y + 5), fill=ink)
            elif (column + row) % 2:
                draw.rectangle((x, y, x + step - 1, y + step - 1), fill=ink)


# ---------------------------------------------------------------- users


class Shelves:
    """Articles by kind and style, and by style."""

    def __init__(self, articles: Iterable[Article]) -> None:
        self.everything = list(articles)
        self.cells: dict[tuple[int, int], list[Article]] = {}
        self.styles: dict[int, list[Article]] = {}
        for article in self.everything:
            self.cells.setdefault((article.kind, article.style), []).append(article)
            self.styles.setdefault(article.style, []).append(article)


def make_histories(articles: list[Article], *, seed: int, n_users: int) -> list[list[tuple[float, Article]]]:
    """What each user bought: (time [unix seconds], article), in order of time."""
    shelves = Shelves(articles)
    return [_history(shelves, Random(f"user {seed} {user}")) for user in range(n_users)]


def _history(shelves: Shelves, random: Random) -> list[tuple[float, Article]]:
    liked = _liked_styles(random)
    tier, style, kind = random.randint(1, 3), liked[0], random.randrange(N_KINDS)
    length = min(LONGEST, SHORTEST + int(random.expovariate(1 / 4.7)))
    now = FIRST_DAY + random.randrange(N_DAYS * 86_400)
    history: list[tuple[float, Article]] = []
    bought: set[str] = set()
    for step in range(length):
        if step and random.random() < 0.5:
            now += random.randint(20, 110)  # the same visit
        elif step:
            now += int(86_400 * (1 + random.expovariate(1 / 10)))
        if random.random() < ASIDE_PROB:
            article = _draw(shelves.everything, bought, tier, random, popularity=False)
        else:
            if step:
                style, kind = _move(style, kind, liked, random)
            article = _draw(shelves.cells.get((kind, style), []), bought, tier, random)
            article = article or _draw(shelves.styles.get(style, []), bought, tier, random)
            article = article or _draw(shelves.everything, bought, tier, random)
        bought.add(article.token)
        history.append((float(now), article))
    return history


def _liked_styles(random: Random) -> list[int]:
    """One or two styles, the first ones of ``STYLES`` more often."""
    first, second = random.choices(range(N_STYLES), STYLE_WEIGHTS, k=2)
    return [first] if first == second or random.random() < 0.5 else [first, second]


def _move(style: int, kind: int, liked: list[int], random: Random) -> tuple[int, int]:
    """The walk's next style and kind."""
    if random.random() >= KEEP_STYLE_PROB:
        others = [other for other in (liked if len(liked) > 1 else range(N_STYLES)) if other != style]
        style = random.choice(others)
    return style, random.choices(_NEXT[kind], NEXT_KIND_PROBS)[0]


def _draw(
    shelf: list[Article], bought: set[str], tier: int, random: Random, *, popularity: bool = True
) -> Article | None:
    """An article not bought yet; None if there is none."""
    left = [article for article in shelf if article.token not in bought]
    if not left:
        return None
    if not popularity:
        return random.choice(left)
    return random.choices(left, [a.popularity * (SAME_TIER_WEIGHT if a.tier == tier else 1.0) for a in left])[0]


def step_probability(last: Article, article: Article, shelves: Shelves) -> float:
    """Probability that a user of unknown taste takes ``article`` after ``last``; the planted rule in closed form.

    Leaves out what needs the rest of the history: articles bought already, the liked styles, the tier, asides before.
    """
    aside = ASIDE_PROB / len(shelves.everything)
    if article.kind not in _NEXT[last.kind]:
        return aside
    same_style = KEEP_STYLE_PROB if article.style == last.style else (1 - KEEP_STYLE_PROB) / (N_STYLES - 1)
    kind = NEXT_KIND_PROBS[_NEXT[last.kind].index(article.kind)]
    share = article.popularity / math.fsum(a.popularity for a in shelves.cells[article.kind, article.style])
    return aside + (1 - ASIDE_PROB) * same_style * kind * share
