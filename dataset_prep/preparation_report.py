"""What became of a source, for people and for the manifest."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dataset_prep.cleaning import COLUMNS, ItemCounts, Step
from dataset_prep.preparation_settings import PreparationSettings
from dataset_prep.price import PriceReport
from dataset_prep.protocols import dates_of
from recbole_mm.data.cuts import Cuts

REJECTED_FILE = "rejected.tsv.gz"
NOTES = {
    "leave-one-out": (
        "of each user, the last interaction is the test and the last but one validation; these lie at different times, "
        "so that training sees what is the future for other users"
    ),
    "time": "one moment parts training from validation and one validation from test, for all users",
    "sessions": "sessions are split whole",
}


@dataclass(frozen=True)
class PreparationReport:
    """What became of a source: ``n_read`` is ``n_interactions`` and what all ``steps`` dropped.

    Attributes:
        settings: as given.
        source: as the source describes itself.
        n_read: interactions that were read, with those set aside.
        steps: what was dropped, in order.
        n_users, n_items, n_interactions: that are left; with sessions, users before these are filtered.
        n_duplicates: interactions equal to an earlier one in user, item and time, whether kept or not.
        equal_times: share of neighbours in a history or session at the same time, whose order is that of the source.
        items: what is known of the items.
        rejected: unusable rows, by file and reason.
        fixed: what the source mended without losing a row.
        parts: of each part, the number of users or sessions, interactions, rows and different items; empty for
            leave-one-out.
        cuts: between the parts, if there are any.
        n_cold: interactions of validation and test with items that training has not.
        cold_items, n_drawn: items that training has not and that are kept; of them, taken out of it on purpose.
        prices: what became of the prices.
        remarks: further things to know.
    """

    settings: PreparationSettings
    source: dict[str, Any]
    n_read: int
    steps: tuple[Step, ...]
    n_users: int
    n_items: int
    n_interactions: int
    n_duplicates: int
    equal_times: float
    items: ItemCounts
    rejected: dict[str, dict[str, int]]
    fixed: dict[str, int]
    parts: dict[str, dict[str, int]] = field(default_factory=dict)
    cuts: Cuts | None = None
    n_cold: dict[str, int] = field(default_factory=dict)
    cold_items: tuple[str, ...] = ()
    n_drawn: int = 0
    prices: PriceReport | None = None
    remarks: tuple[str, ...] = ()

    def as_settings(self) -> dict[str, Any]:
        """For the manifest: settings, source, cut points and all counts."""
        counts = {name: getattr(self, name) for name in ("n_read", "n_users", "n_items", "n_interactions")}
        dropped, items_dropped = {}, {}
        for step in self.steps:
            dropped[step.reason] = dropped.get(step.reason, 0) + step.interactions
            if step.items:
                items_dropped[step.reason] = items_dropped.get(step.reason, 0) + step.items
        counts |= {"dropped": dropped, "items_dropped": items_dropped}
        counts |= {"n_duplicates": self.n_duplicates, "equal_times": self.equal_times}
        counts["n_items_with_metadata"] = self.items.n_rows
        counts["items_with"] = self.items.columns
        counts["cleaned"] = {f"{name}: fields with entities, tags, ...": n for name, n in self.items.changed.items()}
        counts["no_price"] = self.items.no_price
        counts["rejected"] = {f"{file}: {why}": n for file, all in self.rejected.items() for why, n in all.items()}
        counts["fixed"] = self.fixed
        counts |= {"parts": self.parts} if self.parts else {}
        counts["cold"] = self.n_cold
        if self.cold_items:
            counts |= {"n_cold_items": len(self.cold_items), "n_drawn_cold_items": self.n_drawn}
        made = {"made_by": "preparation", **self.settings.that_apply(), "protocol_note": NOTES[self.settings.protocol]}
        made |= {"source": self.source, "counts": counts, "remarks": list(self.remarks)}
        made |= {"cuts": self.cuts._asdict()} if self.cuts else {}
        return made | ({"prices": self.prices.as_settings()} if self.prices else {})

    def __str__(self) -> str:
        n_dropped = self.n_read - self.n_interactions
        n_sessions = sum(part.get("sessions", 0) for part in self.parts.values())
        owners = f"{n_sessions:,} sessions" if n_sessions else f"{self.n_users:,} users"
        lines = [
            f"{self.n_read:,} interactions read, {self.n_interactions:,} kept, {n_dropped:,} dropped",
            *(
                f"  {step.interactions:,} dropped: {step.reason}" + (f" ({step.items:,} items)" if step.items else "")
                for step in self.steps
            ),
            f"{owners}, {self.n_items:,} items, {self.n_interactions:,} interactions",
            f"protocol {self.settings.protocol}: {NOTES[self.settings.protocol]}",
        ]
        for name, part in self.parts.items():
            cold = f", {self.n_cold[name]:,} interactions with cold items" if self.n_cold.get(name) else ""
            lines.append(f"  {name}: " + ", ".join(f"{n:,} {what}" for what, n in part.items()) + cold)
        if self.cuts:
            lines.append(f"  {dates_of(self.cuts)}")
        if self.cold_items:
            drawn = f", {self.n_drawn:,} of them taken out of it" if self.n_drawn else ""
            lines.append(f"  cold items: {len(self.cold_items):,} that training has not{drawn}")
        found = self.items
        lines.append(
            f"metadata of {found.n_rows:,} of {found.n:,} items" if found.n_rows else "no metadata of the items"
        )
        lines += [f"  {name}: {n:,} ({n / found.n:.1%})" for name, n in found.columns.items() if name in COLUMNS]
        if further := [f"{name} ({n:,})" for name, n in found.columns.items() if name not in COLUMNS]:
            lines.append(f"  further columns: {', '.join(further)}")
        if found.no_price and (found.columns.get("price") or set(found.no_price) != {"empty"}):
            lines.append("  no price: " + ", ".join(f"{n:,} {why}" for why, n in found.no_price.items()))
        if found.changed:
            listed = ", ".join(f"{n:,} {name}" for name, n in found.changed.items())
            lines.append(f"  entities, tags and control characters removed from: {listed}")
        for file, reasons in self.rejected.items():
            listed = ", ".join(f"{n:,} {why}" for why, n in reasons.items())
            lines.append(f"rows set aside of {file}: {listed}; see {REJECTED_FILE}")
        lines += [f"mended in the source: {n:,} {what}" for what, n in self.fixed.items()]
        lines += [str(self.prices)] if self.prices else []
        return "\n".join(lines + [f"remark: {remark}" for remark in self.remarks])
