"""What sites ask crawlers to leave alone: robots.txt (RFC 9309) and the header X-Robots-Tag."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple
from urllib.parse import quote, unquote

ROBOT = "recbole-mm-pictures"  # how robots.txt may address us
USER_AGENT = f"{ROBOT}/1.0 (recbole_mm dataset_prep; pictures of products for research)"
REFUSING = {"noai", "noimageai"}  # directives of X-Robots-Tag that speak against learning from a picture
OTHER_ROBOT = re.compile(r"\s*([\w.-]+)\s*:\s*(.*)", re.DOTALL)
NOT_ROBOTS = {"unavailable_after", "max-snippet", "max-image-preview", "max-video-preview"}  # directives with a colon


class Rule(NamedTuple):
    """A line of robots.txt: whether paths that begin like this pattern may be taken."""

    allow: bool
    pattern: str


def header_refuses(values: Iterable[str]) -> bool:
    """Whether a response's X-Robots-Tag headers ask everybody, or us, not to learn from what they come with.

    A value may be meant for one robot, ``otherbot: noai``, and all that follows in it is then for that robot.
    """
    for value in values:
        while (match := OTHER_ROBOT.match(value)) and match[1].lower() not in NOT_ROBOTS:
            if match[1].lower() != ROBOT:
                value = ""
                break
            value = match[2]
        if REFUSING & {directive.strip().lower() for directive in value.split(",")}:
            return True
    return False


def read_robots(content: str) -> list[Rule]:
    """Rules of a robots.txt that concern us: of all groups that name us, else of those for ``*``."""
    groups: dict[str, list[Rule]] = {}
    agents: set[str] = set()
    in_rules = False
    for line in content.removeprefix("\ufeff").splitlines():
        key, colon, value = line.partition("#")[0].partition(":")
        key, value = key.strip().lower(), value.strip()
        if not colon:
            continue
        if key == "user-agent":
            agents = (set() if in_rules else agents) | ({value.lower()} & {ROBOT, "*"})
            in_rules = False
            groups |= {agent: [] for agent in agents - set(groups)}
        elif key in ("allow", "disallow"):
            in_rules = True
            for agent in agents:
                if value:
                    groups[agent].append(Rule(key == "allow", _normalised(value)))
    return groups.get(ROBOT, groups.get("*", []))


def robots_allow(rules: list[Rule], target: str) -> bool:
    """Whether a path with its query may be taken: the longest pattern that fits decides, allow wins a tie."""
    target = _normalised(target)
    fitting = [(len(rule.pattern), rule.allow) for rule in rules if _fits(rule.pattern, target)]
    return max(fitting)[1] if fitting else True


def _normalised(path: str) -> str:
    """One spelling for what may be percent-encoded or not."""
    return quote(unquote(path), safe="/*$?&=;:@!+,()'~-._")


def _fits(pattern: str, target: str) -> bool:
    """Whether ``target`` begins like ``pattern``, where ``*`` is any text and ``$`` at the end is the end."""
    whole = pattern.endswith("$")
    first, *others = pattern.removesuffix("$").split("*")
    if not target.startswith(first):
        return False
    at = len(first)
    if not others:
        return not whole or at == len(target)
    *middle, last = others
    for part in middle:  # the first place that fits leaves most room for the rest
        found = target.find(part, at)
        if found < 0:
            return False
        at = found + len(part)
    if whole:
        return target.endswith(last) and len(target) - len(last) >= at
    return target.find(last, at) >= 0
