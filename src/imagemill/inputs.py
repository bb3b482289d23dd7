"""What the driver reads from disk before any worker starts: LoRA files and the pictures to edit.

No picture is decoded here, and no tensor kept: of an adapter its header, its digest, and whether its numbers are finite.
What only the model can tell (keys and shapes that do not fit it) is found by the worker that puts the adapter on.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from imagemill import source_image
from imagemill.errors import BadTask, InputError
from imagemill.plan import is_unicode

LORAS = Path(__file__).parent / "assets" / "tiny" / "loras"
"""Adapters that come with the embedded model; each has its file's name without the suffix."""

MAX_HEADER = 100 * 2**20
"""Bytes; the limit that safetensors itself sets to a header."""

MAX_RANK = 1024
"""The largest rank of an adapter: the largest of those in use are 512, and above it a file is none, or a whole model."""

MAX_PATH = 4096
"""Characters of a path; Linux takes as many bytes (PATH_MAX)."""

MAX_KEY = 1000
"""Characters of a tensor's name."""

NOT_FINITE = {
    "F64": ("<u8", 0x7FF0000000000000),
    "F32": ("<u4", 0x7F800000),
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
    "F8_E5M2": ("u1", 0x7C),
    "F8_E4M3": ("u1", 0x7F),
}
"""The bits that are all set in NaN and infinity, and only in them, by safetensors' name of the type (E4M3 has no infinity).
Types that are not here hold neither."""

CHUNK = 4 * 2**20
"""Bytes of a tensor that are looked at together."""

PICKLE_SUFFIXES = frozenset({".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle"})
PAIRS = (
    ("lora_A", "lora_B"),
    ("lora_embedding_A", "lora_embedding_B"),
    ("lora_down", "lora_up"),
    ("lora.down", "lora.up"),
)
"""Names of the two factors of an adapter: `rank x in` and `out x rank` (PEFT, its embeddings, kohya, old diffusers)."""

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_WEB = re.compile(r"https?://", re.IGNORECASE)
_LOKR = re.compile(r"lokr_(?:w[12]|t2)(?:_[ab])?$")
_PAIR_PATTERNS = tuple(
    (re.compile(rf"(?:(?<=[._])|^){re.escape(first)}(?=\.|$)"), second, is_first)
    for one, two in PAIRS
    for first, second, is_first in ((one, two, True), (two, one, False))
)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ImageFile:
    """A picture to edit: the sha256 of its file in hex, and its width and height upright, as its header says.

    `size` is None for a header that does not read: the worker says why when it comes to the task, and fails it alone.
    """

    path: str
    digest: str
    size: tuple[int, int] | None


@dataclass(frozen=True, slots=True)
class LoraFile:
    """An adapter file whose header has been checked.

    `digest` is the sha256 of the file in hex, `bytes` its size, `rank` the largest rank in it (0 where a LoKr file has
    only full factors), `tensors` their number. `format` is a guess from the names: peft, diffusers, comfyui, kohya or
    lokr.
    """

    path: str
    digest: str
    bytes: int
    rank: int
    tensors: int
    format: str


def local_path(text: str, base: str | os.PathLike[str] | None = None) -> str:
    """The absolute path that `text` means: relative to `base` if it is there, else to the current folder if it is
    there, else joined to `base` all the same (the current folder without a base). `~` is the home folder.

    Raises `InputError` for URLs and for characters that no file name holds.
    """
    if _URL.match(text):
        raise InputError(f"{text!r} is a URL; only local files are read: download it and name the file")
    if not text.strip():
        raise InputError("the path is empty; name a file")
    if len(text) > MAX_PATH:
        raise InputError(f"the path has {len(text):,} characters; at most {MAX_PATH:,} are taken")
    if "\0" in text or not is_unicode(text):
        raise InputError(f"{text!r} contains a character no file name can hold; remove it")
    plain = os.path.expanduser(text)
    beside = os.path.abspath(os.path.join(base or "", plain))
    if base is None or os.path.isabs(plain) or os.path.exists(beside) or not os.path.exists(plain):
        return beside
    return os.path.abspath(plain)


def lora_path(text: str, base: str | os.PathLike[str] | None = None) -> str:
    """As `local_path`; a bare name that no file has (`pixel-art`) may be that of an embedded adapter."""
    path = local_path(text, base)
    embedded = LORAS / f"{text}.safetensors"
    bare = os.path.basename(text) == text
    return str(embedded) if bare and not os.path.exists(path) and os.path.isfile(embedded) else path


