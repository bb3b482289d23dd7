"""Benchmark formats: files of local disks as items. Each is one file, found by its name, that exposes `FORMAT`.

Files whose names begin with `_` are parts that formats share. A file is read twice: once for its list of items, from
which categories and the limit choose, and once for the pictures of the chosen ones, so that `--limit 10` of a benchmark
of gigabytes keeps ten pictures.
"""

from __future__ import annotations

import difflib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache as cached
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Protocol

from imagemill.errors import InputError, TaskFileError
from imagemill.remarks import unknown
from imagemill.scoring.item import Item
from imagemill.sources.columns import meant
from imagemill.staging import SHOWN

if TYPE_CHECKING:
    from imagemill.scoring.benchmarks._row import Row

LANGUAGES = ("en", "zh", "intersection", "zh-intersection")
"""What `lang` may be; the last two are GEdit-Bench's items that every model of its paper answered."""

ALIASES = {"cn": "zh", "en-intersection": "intersection", "cn-intersection": "zh-intersection"}
"""Other names of languages: GEdit-Bench calls Chinese `cn`."""


class RowError(InputError):
    """What is wrong with a row: `place` is the file and the row, `problem` the field and the mend."""

    def __init__(self, place: str, problem: str) -> None:
        self.place = place
        self.problem = problem
        super().__init__(f"{place}: {problem}")


class UnreachableError(RowError):
    """A picture whose address gave none. It ends the reading, since the next ones may well wait as long."""


@dataclass(frozen=True, slots=True)
class Options:
    """How a benchmark is read.

    With `only` of None it is listed: every item, without its pictures (their paths are empty, their files not looked
    for). Else only the items of these ids are read, with their pictures; those inside the file are kept in `cache`, and
    those at an address of the web are what `fetch` makes of it, a path. Without `fetch` addresses are refused.
    """

    lang: str
    cache: Path
    only: frozenset[str] | None = None
    fetch: Callable[[str], str] | None = None

    @property
    def listing(self) -> bool:
        """True when no picture is wanted."""
        return self.only is None

    def skips(self, item: str) -> bool:
        """True for an item that is not wanted."""
        return self.only is not None and item not in self.only


class Format(Protocol):
    """One way to lay a benchmark out. `name` is what messages call it; `languages` are those of `LANGUAGES` it has; `fields`
    are the names that people write by hand, empty where files come as they are published."""

    name: str
    languages: tuple[str, ...]
    fields: tuple[str, ...]

    def recognises(self, path: Path) -> bool:
        """True when the file or folder is of this format, by its name and its beginning. `path` exists."""

    def rows(self, path: Path, options: Options) -> Iterable[Row]:
        """The rows in the order of the file. What is wrong with the whole file is raised as `InputError`."""

    def key(self, row: Row, options: Options) -> str | None:
        """The id of a row's item; None for a row that is not of the language. Raises `RowError`, as `item` does."""

    def item(self, row: Row, key: str, options: Options) -> Item:
        """The item of a row that is wanted."""


@cached
def formats() -> Mapping[str, Format]:
    """Every format by the name of its file."""
    names = [module.name for module in iter_modules(__path__) if not module.name.startswith("_")]
    return {name: import_module(f"{__name__}.{name}").FORMAT for name in names}


def language(text: str) -> str:
    """The language under its one name. Raises `InputError` for one that no format has."""
    name = ALIASES.get(text, text)
    if name not in LANGUAGES:
        raise InputError(f"{text!r} is no language of a benchmark; known: {', '.join(LANGUAGES)}")
    return name


