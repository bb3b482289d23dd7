"""A picture to edit: read from its file as a viewer shows it, and brought to the size that a model asks for.

Upright as its EXIF orientation says, in sRGB by its colour profile, 16 bits brought to 8, what is transparent on white,
of an animation the first frame. Pillow only, no torch.
"""

from __future__ import annotations

import hashlib
import io
import os
import secrets
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from imagemill.errors import BadTask, OutputError, Transient

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 100_000_000
"""The most pixels of a picture; its header is asked before anything is decoded."""

MAX_BYTES = 2**30
"""The longest file that is read into memory."""

FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "JPEG2000", "PPM", "TGA", "ICO", "QOI")
"""What is read. Pillow knows more, some of which (EPS) start other programs."""

TURNED = (5, 6, 7, 8)
"""EXIF orientations that lay the picture on its side (Exif 3.0, tag 0x0112)."""

PNG_LEVEL = 1
TOO_DEEP = 2**16
BROKEN = (OSError, SyntaxError, ValueError, TypeError, KeyError, IndexError, EOFError, OverflowError)
"""What Pillow raises on damaged files, beside `struct.error`, `zlib.error` and its own guard against bombs."""


class NotShown(ValueError):
    """The picture is whole, but of a kind that has no one way to be shown."""


def header(path: str | os.PathLike[str]) -> tuple[int, int]:
    """Width and height of the upright picture, from its header alone. Raises `BadTask` as `read` does."""
    from PIL import Image

    with _readable(os.fspath(path)), Image.open(path, formats=_formats()) as image:
        _refuse_giant(os.fspath(path), image)
        width, height = image.size
        return (height, width) if _orientation(image) in TURNED else (width, height)


def read(path: str | os.PathLike[str]) -> tuple[Image, str]:
    """The picture, upright in RGB, and the sha256 in hex of the bytes it was read from.

    Raises `BadTask` for a file that is gone, is no picture, is damaged or cut off, or has over `MAX_PIXELS`; `Transient`
    when the disk fails.
    """
    data = _bytes(os.fspath(path))
    return _decoded(data, os.fspath(path)), hashlib.sha256(data).hexdigest()


def check(data: bytes, name: str) -> tuple[int, int]:
    """Width and height of the upright picture that the bytes are, after it was decoded whole. Raises `BadTask` as `read`
    does."""
    return _decoded(data, name).size


def _decoded(data: bytes, name: str) -> Image:
    from PIL import Image

    with _readable(name):
        with Image.open(io.BytesIO(data), formats=_formats()) as image:
            _refuse_giant(name, image)
            image.verify()  # finds a PNG without its end, which decoding does not
        with Image.open(io.BytesIO(data), formats=_formats()) as image:
            return shown(image)


def shown(image: Image) -> Image:
    """A picture of any mode as a viewer shows it: RGB, upright, on white. Raises what Pillow raises when it is damaged,
    and `NotShown` for a mode without one way to be shown (floating point, 32 bits)."""
    from PIL import Image

    orientation, profile = _orientation(image), image.info.get("icc_profile")
    image.load()
    flat = _on_white(_eight_bits(image))
    flat = _in_srgb(flat, profile)
    turns = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }
    return flat.transpose(turns[orientation]) if orientation in turns else flat


def fit(picture: Image, width: int, height: int, slack: int) -> Image:
    """The picture at this size, by LANCZOS: whole when its aspect gives that size, up to `slack` pixels that rounding
    takes or adds; else with its aspect kept and what is over cut off, half on either side."""
    from PIL import Image

    if picture.size == (width, height):
        return picture
    scale = max(width / picture.width, height / picture.height)
    over = max(picture.width * scale - width, picture.height * scale - height)
    box = None
    if over > slack:
        wide, high = width / scale, height / scale
        left, top = (picture.width - wide) / 2, (picture.height - high) / 2
        box = (left, top, left + wide, top + high)
    return picture.resize((width, height), Image.Resampling.LANCZOS, box=box)


def thumbnail(path: str | os.PathLike[str], side: int) -> Image:
    """The picture as `read` gives it, no side longer than `side`: at less cost where the format allows. Raises `BadTask`
    as `read` does."""
    from PIL import Image

    with _readable(os.fspath(path)), Image.open(path, formats=_formats()) as image:
        _refuse_giant(os.fspath(path), image)
        image.draft(None, (2 * side, 2 * side))
        small = shown(image)
        small.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=3.0)
        return small