def picture_path(text: str, base: str | os.PathLike[str] | None = None) -> str:
    """As `local_path`, but an address of the web stays as it is: whether it may be fetched is the run's to say."""
    return text if is_web_address(text) else local_path(text, base)


def is_path(text: str) -> bool:
    """Whether the parts of the text are short enough for file names (255 bytes)."""
    return all(len(part.encode()) <= 255 for part in text.split("/"))


def is_web_address(text: str) -> bool:
    """Whether the text is an address of http or https, and no path."""
    return _WEB.match(text) is not None


def digest_file(path: str | os.PathLike[str]) -> str:
    """The sha256 of a file in hex. Raises `InputError` when it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise InputError(f"{os.fspath(path)}: cannot be read: {error.strerror}") from error


def read_lora(path: str) -> LoraFile:
    """Check a LoRA file's header and take its digest. Raises `InputError` in one line with path, reason and mend."""
    size = _regular_file(path, "LoRA").st_size
    if Path(path).suffix.lower() in PICKLE_SUFFIXES:
        raise InputError(f"{path}: pickle files can run code; convert it to safetensors")
    _check_length(path, size)
    shapes = _read_shapes(path)
    if not shapes:
        raise InputError(f"{path}: holds no tensors; it was saved empty, so save it again from the training")
    rank = _rank(path, shapes)
    if rank > MAX_RANK:
        raise InputError(
            f"{path}: has the rank {rank:,}; at most {MAX_RANK:,} is taken, so extract it with a smaller one"
        )
    _check_finite(path)
    return LoraFile(path, digest_file(path), size, rank, len(shapes), _format(shapes))


def read_image(path: str) -> ImageFile:
    """The digest and the size of a picture to edit. Raises `InputError` when the file cannot be read."""
    digest = digest_file(path)
    try:
        return ImageFile(path, digest, source_image.header(path))
    except BadTask:
        return ImageFile(path, digest, None)


class Inputs:
    """Reads each input file once, however many tasks name it, and again when its size or time has changed."""

    def __init__(self) -> None:
        self._loras: _Readings[LoraFile] = _Readings(read_lora, "LoRA")
        self._images: _Readings[ImageFile] = _Readings(read_image, "picture")
        self._fetched: dict[str, ImageFile] = {}

    def lora(self, path: str) -> LoraFile:
        """The checked header and digest of an adapter. Raises `InputError` as `read_lora` does."""
        return self._loras.of(path)

    def image(self, path: str) -> ImageFile:
        """Digest and size of a picture to edit. Raises `InputError` when it is missing, empty or no file."""
        return self._fetched.get(path) or self._images.of(path)

    def remember(self, fetched: ImageFile) -> None:
        """Take a picture as known that was fetched, and perhaps not kept."""
        self._fetched[fetched.path] = fetched


class _Readings(Generic[T]):
    """What was read of each path, or the error that reading it gave, with the size and time it had then."""

    def __init__(self, read: Callable[[str], T], what: str) -> None:
        self._read = read
        self._what = what
        self._known: dict[str, tuple[tuple[int, int], T | InputError]] = {}

    def of(self, path: str) -> T:
        state = _regular_file(path, self._what)
        version = (state.st_size, state.st_mtime_ns)
        known = self._known.get(path)
        if known is None or known[0] != version:
            known = (version, self._attempt(path))
            self._known[path] = known
        if isinstance(known[1], InputError):
            raise InputError(str(known[1]))
        return known[1]

    def _attempt(self, path: str) -> T | InputError:
        try:
            return self._read(path)
        except InputError as error:
            return error


def _strength(path: str, what: str) -> str:
    """How to write a strength, where the end of an adapter's path may have been meant as one."""
    file, colon, tail = os.path.basename(path).rpartition(":")
    return f", or write a number for {tail!r}, such as {file}:0.8" if what == "LoRA" and file and colon else ""


def _regular_file(path: str, what: str) -> os.stat_result:
    try:
        state = os.stat(path)
    except FileNotFoundError:
        raise InputError(f"{path}: there is no such {what} file; check the path{_strength(path, what)}") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if stat.S_ISDIR(state.st_mode):
        raise InputError(f"{path}: is a folder; name the {what} file in it")
    if not stat.S_ISREG(state.st_mode):
        raise InputError(f"{path}: is no regular file; name a {what} file")
    if state.st_size == 0:
        raise InputError(f"{path}: is an empty file; put the {what} there again")
    return state


