"""Snapshots of repositories of the Hugging Face hub: the cached one, or a downloaded one.

`huggingface_hub` itself is imported only when one is asked for.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from imagemill.errors import InputError

LONGEST = 200
"""Characters of a failed download's reason that are told."""


def folder(repo: str, download: bool, snapshot: Callable[[str, bool], Path], gap_of: Callable[[Path], str]) -> Path:
    """The folder of the repository's snapshot: the cached one if it is complete, else a downloaded one.

    `snapshot(repo, offline)` takes what is wanted of it, `gap_of(folder)` names the first thing that a snapshot lacks.
    Raises `InputError` when it cannot be had.
    """
    from huggingface_hub import constants, errors

    cache = constants.HF_HUB_CACHE
    get = f"get it with `hf download {repo}`, or give a folder"
    try:
        found = snapshot(repo, True)
        gap = gap_of(found)
        state = f"in the cache {cache} it is incomplete (it lacks {gap})"
    except errors.HFValidationError as error:
        raise InputError(f"model {repo!r} is no name of a repository: {line(error)}") from error
    except errors.LocalEntryNotFoundError:
        gap, state = "everything", f"it is no folder, and not (or not wholly) in the cache {cache}"
    if not gap:
        return found
    if constants.HF_HUB_OFFLINE or not download:
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "none was asked for"
        raise InputError(f"model {repo!r}: {state}, and nothing is downloaded ({why}); {get}")
    try:
        with _told_once():
            return snapshot(repo, False)
    except errors.GatedRepoError as error:
        raise InputError(
            f"model {repo!r}: {state}, and the hub asks for consent first; accept its licence at "
            f"https://huggingface.co/{repo}, log in with `hf auth login`, then {get}"
        ) from error
    # RuntimeError is what the hub's transfer library raises when the network fails
    except (errors.HTTPError, errors.EntryNotFoundError, errors.XetDownloadError, OSError, RuntimeError) as error:
        raise InputError(f"model {repo!r}: {state}, and the download failed ({_why(error)}); {get}") from error


def line(error: BaseException) -> str:
    """An error in one line, not too long."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _why(error: BaseException) -> str:
    """The reason of a failed download in whole sentences, in the network's words where the hub's library hides them."""
    cause = error.__cause__ if isinstance(error, FileNotFoundError) and error.__cause__ is not None else error
    text = " ".join(str(cause).split()) or type(cause).__name__
    if len(text) > LONGEST:
        end = text.rfind(". ", 0, LONGEST)
        text = text[:end] if end > 0 else f"{text[:LONGEST].rsplit(' ', 1)[0]} ..."
    return text if text.endswith("...") else text.rstrip(".")


@contextmanager
def _told_once() -> Iterator[None]:
    """Of the warnings of the hub's library about a request that fails, two at each of its tries, one line is left."""
    log, told = logging.getLogger("huggingface_hub"), False

    def other(record: logging.LogRecord) -> bool:
        nonlocal told
        text = record.getMessage()
        if "thrown while requesting" not in text and not text.startswith("Retrying in"):
            return True
        if not told:
            told = True
            log.warning("the hub does not answer; it is asked again for half a minute")
        return False

    handlers = list(log.handlers)
    for handler in handlers:
        handler.addFilter(other)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(other)
