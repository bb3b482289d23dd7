"""Byte-pair merges for small tokenizers: the same list on every machine."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise


def byte_letters() -> dict[int, str]:
    """The printable letter that stands for each byte in byte-level BPE (Radford et al. 2019, GPT-2)."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {byte: chr(byte) for byte in plain} | {byte: chr(256 + place) for place, byte in enumerate(rest)}


def learn_merges(alphabet: dict[int, str], texts: Counter[str], count: int) -> list[tuple[str, str]]:
    """Byte-pair merges, most frequent pair first, ties by the pair itself: the same list on every machine."""
    spelt = [([alphabet[byte] for byte in text.encode()], weight) for text, weight in texts.items()]
    merges: list[tuple[str, str]] = []
    while len(merges) < count:
        pairs: Counter[tuple[str, str]] = Counter()
        for letters, weight in spelt:
            for pair in pairwise(letters):
                pairs[pair] += weight
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for letters, _ in spelt:
            join(letters, best)
    return merges


def join(letters: list[str], pair: tuple[str, str]) -> None:
    """Replace each occurrence of the pair by its concatenation, in place."""
    place = 0
    while place < len(letters) - 1:
        if (letters[place], letters[place + 1]) == pair:
            letters[place : place + 2] = ["".join(pair)]
        place += 1
