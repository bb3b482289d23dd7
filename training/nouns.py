"""The nouns that the embedded models know, as `nouns.yaml` lists them, and how English writes them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

FILE = Path(__file__).with_name("nouns.yaml")


@dataclass(frozen=True, slots=True)
class Noun:
    """One thing: `name` and `also` are singular; `countable` is False for what has no "two of them" (grapes, jeans)."""

    name: str
    plural: str
    article: str
    countable: bool
    also: tuple[str, ...]


def plural(noun: str) -> str:
    """English's rule: -es after s, x, z, ch, sh; consonant and y become -ies; else -s."""
    if noun.endswith(("s", "x", "z", "ch", "sh")):
        return noun + "es"
    if noun.endswith("y") and noun[-2:-1] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + "s"


def article(phrase: str) -> str:
    """`an` before a vowel letter, else `a`."""
    return "an" if phrase[:1].lower() in "aeiou" else "a"


def load_nouns(path: Path = FILE) -> list[Noun]:
    """All nouns, in the order of the file, which is also the order of the sprites."""
    return [
        Noun(
            name=entry["noun"],
            plural=entry.get("plural") or plural(entry["noun"]),
            article=entry.get("article", article(entry["noun"])),
            countable=entry.get("countable", True),
            also=tuple(entry.get("also", ())),
        )
        for entry in yaml.safe_load(path.read_text("utf-8"))
    ]
