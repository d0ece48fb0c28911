"""MMSBR as its authors' released code computes it, to be measured beside `MMSBR` on the same data.

Written from a description of that code, not from the code. Differences from `MMSBR`, and their effect:

* **No features.** The code loads image, text and pseudo-features into trained tables, and its constructor ends by
  filling every parameter with uniform numbers in +-1/sqrt(D). What is trained are eight random vectors per item: four
  for the modalities, and four pivots. So no feature is read here, and the folder needs none.
* **LayerNorm starts random** for the same reason: gains are anything in +-1/8, and half of an item vector's dimensions
  start dead behind the ReLU.
* **Pivots are per item**: an ID embedding of 4 D numbers; an item that training has not seen has random ones.
* **Pivot attention is normalised over queries**, so that what a token receives is no average.
* **One LayerNorm serves both sub-layers** of a pivot layer, and another one all six roles of prices.
* **Contrastive loss**: sum over items and modalities of log10 of the hundred largest exp(dot products) minus that of
  the own pair, which may or may not be among them; weight 0.01, which for a mean of natural logarithms would be 37 at
  8,600 items. With features of real size it overflows; with random tables it does not.
* **Item vectors are never negative**, and a session is a weighted sum of them, compared with them without map or
  scale: an item is most like itself.
* **Score = interest (1 + distance)**: the further an item's price from the session's, the higher the score.
* **Item and session prices are made differently**: an item's is the bare sum of two table rows, a session's goes
  through LayerNorms, and its residual leaves the category out.
* **Dropout (0.6 and 0.2) ends with the first evaluation**: the code never switches training mode on again. Until then
  it also acts on the pivots before they are joined.

Kept out, because they are about the protocol and not the model: the epoch with the best test score is reported for each
metric, some test sessions count twice, and there is no validation set. Here a run selects on validation data.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recbole_mm.errors import SettingError
from recbole_mm.model.layers import Dropout
from recbole_mm.model.losses import largest_log_sum_exp
from recbole_mm.model.mmsbr import MMSBR
from recbole_mm.model.wasserstein import Gaussian, WassersteinAttention, positive, wasserstein_distances

ALLOWED = {
    "pivots": ("per_item",),
    "price_score": ("product_plus", "none"),
    "contrastive_anchors": (0,),
    "share_items": (False,),
}


def _alone(words: str, others: str) -> str:
    """A name with one of the words and none of the others."""
    return rf"(?!.*(?:{others})).*(?:{words})"


_TEXT, _IMAGE, _MADE = "text|txt|title", "image|img|pic|photo", "pseudo|fake|generated"
_PRICE, _SPREAD = "price|wasser|distance", "cov|var|spread|sigma|deviation"
_ONLY_TEXT, _ONLY_IMAGE = _alone(_TEXT, f"{_IMAGE}|{_MADE}"), _alone(_IMAGE, f"{_TEXT}|{_MADE}")
_MEAN_PRICE = rf"(?=.*(?:{_PRICE})){_alone('mean|mu', _SPREAD)}"
_SPREAD_PRICE = rf"(?=.*(?:{_PRICE})).*(?:{_SPREAD})"


class MMSBRReleased(MMSBR):
    """What the release computes, forward pass and losses; at the speed of `MMSBR`. And how to read its checkpoints
    (`recbole_mm.released_weights`).

    Raises:
        SettingError: as `MMSBR`, and for a setting that would change nothing here, see ``ALLOWED``.
    """

    def __init__(self, config, dataset) -> None:
        for key, allowed in ALLOWED.items():
            if (value := config[key]) not in allowed:
                listed = " or ".join(map(str, allowed))
                raise SettingError(f"{key} must be {listed} in MMSBRReleased, found {value!r}; MMSBR takes others")
        super().__init__(config, dataset)
        bound = 1 / math.sqrt(self.width)
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -bound, bound)
        self.register_buffer("evaluated", torch.zeros((), dtype=torch.bool))  # saved, so that a resumed run knows

    # ------------------------------------------------ parts

    def _find_features(self, config, dataset, wanted: dict, pseudo: dict) -> tuple[dict, dict]:
        return dict.fromkeys(wanted), dict.fromkeys(pseudo)

    def _build_features(self, config, dataset) -> None:
        names = [*self.streams, *(f"pseudo_{modality}" for modality in self.pairs)]
        self.tables = nn.ParameterDict({name: torch.empty(self.n_items, self.width) for name in names})

    def _build_pivots(self, config) -> None:
        self.use_pivots = True
        self.pivots = nn.Parameter(torch.empty(self.n_items, config["n_pivots"], self.width))
        self.transformer = self._transformer(config, softmax_over="queries", shared_norm=True)

    def _build_fusion(self, config) -> None:
        first, second = nn.Linear(config["n_pivots"] * self.width, self.width), nn.Linear(self.width, self.width)
        dropout = Dropout(config["fusion_dropout"])
        self.fusion = nn.Sequential(dropout, first, nn.ReLU(), dropout, second, nn.ReLU(), dropout)

    def _build_prices(self, config) -> None:
        n_levels, n_categories = (int(ids.max()) + 1 for ids in self.price_pairs)
        self.price_mean, self.price_spread = (nn.Embedding(n_levels, self.width) for _ in range(2))
        self.category = nn.Embedding(n_categories, self.width)
        self.price_norm = nn.LayerNorm(self.width, eps=1e-12)
        self.price_attention = WassersteinAttention(
            width=self.width, n_heads=config["n_heads"], dropout=config["price_dropout"]
        )
        self.price_attention.mean_norm = self.price_attention.spread_norm = self.price_norm
        self.price_dropout = Dropout(config["price_dropout"])

    # ------------------------------------------------ items

    def _projected(self) -> dict[str, Tensor]:
        return dict(self.tables.items())

    def _pivots(self) -> Tensor:
        return self.pivots

    def _prices(self) -> tuple[Gaussian, tuple[Tensor, Tensor]]:
        levels, categories = self.price_pairs
        mean, spread, category = self.price_mean(levels), self.price_spread(levels), self.category(categories)
        normed = self.price_norm(category)
        in_sessions = (self.price_norm(mean) + normed, self.price_norm(spread) + normed)  # [U, D] each
        return Gaussian(mean + category, positive(spread + category)), in_sessions

    # ------------------------------------------------ scores

    def _wanted(self, sequence: Tensor, item_seq_len: Tensor) -> Tensor:
        return self.interest(sequence, item_seq_len)

    def _session_price(
        self, in_sessions: tuple[Tensor, Tensor], pair: Tensor, last: Tensor, valid: Tensor, known: Tensor
    ) -> Gaussian:
        mean, spread = (self.price_dropout(F.embedding(pair, rows)) for rows in in_sessions)  # [B, L, D] each
        level = self.price_pairs[0, pair.gather(1, last.unsqueeze(1)).squeeze(1)]  # [B]
        residual = (self.price_mean(level), self.price_spread(level))
        return self.price_attention(mean, spread, valid, last, residual)

    def _price_distances(self, prices: Gaussian, session: Gaussian, has_price: Tensor) -> Tensor:
        return wasserstein_distances(prices, session)  # [U, B]

    def _with_price(self, interest: Tensor, distance: Tensor) -> Tensor:
        return interest * (1 + distance)

    # ------------------------------------------------ the contrastive loss

    def _contrast(self, projected: dict[str, Tensor], modality: str) -> Tensor:
        real, generated = projected[modality][1:], projected[f"pseudo_{modality}"][1:]  # without padding
        scale = 1 / self.contrastive_temperature
        hardest = largest_log_sum_exp(real, generated, self.n_negatives, scale=scale)
        return (hardest - scale * (real * generated).sum(1)).sum() / math.log(10)

    # ------------------------------------------------ dropout, in the first epoch only

    def train(self, mode: bool = True):
        if not mode:
            self.evaluated.fill_(True)
        super().train(mode and not self.evaluated)
        self._cached_tower = None
        return self

    # ------------------------------------------------ for recbole_mm.released_weights

    # Their names are not known, only roles and shapes. A user has to say, with --names:
    # - transformer.*: layers in the order of their turns, in each round text before image; of each, query, key, value
    # - price_attention.*_qkv.weight: query, key, value
    # - which pseudo-modality is which, and whatever else one word does not tell.
    released_names = {
        r"tables\.text": rf"{_ONLY_TEXT}.*",
        r"tables\.image": rf"{_ONLY_IMAGE}.*",
        r"tables\.pseudo_\w+": rf"(?=.*(?:{_TEXT})).*(?:{_IMAGE}).*|.*(?:{_MADE}).*",
        r"pivots": r".*pivot.*",
        r"sequences\.text\.first\.(weight|bias)": rf"{_ONLY_TEXT}.*\1",
        r"sequences\.text\.second_(weight|bias)": rf"{_ONLY_TEXT}.*\1.T",
        r"sequences\.image\.first\.(weight|bias)": rf"{_ONLY_IMAGE}.*\1",
        r"sequences\.image\.second_(weight|bias)": rf"{_ONLY_IMAGE}.*\1.T",
        r"transformer\.qkv_(weight|bias)": rf"{_alone('query|key|value', _PRICE)}.*\1 ?",
        r"transformer\.out_(weight)": rf"{_alone('out|dense', _PRICE)}.*\1 ?",
        r"transformer\.(?:inner|outer|norm)_(weight|bias)": rf"{_alone('', _PRICE)}.*\1 ?",
        r"fusion\.\d\.(weight|bias)": r".*fus.*\1",
        r"interest\.weight\.(weight|bias)": rf"{_alone('', _PRICE)}.*\1",  # the only map to a single number
        r"interest\.\w+\.(weight|bias)": r".*(?:interest|session|soft|glu).*\1",
        r"price_mean\.weight": rf"{_MEAN_PRICE}.*",
        r"price_spread\.weight": rf"{_SPREAD_PRICE}.*",
        r"category\.weight": r".*cat.*",
        r"price_norm\.(weight|bias)": rf".*(?:{_PRICE}).*norm.*\1",
        r"price_attention\.mean_qkv\.(weight|bias)": rf"{_MEAN_PRICE}.*(?:query|key|value).*\1 ?",
        r"price_attention\.spread_qkv\.(weight|bias)": rf"{_SPREAD_PRICE}.*(?:query|key|value).*\1 ?",
        r"price_attention\.mean_out\.(weight|bias)": rf"{_MEAN_PRICE}.*(?:out|dense).*\1",
        r"price_attention\.spread_out\.(weight|bias)": rf"{_SPREAD_PRICE}.*(?:out|dense).*\1",
    }
    released_dropped = {
        r".*pos.*": "positions, which are never added",
        r".*(?:hyper|star).*": "never called",
        r"(?:item|id)_?(?:table|emb\w*)\.weight": "the ID table, which no score uses",
    }
    released_rows = {
        **{f"tables.{name}": "item" for name in ("text", "image", "pseudo_text", "pseudo_image")},
        **{"pivots": "item", "category.weight": "category"},
        **{"price_mean.weight": "price_level", "price_spread.weight": "price_level"},
    }
