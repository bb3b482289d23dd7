"""The YAML file, and what stands above it on the command line."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

from imagemill.config.settings import Settings
from imagemill.config.wording import field_path, message, shown
from imagemill.errors import ConfigError, InputError
from imagemill.inputs import lora_path

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

MAX_FILE = 2**20
"""Bytes; a longer YAML file is no settings file."""

MAX_KEYS = 10_000
"""Keys of one mapping after merges (`<<`)."""


OF_EVALUATIONS = ("bench", "edit", "rubric", "benchmark", "diffusion_model", "reward_model")
"""Keys at the top of an evaluation's settings, in this form and in the older one, that a run does not know."""


def load_settings(path: str | os.PathLike[str]) -> Settings:
    """The settings of a YAML file; paths of LoRAs are relative to its folder.

    Raises `ConfigError` with one line for each mistake: file, line or field path, value, mend.
    """
    place = Path(path)
    data = read_yaml(place)
    if data is None:
        data = {}
    if not isinstance(data, dict):
        raise ConfigError(f"{place}: holds no settings; write lines such as 'steps: 8'")
    if found := [key for key in OF_EVALUATIONS if key in data]:
        raise ConfigError(
            f"{place}: {found[0]}: is a key of an evaluation's settings; give them to `imagemill eval {place}`"
        )
    return _local_loras(_validated(_named(data, place), f"{place}: ", {}), place.parent, f"{place}: loras")


def merge(settings: Settings, overrides: Mapping[str, Any], options: Mapping[str, str] | None = None) -> Settings:
    """The settings with every override that is not `None` put in; its paths are relative to the current folder.

    Keys are dotted (`output.format`); `options` maps them to the names that errors use (`--format`). A choice of GPUs
    replaces the other kind of choice. Raises `ConfigError`.
    """
    data = _given(settings)
    chosen = {key: value for key, value in overrides.items() if value is not None}
    for key, value in chosen.items():
        *sections, name = key.split(".")
        target = data
        for section in sections:
            target = target.setdefault(section, {})
        target[name] = value
    for key, displaced in (("devices.gpu_ids", "gpus"), ("devices.gpus", "gpu_ids")):
        if key in chosen and f"devices.{displaced}" not in chosen:
            data["devices"].pop(displaced, None)
    merged = _validated(data, "", options or {})
    return _local_loras(merged, None, (options or {}).get("loras", "loras")) if "loras" in chosen else merged


def _given(section: BaseModel) -> dict[str, Any]:
    """What was set in a section, as mappings of values."""
    values = {name: getattr(section, name) for name in section.model_fields_set}
    return {name: _given(value) if isinstance(value, BaseModel) else value for name, value in values.items()}


def _named(data: dict[Any, Any], place: Path) -> dict[str, Any]:
    """The data with `guidance_scale` under its short name. Raises `ConfigError` when both are there."""
    if "guidance_scale" not in data:
        return data
    if "guidance" in data:
        raise ConfigError(f"{place}: guidance_scale: is another name of guidance, which is there too; keep one of them")
    return {("guidance" if key == "guidance_scale" else key): value for key, value in data.items()}


def _local_loras(settings: Settings, base: Path | None, place: str) -> Settings:
    try:
        loras = tuple(replace(lora, path=lora_path(lora.path, base)) for lora in settings.loras)
    except InputError as error:
        raise ConfigError(f"{place}: {error}") from error
    return settings.model_copy(update={"loras": loras}) if settings.loras else settings


def _validated(data: Mapping[str, Any], prefix: str, options: Mapping[str, str]) -> Settings:
    """The settings that the data hold. pydantic's errors become lines that name the field or the option."""
    try:
        return Settings.model_validate(data)
    except ValidationError as error:
        lines = [prefix + _line(details, options) for details in error.errors()]
        raise ConfigError("\n".join(dict.fromkeys(lines))) from error


def _line(error: ErrorDetails, options: Mapping[str, str]) -> str:
    path = field_path(error["loc"])
    name = options.get(path) or options.get(path.partition("[")[0]) or path
    if error["type"] == "invalid_key":
        return f"{shown(error['input'])}: is not a known key; {_suggestion('')}"
    if error["type"] == "extra_forbidden":
        return f"{name}: is not a known key; {_suggestion(path)}"
    return f"{name}: {message(error)}" if name else message(error)


def _suggestion(path: str) -> str:
    section, _, name = path.rpartition(".")
    known = list(_keys(Settings))
    beside = [key for key in known if key.rpartition(".")[0] == section]
    for candidates in (beside, known):
        by_name = {key.rpartition(".")[2]: key for key in candidates}
        close = difflib.get_close_matches(name, by_name, n=1)
        if close:
            return f"did you mean {by_name[close[0]]}?"
    return f"known here: {', '.join(key.rpartition('.')[2] for key in beside)}" if beside else "remove it"


def _keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every key with its dotted path."""
    for name, field in model.model_fields.items():
        yield prefix + name
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _keys(field.annotation, f"{prefix}{name}.")


def read_yaml(place: Path) -> Any:
    """What a YAML file holds; a key that stands twice is refused. Raises `ConfigError` with the place."""
    import yaml

    text = _text(place)
    try:
        return yaml.load(text, Loader=_strict_loader())  # a subclass of SafeLoader
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{place}{where}: {error.problem or error.context}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"{place}: does not read as YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise ConfigError(f"{place}: is nested too deeply to be settings") from error


def _text(place: Path) -> str:
    try:
        with place.open("rb") as file:
            content = file.read(MAX_FILE + 1)
    except FileNotFoundError:
        raise ConfigError(f"{place}: there is no such file; check the path") from None
    except IsADirectoryError:
        raise ConfigError(f"{place}: is a folder; name the YAML file in it") from None
    except OSError as error:
        raise ConfigError(f"{place}: cannot be read: {error.strerror}") from error
    if len(content) > MAX_FILE:
        raise ConfigError(f"{place}: is longer than {MAX_FILE:,} bytes, so it is no settings file")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{place}, line {line}: is not UTF-8; save the file as UTF-8") from error


def _strict_loader() -> Any:
    """yaml's safe loader, but a key that is there twice in one mapping is an error, and so is a value not of its own tag."""
    import yaml

    class StrictLoader(yaml.SafeLoader):
        def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
            try:
                return super().construct_object(node, deep)
            except (AttributeError, LookupError, TypeError) as error:
                # yaml's own words for `!!int ""` and the like.
                kind, value = node.tag.rpartition(":")[2], shown(node.value)
                raise yaml.constructor.ConstructorError(
                    None, None, f"{value} is no {kind}; leave the !!{kind} out", node.start_mark
                ) from error

        def flatten_mapping(self, node: yaml.MappingNode) -> None:
            super().flatten_mapping(node)
            # Merges of merges multiply: nine lines of nine each would be gigabytes.
            if len(node.value) > MAX_KEYS:
                problem = f"merges more than {MAX_KEYS:,} keys into one mapping; write them out"
                raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            seen: set[Any] = set()
            for key_node, _ in node.value:
                key = (key_node.tag, key_node.value if isinstance(key_node, yaml.ScalarNode) else id(key_node))
                if key in seen:
                    problem = f"the key {key_node.value!r} is there twice; keep one of them"
                    raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
                seen.add(key)
            mapping: dict[Any, Any] = super().construct_mapping(node, deep)
            return mapping

    return StrictLoader
