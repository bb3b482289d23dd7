"""Judges by name: what `judge:…` means, what it is asked with, and how many tasks it takes at once.

    judge:reference           PSNR, SSIM and L1 of an edit against a target picture; no model
    judge:preservation        the same against the source
    judge:vlm:FOLDER|REPO     an image-text-to-text model of transformers
    judge:openai:MODEL        any OpenAI-compatible endpoint
    judge:fake                no model: scripted answers

All but `vlm` and `fake` do without a GPU.
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from imagemill import vision_language
from imagemill.config.settings import JudgeSettings
from imagemill.errors import InputError
from imagemill.records import ModelSpec

PREFIX = "judge:"
KNOWN = "judge:reference, judge:preservation, judge:vlm:FOLDER|REPO, judge:openai:MODEL"
METRICS = "metrics 1"
"""Part of the revision of judges without a model. Counted up when the same pictures would give other figures."""

FAMILY = "judge"
MAX_BATCH = 16
"""How many tasks a vision-language model is handed at once where no batch size is given; it takes them in turns that fit
into its memory."""

MAX_GPU_BATCH = 64
"""The same on a GPU: a token costs the host as much time for one task as for many."""

METRICS_BATCH = 4
WAVES = 2
"""An endpoint gets this many times `concurrency` tasks at once, so that it seldom waits for the slowest of them."""

Options: TypeAlias = Mapping[str, str | int | float | bool]
ON_CPU = ("judge_reference", "judge_preservation", "judge_openai")
"""Runners that need no GPU."""

REACH_SECONDS = 10.0

ANSWERS_HANG_ON = ("model", "pixels", "max_new_tokens")
"""The options that answers depend on. How many are asked at once, where and with which key makes no other judge."""


def is_judge(name: str) -> bool:
    """Whether the name is that of a judge."""
    return name.startswith(PREFIX)


def product(names: Iterable[str], both: str) -> str:
    """What a task of these models gives: `picture`, `judgment`, or `both` where some give this and some that."""
    return {frozenset({True}): "judgment", frozenset({True, False}): both}.get(
        frozenset(map(is_judge, names)), "picture"
    )


def resolve(name: str, settings: JudgeSettings, *, dtype: str, download: bool) -> ModelSpec:
    """The judge that a name means. Raises `InputError` when there is no such judge, or it cannot be had."""
    kind, colon, argument = name.removeprefix(PREFIX).partition(":")
    limits = {"pixels": settings.pixels, "max_new_tokens": settings.max_new_tokens}
    match (kind, bool(colon), argument.strip()):
        case ("reference" | "preservation", False, _):
            return _spec(name, kind, f"{name}/{METRICS}", {})
        case ("fake", False, _):
            return ModelSpec(name, "", "fake", FAMILY, _revision(name, limits), options=limits)
        case ("vlm", _, model) if model:
            folder = vision_language.locate(name, model, download)
            content = f"judge:vlm/{vision_language.revision_of(folder)}/{dtype}"
            spec = _spec(name, kind, content, limits | {"batch_size": settings.batch_size or 0})
            return replace(spec, folder=str(folder), dtype=dtype, memory=vision_language.memory(folder))
        case ("openai", _, model) if model:
            return _spec(name, kind, "judge:openai", limits | _endpoint(name, model, settings))
    raise InputError(f"model {name!r} is no judge; known: {KNOWN}")


def check_endpoint(spec: ModelSpec) -> None:
    """Raises `InputError` when a judge's endpoint takes no connection: better now than after hours of editing.

    Behind a proxy nothing is tried, and nothing is sent: whether the model is there, the first question tells.
    """
    address = spec.options.get("base_url")
    place = urlsplit(str(address or ""))
    host = place.hostname or ""
    if address is None or (place.scheme in getproxies() and not proxy_bypass(host)):
        return
    try:
        socket.create_connection((host, place.port or (443 if place.scheme == "https" else 80)), REACH_SECONDS).close()
    except OSError as error:
        raise InputError(
            f"the judge's endpoint {address} takes no connection ({error.strerror or error}); "
            "start it, or correct base_url"
        ) from error


def _endpoint(name: str, model: str, settings: JudgeSettings) -> dict[str, str | int | float | bool]:
    if settings.base_url is None:
        raise InputError(
            f"model {name!r}: where its endpoint is, is not known; give judge.base_url, such as http://localhost:8000/v1"
        )
    return {
        "model": model,
        "base_url": settings.base_url,
        "api_key_env": settings.api_key_env,
        "concurrency": settings.concurrency,
        "timeout": settings.timeout,
    }


def _spec(name: str, kind: str, made_of: str, options: Options) -> ModelSpec:
    return ModelSpec(name, "", f"judge_{kind}", FAMILY, _revision(made_of, options), options=options)


def _revision(made_of: str, options: Options) -> str:
    asked = {key: options[key] for key in ANSWERS_HANG_ON if key in options}
    return f"{made_of}/{json.dumps(asked, sort_keys=True)}" if asked else made_of


def batch(spec: ModelSpec, settings: JudgeSettings, on_cuda: bool = False, share: int = MAX_BATCH) -> int:
    """How many tasks a worker is handed at once; `share` is what of all tasks is its part."""
    match spec.runner:
        case "judge_openai":
            return settings.concurrency * WAVES
        case "judge_vlm":
            return settings.batch_size or (max(1, min(share, MAX_GPU_BATCH)) if on_cuda else MAX_BATCH)
        case "fake":
            return settings.batch_size or 1
    return settings.batch_size or METRICS_BATCH


def on_cpu(specs: Sequence[ModelSpec]) -> bool:
    """Whether these are judges that need no GPU."""
    return all(spec.runner in ON_CPU for spec in specs)


def asks_endpoint(specs: Sequence[ModelSpec]) -> bool:
    """Whether one of these judges asks an endpoint. One worker does: `concurrency` bounds the requests of the whole run."""
    return any(spec.runner == "judge_openai" for spec in specs)


def spreads(specs: Sequence[ModelSpec]) -> bool:
    """Whether each of these can be cut into layers and spread over several GPUs."""
    return all(spec.runner == "judge_vlm" for spec in specs)
