"""Pictures to edit are read as a viewer shows them, or refused with a reason before anything large is decoded."""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from imagemill import source_image
from imagemill.errors import BadTask, OutputError
from imagemill.source_image import MAX_PIXELS, fit, header, keep, read

RED, GREEN, BLUE, WHITE = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255)


def field(width: int = 40, height: int = 20) -> Image.Image:
    """Red to the left, blue to the right, the upper right corner green: every turn of it looks different."""
    image = Image.new("RGB", (width, height), RED)
    image.paste(BLUE, (width // 2, 0, width, height))
    image.paste(GREEN, (width - width // 4, 0, width, height // 2))
    return image


def seen(path: Path) -> Image.Image:
    """What `read` gives, after checking what holds for any picture."""
    image, digest = read(path)
    assert image.mode == "RGB"
    assert image.size == header(path)
    assert digest == sha256(path.read_bytes()).hexdigest()
    return image


def far(one: Image.Image, other: Image.Image) -> int:
    """The largest difference of two pictures of one size, in levels."""
    assert one.size == other.size
    return int(np.abs(np.asarray(one).astype(int) - np.asarray(other.convert("RGB")).astype(int)).max())


# --- as a viewer shows it ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_picture_stands_upright(tmp_path: Path, suffix: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    options = {"jpg": {"quality": 95, "subsampling": 0}, "webp": {"lossless": True}}.get(suffix, {})
    field().save(path, exif=exif, **options)
    with Image.open(path) as opened:
        wanted = ImageOps.exif_transpose(opened).convert("RGB")
    assert far(seen(path), wanted) <= 8
    assert (seen(path).size == (20, 40)) == (orientation >= 5)


def test_a_torn_or_unknown_orientation_leaves_the_picture_as_it_lies(tmp_path: Path) -> None:
    field().save(tmp_path / "torn.jpg", exif=b"Exif\0\0MM\0*\0\0")
    exif = Image.Exif()
    exif[0x0112] = 77
    field().save(tmp_path / "odd.jpg", exif=exif)
    for name in ("torn.jpg", "odd.jpg"):
        assert seen(tmp_path / name).size == (40, 20)


def test_what_is_transparent_lies_on_white(tmp_path: Path) -> None:
    image = field().convert("RGBA")
    image.paste((0, 0, 0, 0), (0, 0, 10, 20))
    image.paste((0, 0, 0, 128), (10, 0, 20, 20))
    image.save(tmp_path / "a.png")
    made = seen(tmp_path / "a.png")
    assert made.getpixel((5, 5)) == WHITE
    assert made.getpixel((15, 5)) == (127, 127, 127)
    assert made.getpixel((22, 15)) == BLUE
    Image.new("LA", (4, 4), (0, 0)).save(tmp_path / "grey.png")
    assert seen(tmp_path / "grey.png").getpixel((1, 1)) == WHITE
    field().save(tmp_path / "key.png", transparency=RED)
    assert seen(tmp_path / "key.png").getpixel((1, 1)) == WHITE
    assert seen(tmp_path / "key.png").getpixel((22, 15)) == BLUE


@pytest.mark.parametrize("mode", ["P", "1", "L", "RGB", "RGBX", "YCbCr", "CMYK"])
def test_every_usual_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    image = Image.linear_gradient("L") if mode in ("1", "L") else field()
    path = tmp_path / "a.tif"
    image.convert(mode).save(path)
    assert far(seen(path), image.convert(mode).convert("RGB")) <= 1


def test_a_cmyk_jpeg_is_no_negative(tmp_path: Path) -> None:
    field(64, 32).convert("CMYK").save(tmp_path / "a.jpg", quality=95, subsampling=0)
    made = seen(tmp_path / "a.jpg")
    for place, wanted in (((8, 16), RED), ((40, 24), BLUE), ((60, 4), GREEN)):
        assert np.abs(np.subtract(made.getpixel(place), wanted)).max() < 30


def test_a_palette_with_a_transparent_colour_lies_on_white(tmp_path: Path) -> None:
    image = field().quantize(4)
    image.save(tmp_path / "a.png", transparency=image.getpixel((1, 1)))
    made = seen(tmp_path / "a.png")
    assert made.getpixel((1, 1)) == WHITE
    assert made.getpixel((22, 15)) == BLUE


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_keep_their_brightness(tmp_path: Path, suffix: str) -> None:
    levels = np.array([[0, 128, 257, 32768, 65535]], dtype=np.uint16)
    Image.fromarray(levels).save(tmp_path / f"a.{suffix}")
    made = np.asarray(seen(tmp_path / f"a.{suffix}"))
    assert made[0, :, 0].tolist() == [0, 0, 1, 128, 255]
    assert (made[..., 0] == made[..., 2]).all()


def test_sixteen_bit_colour_and_big_endian_grey_are_read(tmp_path: Path) -> None:
    write_png(tmp_path / "colour.png", 2, 1, bits=16, colour=2, rows=[struct.pack(">6H", 65535, 0, 0, 0, 0, 32768)])
    assert list(seen(tmp_path / "colour.png").get_flattened_data()) == [(255, 0, 0), (0, 0, 128)]
    Image.fromarray(np.array([[0, 65535]], dtype=">u2")).save(tmp_path / "big.tif")
    assert list(seen(tmp_path / "big.tif").get_flattened_data()) == [(0, 0, 0), WHITE]


@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tif"])
def test_of_several_frames_the_first_counts(tmp_path: Path, suffix: str) -> None:
    rest = [Image.new("RGB", (40, 20), BLUE), Image.new("RGB", (40, 20), GREEN)]
    options = {"lossless": True} if suffix == "webp" else {}
    Image.new("RGB", (40, 20), RED).save(tmp_path / f"a.{suffix}", save_all=True, append_images=rest, **options)
    assert set(seen(tmp_path / f"a.{suffix}").get_flattened_data()) == {RED}


def test_a_colour_profile_is_followed_and_a_torn_one_ignored(tmp_path: Path) -> None:
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("XYZ")).tobytes()
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for name, profile in (("none", None), ("srgb", srgb), ("torn", srgb[:200]), ("foreign", lab)):
        field().save(tmp_path / f"{name}.png", icc_profile=profile)
    plain = seen(tmp_path / "none.png")
    for name in ("srgb", "torn"):
        assert far(seen(tmp_path / f"{name}.png"), plain) <= 1
    swapped = bytearray(srgb)  # its red and green primaries change places
    red, green = bytes(swapped).index(b"rXYZ"), bytes(swapped).index(b"gXYZ")
    swapped[red : red + 4], swapped[green : green + 4] = b"gXYZ", b"rXYZ"
    field().save(tmp_path / "swapped.png", icc_profile=bytes(swapped))
    assert seen(tmp_path / "swapped.png").getpixel((1, 1))[1] > 200  # type: ignore[index]


# --- refused ----------------------------------------------------------------------------------------------------------


def write_png(path: Path, width: int, height: int, *, bits: int = 8, colour: int = 2, rows: Any = ()) -> Path:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in rows))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b""))
    return path