def keep(image: Image, folder: Path) -> Path:
    """A picture from memory as a PNG in the folder, named by its content, so that the same picture is one file.

    Raises `BadTask` when the picture is damaged, empty or too large, `OutputError` when the folder cannot be written.
    """
    out = io.BytesIO()
    with _readable("in memory"):
        _refuse_giant("in memory", image)
        shown(image).save(out, "PNG", compress_level=PNG_LEVEL)
    data = out.getvalue()
    place = folder / f"{hashlib.sha256(data).hexdigest()}.png"
    try:
        if not place.exists():
            folder.mkdir(parents=True, exist_ok=True)
            put(data, place)
    except OSError as error:
        raise OutputError(f"{folder} cannot take a picture to edit: {error}") from error
    return place


def put(data: bytes, place: Path) -> None:
    """Write the file whole or not at all: a later run trusts its name. Raises `OSError`."""
    temporary = place.with_name(f"{place.stem}-{secrets.token_hex(4)}.part")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, place)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


# --- the file ---------------------------------------------------------------------------------------------------------


def _bytes(name: str) -> bytes:
    try:
        size = os.stat(name).st_size
        if size > MAX_BYTES:
            raise BadTask(f"the picture {name} has {size:,} bytes; at most {MAX_BYTES:,} are read")
        return Path(name).read_bytes()
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise BadTask(f"the picture {name} is not there any more") from error
    except OSError as error:
        raise Transient(f"the picture {name} cannot be read: {error}") from error


def _formats() -> list[str]:
    from PIL import Image

    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


@contextmanager
def _readable(name: str) -> Iterator[None]:
    """Whatever Pillow raises inside the block says that the picture cannot be edited: `BadTask`."""
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            # Our own cap stands in for Pillow's warning of bombs; torn metadata alone spoils no picture.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            warnings.simplefilter("ignore", UserWarning)
            yield
    except UnidentifiedImageError as error:
        raise BadTask(f"the picture {name} is none that can be read; known: {', '.join(FORMATS)}") from error
    except Image.DecompressionBombError as error:
        raise BadTask(f"the picture {name} is giant; at most {MAX_PIXELS:,} pixels are taken") from error
    except NotShown as error:
        raise BadTask(f"the picture {name} cannot be shown: {error}") from error
    except (*BROKEN, struct.error, zlib.error) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise BadTask(f"the picture {name} is damaged or cut off: {reason}") from error


def _refuse_giant(name: str, image: Image) -> None:
    width, height = image.size
    if not width * height:
        raise BadTask(f"the picture {name} is empty: {width}x{height}")
    if width * height > MAX_PIXELS:
        raise BadTask(f"the picture {name} is giant: {width}x{height}; at most {MAX_PIXELS:,} pixels are taken")


# --- what a viewer does -----------------------------------------------------------------------------------------------


def _orientation(image: Image) -> int:
    """EXIF's orientation, 1 where there is none that reads. A PNG is not decoded to look for one behind its pixels; a TIFF
    is turned by Pillow itself, its size already in the header."""
    from PIL.ExifTags import Base

    if image.format == "TIFF":
        return 1
    if image.format == "PNG" and not {"exif", "Raw profile type exif"} & image.info.keys():
        return 1
    try:
        value = image.getexif().get(Base.Orientation, 1)
    except (*BROKEN, struct.error):
        return 1  # viewers show a picture with torn EXIF as it lies
    return value if isinstance(value, int) else 1


def _eight_bits(image: Image) -> Image:
    """16-bit grey at 8 bits (65535 becomes 255); other modes as they are."""
    import numpy as np
    from PIL import Image

    if image.mode == "F" or (image.mode == "I" and not 0 <= image.getextrema()[0] <= image.getextrema()[1] < TOO_DEEP):  # type: ignore[operator]
        raise NotShown("32-bit pictures have no one way to be shown; save it with 8 or 16 bits")
    if image.mode != "I" and not image.mode.startswith("I;16"):
        return image
    levels = np.asarray(image).astype(np.uint32)
    grey = Image.fromarray(((levels + 128) // 257).astype(np.uint8))
    if isinstance(image.info.get("transparency"), int):
        grey.putalpha(Image.fromarray(np.where(levels == image.info["transparency"], 0, 255).astype(np.uint8)))
    return grey


def _on_white(image: Image) -> Image:
    from PIL import Image

    if not image.has_transparency_data:
        return image
    pixels = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", pixels.size, "white"), pixels).convert("RGB")


def _in_srgb(image: Image, profile: bytes | None) -> Image:
    """RGB by the picture's own profile where it has one that fits, else by Pillow's plain conversion."""
    from PIL import ImageCms

    if image.mode in ("P", "1", "PA"):
        image = image.convert("RGB")
    if profile:
        try:
            converted = ImageCms.profileToProfile(
                image, io.BytesIO(profile), ImageCms.createProfile("sRGB"), outputMode="RGB"
            )
        except (ImageCms.PyCMSError, OSError, ValueError):
            converted = None  # viewers show a picture with a torn or foreign profile without it
        if converted is not None:
            return converted
    return image.convert("RGB")
