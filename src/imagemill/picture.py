"""A picture as a file: bytes with the task written inside, and the check that they decode again."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import PurePath, PurePosixPath
from typing import TYPE_CHECKING, Any

from imagemill import wire
from imagemill.errors import BadOutput, BadTask
from imagemill.plan import FORMATS
from imagemill.records import PlannedTask, Task

if TYPE_CHECKING:
    from PIL.Image import Exif, Image

PNG_LEVEL = 1
"""zlib level: level 6 takes 1.6 times the CPU time of level 1 on a photo of 1024² and saves a tenth of the bytes."""

JPEG_QUALITY = 95
EXIF_LIMIT = 60_000
"""Bytes: a JPEG holds 64 KiB of EXIF. A longer text is left out; the ledger has it."""

PNG_SIGNATURE, PNG_END = b"\x89PNG\r\n\x1a\n", b"\0\0\0\0IEND\xaeB`\x82"
IMAGE_DESCRIPTION, EXIF_FOLDER, USER_COMMENT = 0x010E, 0x8769, 0x9286


def encode(image: Image, planned: PlannedTask, facts: Mapping[str, Any], *, metadata: bool) -> bytes:
    """The picture in the format that its path's suffix names, with the task inside if `metadata`.

    PNG: text chunks `parameters` (what viewers of this field read) and `imagemill` (the task as JSON).
    JPEG and WebP: the same in EXIF `UserComment` and `ImageDescription`.
    Raises `BadTask` when the format cannot hold the picture: its mode, or a side over 65,500 (JPEG) or 16,383 (WebP) pixels.
    """
    kind = format_of(planned.task.output_path or "")
    texts = (parameters(planned.task, facts), task_json(planned, facts)) if metadata else None
    try:
        return _write(image, kind, texts)
    except (OSError, ValueError) as error:
        # Nothing touches the disk here, so that Pillow's OSError speaks of the picture.
        raise BadTask(
            f"a picture of {image.width}x{image.height} {image.mode} cannot be written as {kind}: {error}"
        ) from error


def _write(image: Image, kind: str, texts: tuple[str, str] | None) -> bytes:
    out = io.BytesIO()
    if kind == "png":
        from PIL.PngImagePlugin import PngInfo

        info = PngInfo()
        if texts:
            info.add_text("parameters", texts[0])
            info.add_text("imagemill", texts[1])
        image.save(out, "PNG", pnginfo=info, compress_level=PNG_LEVEL)
    else:
        exif = _exif(image, texts, EXIF_LIMIT if kind == "jpg" else 2**31) if texts else b""
        options = {"quality": JPEG_QUALITY, "subsampling": 0} if kind == "jpg" else {"lossless": True, "quality": 50}
        image.save(out, "JPEG" if kind == "jpg" else "WEBP", exif=exif, **options)
    return out.getvalue()


def _exif(image: Image, texts: tuple[str, str], limit: int) -> bytes:
    exif: Exif = image.getexif()
    exif[IMAGE_DESCRIPTION] = texts[1]
    exif.get_ifd(EXIF_FOLDER)[USER_COMMENT] = b"UNICODE\0" + texts[0].encode("utf-16-be")
    data = exif.tobytes()
    return data if len(data) <= limit else b""


def format_of(path: str) -> str:
    """`png`, `jpg` or `webp`, by the suffix of a path."""
    suffix = PurePosixPath(path).suffix.lower()
    return next(name for name, suffixes in FORMATS.items() if suffix in suffixes)


def task_json(planned: PlannedTask, facts: Mapping[str, Any]) -> str:
    """The task, its fingerprint and what else its pixels depend on, as one JSON object in ASCII."""
    content = {"task": json.loads(wire.to_json(planned.task)), "fingerprint": planned.fingerprint, **facts}
    return json.dumps(content, ensure_ascii=True)


def parameters(task: Task, facts: Mapping[str, Any]) -> str:
    """The text that image viewers of this field read: prompt, negative prompt, then `Steps: …, Seed: …, Size: …`."""
    loras = "".join(f" <lora:{PurePath(lora.path).stem}:{lora.strength:g}>" for lora in task.loras)
    lines = [task.prompt + loras]
    if task.negative_prompt:
        lines.append(f"Negative prompt: {task.negative_prompt}")
    values: dict[str, Any] = {
        "Steps": task.steps,
        "CFG scale": task.guidance_scale,
        "True CFG scale": task.true_cfg_scale,
    }
    values |= {"Seed": task.seed, "Size": f"{task.width}x{task.height}", "Model": task.model}
    if task.loras:
        values["Lora hashes"] = ", ".join(f"{PurePath(lora.path).stem}: {lora.digest[:12]}" for lora in task.loras)
    values["Version"] = f"imagemill {facts.get('imagemill', '')}".strip()
    lines.append(", ".join(f"{name}: {_quoted(str(value))}" for name, value in values.items() if value is not None))
    return "\n".join(lines)


def _quoted(value: str) -> str:
    """As `quote` of AUTOMATIC1111/stable-diffusion-webui, `modules/infotext_utils.py`, whose reader viewers follow."""
    return json.dumps(value, ensure_ascii=False) if any(mark in value for mark in ',\n:"') else value


def check(data: bytes, width: int, height: int) -> None:
    """Raise `BadOutput` unless the bytes decode, wholly, to a picture of that size."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            image.verify()
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            size = image.size
    except (OSError, SyntaxError, ValueError) as error:
        raise BadOutput(f"the file does not decode: {error}") from error
    if data.startswith(PNG_SIGNATURE) and not data.endswith(PNG_END):
        raise BadOutput("the file does not decode: it does not end with PNG's end chunk")
    if size != (width, height):
        raise BadOutput(f"the file holds {size[0]}x{size[1]} pixels; the task asked for {width}x{height}")


def flags(image: Image) -> tuple[str, ...]:
    """Remarks for the report: `black` when nothing is brighter than 2 of 255, `constant` when there is one colour."""
    extrema = image.convert("RGB").getextrema()
    found = []
    if all(high <= 2 for _, high in extrema):  # type: ignore[misc]
        found.append("black")
    if all(low == high for low, high in extrema):  # type: ignore[misc]
        found.append("constant")
    return tuple(found)