@pytest.mark.parametrize(("width", "height"), [(10_001, 10_000), (13_000, 13_000), (60_000, 60_000), (2**31 - 1, 1)])
def test_a_giant_is_refused_by_its_header(
    tmp_path: Path, width: int, height: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_png(tmp_path / "a.png", width, height)
    monkeypatch.setattr(Image.Image, "load", lambda image: pytest.fail("it was decoded"))
    for look in (header, read):
        with pytest.raises(BadTask, match=rf"a\.png is giant.*at most {MAX_PIXELS:,} pixels"):
            look(path)


def test_a_picture_at_the_cap_is_no_giant_and_nobody_is_warned(tmp_path: Path, recwarn: Any) -> None:
    assert header(write_png(tmp_path / "a.png", 10_000, 10_000)) == (10_000, 10_000)
    assert [str(one.message) for one in recwarn] == []


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "tif", "bmp"])
@pytest.mark.parametrize("share", [0.3, 0.7, 0.98])
def test_a_picture_that_is_cut_off_is_refused(tmp_path: Path, suffix: str, share: float) -> None:
    noise = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(noise).save(path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(BadTask, match=r"the picture .*a\.\w+ is (damaged or cut off: |none that can be read)"):
        read(path)


def test_a_png_without_its_end_is_refused(tmp_path: Path) -> None:
    field().save(tmp_path / "a.png")
    (tmp_path / "a.png").write_bytes((tmp_path / "a.png").read_bytes()[:-12])
    with pytest.raises(BadTask, match="damaged or cut off"):
        read(tmp_path / "a.png")


def test_damaged_bytes_are_refused_or_decode_but_never_crash(tmp_path: Path) -> None:
    dice = np.random.default_rng(5)
    for suffix in ("png", "jpg", "gif", "tif", "webp"):
        out = io.BytesIO()
        field().save(out, {"jpg": "JPEG", "tif": "TIFF"}.get(suffix, suffix.upper()))
        for _ in range(60):
            data = bytearray(out.getvalue())
            for place in dice.integers(0, len(data), 6):
                data[place] = int(dice.integers(256))
            path = tmp_path / f"a.{suffix}"
            path.write_bytes(bytes(data))
            for look in (header, read):
                with suppress(BadTask):
                    look(path)


@pytest.mark.parametrize(
    "content", [b"no picture at all", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%!PS-Adobe-3.0 EPSF-3.0\n"]
)
def test_what_is_no_picture_is_refused_with_the_formats_that_are_read(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(BadTask, match="none that can be read; known: PNG, JPEG"):
        read(tmp_path / "a.png")


def test_a_file_that_is_gone_or_too_long_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BadTask, match="is not there any more"):
        read(tmp_path / "a.png")
    field().save(tmp_path / "a.png")
    monkeypatch.setattr(source_image, "MAX_BYTES", 10)
    with pytest.raises(BadTask, match="at most 10 are read"):
        read(tmp_path / "a.png")


def test_floating_point_is_refused(tmp_path: Path) -> None:
    Image.new("F", (4, 4), 0.5).save(tmp_path / "a.tif")
    Image.fromarray(np.array([[2**20]], dtype=np.int32)).save(tmp_path / "b.tif")
    for name in ("a.tif", "b.tif"):
        with pytest.raises(BadTask, match=rf"{name} cannot be shown: 32-bit pictures have no one way to be shown"):
            read(tmp_path / name)


# --- size and keeping -------------------------------------------------------------------------------------------------


def test_a_picture_of_the_right_size_is_untouched() -> None:
    image = field()
    assert fit(image, 40, 20, 16) is image


@pytest.mark.parametrize(("size", "slack"), [((80, 40), 0), ((80, 48), 16), ((96, 40), 16)])
def test_nothing_is_cut_off_where_the_aspect_is_that_of_the_picture_up_to_rounding(
    size: tuple[int, int], slack: int
) -> None:
    made = fit(field(), *size, slack)
    assert made.size == size
    assert far(made, field().resize(size, Image.Resampling.LANCZOS)) == 0


def test_another_aspect_cuts_both_sides_alike() -> None:
    image = Image.new("RGB", (90, 30), GREEN)
    image.paste(RED, (0, 0, 30, 30))
    image.paste(BLUE, (60, 0, 90, 30))
    made = fit(image, 64, 64, 16)
    assert made.size == (64, 64)
    assert set(made.crop((10, 10, 54, 54)).get_flattened_data()) == {GREEN}
    assert far(made, made.transpose(Image.Transpose.FLIP_LEFT_RIGHT)) < 256
    tall = fit(image.transpose(Image.Transpose.ROTATE_90), 64, 64, 16)
    assert set(tall.crop((10, 10, 54, 54)).get_flattened_data()) == {GREEN}


@pytest.mark.parametrize("change", [lambda image: image, lambda image: image.convert("RGBA")])
def test_the_same_picture_from_memory_is_kept_once(
    tmp_path: Path, change: Callable[[Image.Image], Image.Image]
) -> None:
    first = keep(field(), tmp_path / "kept")
    assert keep(change(field()), tmp_path / "kept") == first
    assert keep(field(20, 40), tmp_path / "kept") != first
    assert sorted((tmp_path / "kept").iterdir()) == sorted({first, keep(field(20, 40), tmp_path / "kept")})
    assert far(seen(first), field()) == 0


def test_a_picture_from_memory_that_is_damaged_is_refused(tmp_path: Path) -> None:
    field(200, 200).save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    with pytest.raises(BadTask, match="the picture in memory is damaged or cut off"):
        keep(Image.open(io.BytesIO(data[: len(data) // 2])), tmp_path)


@pytest.mark.parametrize("size", [(0, 5), (5, 0)])
def test_a_picture_from_memory_without_a_pixel_is_refused(tmp_path: Path, size: tuple[int, int]) -> None:
    with pytest.raises(BadTask, match=rf"the picture in memory is empty: {size[0]}x{size[1]}"):
        keep(Image.new("RGB", size), tmp_path)


def test_a_kept_picture_is_for_whom_the_umask_says_and_a_failed_write_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = os.umask(0o027)
    try:
        assert keep(field(), tmp_path).stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(old)

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match=r"cannot take a picture to edit: .*No space left"):
        keep(field(20, 40), tmp_path / "other")
    assert list((tmp_path / "other").iterdir()) == []


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_a_thumbnail_is_the_picture_made_small(tmp_path: Path, suffix: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    field(800, 400).save(tmp_path / f"a.{suffix}", exif=exif)
    small = source_image.thumbnail(tmp_path / f"a.{suffix}", 64)
    assert small.size == (32, 64)
    assert np.abs(np.subtract(small.getpixel((16, 8)), seen(tmp_path / f"a.{suffix}").getpixel((200, 100)))).max() < 30
    assert source_image.thumbnail(tmp_path / f"a.{suffix}", 4000).size == (400, 800)