def read_benchmark(
    path: str | os.PathLike[str],
    *,
    lang: str = "en",
    categories: Sequence[str] = (),
    limit: int | None = None,
    cache: Path,
    fetch: Callable[[str], str] | None = None,
) -> list[Item]:
    """The items of a benchmark file or folder, in its order; pictures inside the file are kept in the folder `cache`, those
    at an address are got by `fetch`.

    `categories` takes the items of these, by their exact names. `limit` takes so many, spread evenly: one of each
    category in turn, in the order in which the categories first appear, each time its next in the file. So the choice
    depends on the file alone, and a smaller limit takes a part of what a larger one takes.

    Raises `InputError` for a path that is no benchmark, for bad rows and pictures of chosen items that are not there (the
    first `SHOWN`, a line each), an id that is there twice, and a category or language that the benchmark does not have;
    `OutputError` when `cache` cannot be written.
    """
    place, cache = (Path(os.path.abspath(os.path.expanduser(one))) for one in (path, cache))
    chosen_lang = language(lang)
    found = _format_of(place)
    if chosen_lang not in found.languages:
        raise InputError(f"{place}: has no language {lang!r}; {found.name} is read in {', '.join(found.languages)}")
    listed = _all(found, place, Options(chosen_lang, cache))
    if not listed:
        raise InputError(f"{place}: holds no item in the language {lang!r}; check the file, or choose another language")
    twice, count = Counter(item.id for item in listed).most_common(1)[0]
    if count > 1:
        raise InputError(f"{place}: the id {twice!r} is there {count} times; give each item its own")
    only = frozenset(item.id for item in select(listed, categories, limit, str(place)))
    return _all(found, place, Options(chosen_lang, cache, only, fetch))


def _all(found: Format, place: Path, options: Options) -> list[Item]:
    """The items of the rows that are wanted, up to the last of them. Raises `TaskFileError` for all rows that are refused."""
    items: list[Item] = []
    # Not the errors themselves: they would hold on to the rows, which may have their pictures in them.
    refused: list[tuple[str, str]] = []
    for row in found.rows(place, options):
        try:
            key = found.key(row, options)
            if key is not None and not options.skips(key):
                items.append(found.item(row, key, options))
        except UnreachableError:
            raise
        except RowError as error:
            refused.append((error.place, error.problem))
        if options.only is not None and len(items) == len(options.only):
            break
    if refused:
        raise _refusal(refused, whole=not items)
    return items


def _refusal(refused: Sequence[tuple[str, str]], *, whole: bool) -> TaskFileError:
    """A line for each bad row; one for all of them where the whole benchmark has the same problem."""
    lines = [f"{place}: {problem}" for place, problem in refused[:SHOWN]]
    if whole and len(refused) > 1 and len({problem for _, problem in refused}) == 1:
        return TaskFileError([f"{lines[0]} (so it is in all {len(refused)} rows)"], 1)
    return TaskFileError(lines, len(refused))


def unknown_fields(path: str | os.PathLike[str], items: Iterable[Item]) -> tuple[str, ...]:
    """A line for each field of the benchmark's items that became metadata and is nearly a known one."""
    known = _format_of(Path(os.path.abspath(os.path.expanduser(path)))).fields
    names = dict.fromkeys(name for item in items for name in item.metadata)
    return unknown([name for name in names if meant(name, known)], known)


def select(
    items: Sequence[Item], categories: Sequence[str] = (), limit: int | None = None, place: str = "benchmark"
) -> list[Item]:
    """The chosen items in their own order; see `read_benchmark`. Raises `InputError` for an unknown category."""
    counts = Counter(item.category for item in items)
    for name in categories:
        if name not in counts:
            near = difflib.get_close_matches(name, counts, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            there = ", ".join(f"{category} ({count})" for category, count in counts.items())
            raise InputError(f"{place}: has no category {name!r}; {hint}its categories are {there}")
    kept = [item for item in items if not categories or item.category in categories]
    if limit is None or limit >= len(kept):
        return kept
    if limit < 1:
        raise InputError(f"limit: {limit} is out of range; it must be >= 1")
    ranks: Counter[str] = Counter()
    turns = []
    for index, item in enumerate(kept):
        turns.append((ranks[item.category], list(counts).index(item.category), index))
        ranks[item.category] += 1
    return [kept[index] for index in sorted(index for *_, index in sorted(turns)[:limit])]


def _format_of(path: Path) -> Format:
    if not path.exists():
        raise InputError(f"{path}: there is no such benchmark; check the path (only local files are read)")
    for found in formats().values():
        if found.recognises(path):
            return found
    names = ", ".join(found.name for found in formats().values())
    raise InputError(f"{path}: is no benchmark that imagemill reads; it reads {names}")