def _check_length(path: str, size: int) -> None:
    """Refuse a header that is longer than the file or than the limit before anything is read of it."""
    try:
        with open(path, "rb") as file:
            start = file.read(16)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    if len(start) < 8:
        raise InputError(f"{path}: is no safetensors file: only {size} bytes long")
    (length,) = struct.unpack_from("<Q", start)
    if start.startswith(b"PK\x03\x04") or (length > size - 8 and re.match(rb"\x80[\x02-\x05]", start)):
        raise InputError(f"{path}: is a pickle, and pickle files can run code; convert it to safetensors")
    if not start[8:].startswith(b"{"):
        raise InputError(f"{path}: is no safetensors file; convert it to safetensors")
    if length > MAX_HEADER:
        raise InputError(f"{path}: claims a header of {length:,} bytes; the limit is {MAX_HEADER:,}")
    if length > size - 8:
        raise InputError(f"{path}: is cut off inside its header; copy or download it again")


def _read_shapes(path: str) -> dict[str, tuple[int, ...]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="numpy") as file:
            return {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise InputError(f"{path}: is damaged or cut off ({reason}); copy or download it again") from error


def _check_finite(path: str) -> None:
    """Refuse NaN and infinity, which one broken save in a training leaves in all pictures. Reads the file once, by chunks."""
    import numpy as np

    try:
        with open(path, "rb") as file:
            start = 8 + struct.unpack("<Q", file.read(8))[0]
            header = json.loads(file.read(start - 8))
            for key, tensor in header.items():
                if key == "__metadata__" or tensor["dtype"] not in NOT_FINITE:
                    continue
                kind, mask = NOT_FINITE[tensor["dtype"]]
                begin, end = tensor["data_offsets"]
                file.seek(start + begin)
                for place in range(begin, end, CHUNK):
                    bits = np.frombuffer(file.read(min(CHUNK, end - place)), kind)
                    if ((bits & mask) == mask).any():
                        raise InputError(
                            f"{path}: holds NaN or infinity in {key!r}; take an earlier save of the training"
                        )
    except (OSError, ValueError, LookupError, struct.error) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error


def _rank(path: str, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """The largest rank of the file, after checking that every factor has its other half."""
    ranks = []
    for key, shape in shapes.items():
        if len(key) > MAX_KEY:
            raise InputError(f"{path}: names a tensor with {len(key):,} characters; it is no LoRA, or is damaged")
        if _LOKR.search(key):
            ranks.append(_lokr_rank(path, key, shape, shapes))
            continue
        for pattern, other, is_first in _PAIR_PATTERNS:
            if pattern.search(key) and not key.endswith(".bias"):
                partner = pattern.sub(other, key)
                if partner not in shapes:
                    raise InputError(f"{path}: {key!r} is there without {partner!r}; save the adapter again, whole")
                if is_first:
                    ranks.append(_pair_rank(path, key, shape, shapes[partner]))
                break
    if not ranks:
        raise InputError(
            f"{path}: holds no LoRA: needs pairs lora_A/lora_B or lora_down/lora_up, or lokr_ factors; "
            f"its first tensor is {next(iter(shapes))!r}"
        )
    return max(ranks)


def _pair_rank(path: str, key: str, first: tuple[int, ...], second: tuple[int, ...]) -> int:
    rank = first[0] if len(first) >= 2 else 0
    if not rank or len(second) < 2 or second[1] != rank:
        raise InputError(f"{path}: the factors of {key!r} do not fit: shapes {list(first)} and {list(second)}")
    return rank


def _lokr_rank(path: str, key: str, shape: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]]) -> int:
    if key[-2:] not in ("_a", "_b"):
        return 0
    partner = key[:-1] + ("b" if key.endswith("_a") else "a")
    if partner not in shapes:
        raise InputError(f"{path}: {key!r} is there without {partner!r}; save the adapter again, whole")
    return min(shape) if key.endswith("_a") and shape else 0


def _format(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """The convention of the names; for people only."""
    names = list(shapes)
    if any(_LOKR.search(name) for name in names):
        return "lokr"
    if any("lora_down" in name or "lora_up" in name for name in names):
        return "kohya"
    if any(name.startswith("diffusion_model.") for name in names):
        return "comfyui"
    if any(name.startswith(("transformer.", "unet.", "text_encoder")) for name in names):
        return "diffusers"
    return "peft"
