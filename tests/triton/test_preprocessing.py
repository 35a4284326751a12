"""Pictures of anybody: what would take long, much memory or another program is refused, all else is unchanged."""

import io
import os
import struct
import time
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from build_tasks.errors import UserError
from build_tasks.formats import picture_transform
from build_tasks.report.sample_table import thumbnail
from build_tasks.triton.preprocess_model.preprocessing import MAX_PIXELS, PictureError, count_scans, decode, preprocess
from build_tasks.verification.accuracy_samples import PICTURE_FORMATS, SHIPPED_PHOTOGRAPHS, load_samples
from tests.support.project import ROOT

SETTINGS: dict[str, Any] = {
    "format": "uint8_nhwc", "input_size": [3, 224, 224], "crop_pct": 0.875, "crop_mode": "center",
    "interpolation": "bicubic", "mean": [0.5] * 3, "std": [0.5] * 3,
}  # fmt: skip
PHOTOGRAPH = (ROOT / SHIPPED_PHOTOGRAPHS / "coffee.jpg").read_bytes()


def encoded(picture: Image.Image, file_format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, file_format, **options)
    return buffer.getvalue()


def chunk(name: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def png(width: int, height: int, *chunks: bytes) -> bytes:
    """Return a gray PNG that ends after its header and the given chunks."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(chunks) + chunk(b"IDAT", b"")


def many_scans() -> bytes:
    """Return a progressive JPEG of a few kB whose last scan comes 5000 times more."""
    jpeg = encoded(Image.new("RGB", (512, 512), (200, 10, 10)), "JPEG", progressive=True)
    scan = jpeg[jpeg.rfind(b"\xff\xda") : -2]
    return jpeg[:-2] + 5000 * scan + jpeg[-2:]


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
OTHER = "expected a picture in JPEG or PNG, found another content"
UNREADABLE = "expected a picture in JPEG or PNG that can be read: "
REFUSED: list[tuple[str, Callable[[], bytes], str]] = [
    *(
        (f"{size[0]} x {size[1]}", lambda size=size: encoded(Image.new("L", size)), "sides of at most 100 to 1")
        for size in ((1, 10000), (1, 60000), (10000, 1), (101, 1))
    ),
    ("more pixels", lambda: png(8193, 8192), "at most 67,108,864 pixels, found 8193 x 8192"),
    ("pixels that Pillow warns of", lambda: png(10000, 10000), "at most 67,108,864 pixels, found "),
    ("pixels that Pillow refuses", lambda: png(20000, 20000), "at most 67,108,864 pixels, found far more"),
    ("the largest size", lambda: png(2**31 - 1, 2**31 - 1), "at most 67,108,864 pixels, found far more"),
    ("a JPEG of the largest size", lambda: encoded(Image.new("L", (8, 8)), "JPEG").replace(
        b"\x08\x00\x08\x00\x08\x01", b"\x08\xff\xff\xff\xff\x01"), "at most 67,108,864 pixels, found far more"),
    ("no pixels", lambda: png(0, 8), ""),
    ("scans", many_scans, "expected a JPEG of at most 100 scans, found more"),
    *(
        (name, lambda name=name: encoded(Image.new("RGB", (8, 8)), name), OTHER)
        for name in ("GIF", "BMP", "WEBP", "TIFF", "PPM", "PDF", "ICO", "TGA", "PCX", "JPEG2000", "ICNS", "EPS", "AVIF")
    ),
    ("PostScript", lambda: EPS, OTHER),
    ("SVG", lambda: b"<svg/>", OTHER),
    ("nothing", lambda: b"", OTHER),
    ("half a JPEG", lambda: PHOTOGRAPH[: len(PHOTOGRAPH) // 2], UNREADABLE),
    ("the header of a JPEG", lambda: PHOTOGRAPH[:10], ""),
    ("half a PNG", lambda: encoded(Image.effect_noise((64, 64), 9))[:2000], UNREADABLE),
    ("the header of a PNG", lambda: png(8, 8), UNREADABLE),
    ("a text bomb", lambda: png(8, 8, chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(10**8)))), UNREADABLE),
    ("a profile bomb", lambda: png(8, 8, chunk(b"iCCP", b"a\0\0" + zlib.compress(bytes(10**8)))), UNREADABLE),
    ("a wrong checksum", lambda: png(8, 8).replace(b"\x08\0\0\0\0", b"\x08\x03\0\0\0", 1), ""),
]  # fmt: skip


@pytest.mark.parametrize(("make", "message"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
@pytest.mark.parametrize("action", ["error", "ignore"])
def test_a_picture_is_refused_at_once_in_a_short_line(make: Callable[[], bytes], message: str, action: Any) -> None:
    """Whether Pillow's warnings are errors makes no difference."""
    picture = make()
    decode(PHOTOGRAPH)  # Pillow loads its decoders with the first picture
    with warnings.catch_warnings():
        warnings.simplefilter(action)
        started = time.perf_counter()
        with pytest.raises(PictureError) as error:
            preprocess(picture, SETTINGS)
    assert time.perf_counter() - started < 0.25
    assert message in str(error.value)
    assert len(str(error.value)) < 200
    assert str(error.value).isprintable()


def test_a_picture_is_refused_for_the_size_after_the_resize() -> None:
    large = {**SETTINGS, "input_size": [3, 4096, 4096], "crop_pct": 1.0}
    assert preprocess(encoded(Image.new("L", (40, 10))), large).shape == (4096, 4096, 3)
    message = r"^expected 1 to 67,108,864 pixels after the picture is resized, found 20480 x 4096 from 50 x 10$"
    with pytest.raises(PictureError, match=message):
        preprocess(encoded(Image.new("L", (50, 10))), large)
    with pytest.raises(PictureError, match="found 0 x 36 from 1 x 100"):
        preprocess(encoded(Image.new("L", (1, 100))), {**SETTINGS, "input_size": [3, 32, 32], "crop_mode": "border"})


ACCEPTED: list[tuple[str, Callable[[], bytes]]] = [
    ("photograph", lambda: PHOTOGRAPH),
    ("progressive", lambda: encoded(Image.open(io.BytesIO(PHOTOGRAPH)), "JPEG", progressive=True)),
    ("CMYK", lambda: encoded(Image.open(io.BytesIO(PHOTOGRAPH)).convert("CMYK"), "JPEG")),
    ("16 bits", lambda: encoded(Image.fromarray(np.arange(2**16, dtype=np.uint16).reshape(256, 256)))),
    ("palette", lambda: encoded(Image.open(io.BytesIO(PHOTOGRAPH)).quantize(), transparency=3)),
    ("transparent palette", lambda: encoded(Image.open(io.BytesIO(PHOTOGRAPH)).quantize(), transparency=bytes(200))),
    ("transparent", lambda: encoded(Image.effect_noise((64, 64), 90).convert("RGBA"))),
    ("gray with alpha", lambda: encoded(Image.effect_noise((64, 64), 90).convert("LA"))),
    ("one bit", lambda: encoded(Image.effect_noise((64, 64), 90).convert("1"))),
    ("animation", lambda: encoded(Image.new("RGB", (8, 8), "red"), save_all=True,
                                  append_images=[Image.new("RGB", (8, 8), "blue")])),
    ("several in a file", lambda: encoded(Image.new("RGB", (8, 8), "red"), "MPO", save_all=True,
                                          append_images=[Image.new("RGB", (8, 8), "blue")])),
    ("rotated", lambda: encoded(Image.open(io.BytesIO(PHOTOGRAPH)), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12"
                                b"\0\3\0\0\0\1\0\6\0\0\0\0\0\0")),
    ("wrong EXIF", lambda: encoded(Image.new("RGB", (8, 8)), "JPEG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff")),
    ("100 to 1", lambda: encoded(Image.new("L", (1, 100)))),
    ("long text", lambda: encoded(Image.new("L", (8, 8)), pnginfo=text(900_000))),
]  # fmt: skip


def text(length: int) -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    info.add_text("a", "x" * length, zip=True)
    return info


@pytest.mark.parametrize("make", [case[1] for case in ACCEPTED], ids=[case[0] for case in ACCEPTED])
@pytest.mark.filterwarnings("ignore:Palette images with Transparency", "ignore:Corrupt EXIF data")
def test_the_pixels_of_accepted_pictures_are_those_of_pillow(make: Callable[[], bytes], tmp_path: Path) -> None:
    picture = make()
    (tmp_path / "picture").write_bytes(picture)
    with Image.open(io.BytesIO(picture)) as image:
        expected = np.asarray(image.convert("RGB"))
    for source in (picture, str(tmp_path / "picture")):
        assert np.array_equal(np.asarray(decode(source, SETTINGS)), expected)


@pytest.mark.parametrize("make", [lambda: PHOTOGRAPH, many_scans], ids=["photograph", "many scans"])
def test_scans_are_counted_as_pillow_s_decoder_meets_them(make: Callable[[], bytes]) -> None:
    """A thumbnail in the file is no scan, and neither is what follows the end."""
    jpeg = make()
    thumbnail_in_file = b"\xff\xe1" + struct.pack(">H", 200) + (b"Exif\0\0" + 50 * b"\xff\xda\xff\xd9")[:198].ljust(198)
    scans = count_scans(jpeg)
    assert scans == (101 if make is many_scans else jpeg.count(b"\xff\xda"))
    assert count_scans(jpeg[:2] + thumbnail_in_file + jpeg[2:] + 500 * b"\xff\xda\0\x02") == scans


def test_the_largest_pictures_are_accepted() -> None:
    side = int(MAX_PIXELS**0.5)
    assert decode(encoded(Image.new("L", (side, side)), compress_level=1)).size == (side, side)


def program(folder: Path, marker: Path) -> None:
    """Put a program into a folder that leaves a file behind, under the name of Ghostscript."""
    folder.mkdir()
    (folder / "gs").write_text(f"#!/bin/sh\necho started >> {marker}\n")
    (folder / "gs").chmod(0o755)


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.bmp"])
def test_samples_and_the_report_refuse_the_same_pictures_and_start_no_program(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    from PIL import EpsImagePlugin

    program(tmp_path / "bin", tmp_path / "marker")
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)  # Pillow looks for it again
    path = tmp_path / name
    config = {key: value for key, value in SETTINGS.items() if key != "format"}
    transform = picture_transform.transform({**config, "input_size": (3, 224, 224)}, "uint8_nhwc")
    for content, message in (
        (EPS, "expected a picture in JPEG or PNG or WEBP or BMP, found another content"),
        (png(1, 10000), "expected a picture with sides of at most 100 to 1, found 1 x 10000"),
        (png(20000, 20000), "expected a picture of at most 67,108,864 pixels, found far more"),
        (PHOTOGRAPH[:3000], "expected a picture in JPEG or PNG or WEBP or BMP that can be read: "),
    ):
        path.write_bytes(content)
        with pytest.raises(UserError) as error:
            load_samples(str(tmp_path), [str(path)], lambda: transform, SETTINGS, "uint8_nhwc")
        assert str(error.value).startswith(f"{path}: {message}")
        assert thumbnail(str(path)) is None
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("file_format", PICTURE_FORMATS)
def test_samples_may_be_of_four_formats(tmp_path: Path, file_format: str) -> None:
    picture = Image.new("RGB", (8, 8), "red")
    (tmp_path / "a").write_bytes(encoded(picture, file_format))
    image = decode(str(tmp_path / "a"), SETTINGS, PICTURE_FORMATS)
    assert np.abs(np.asarray(image, int) - np.asarray(picture, int)).max() <= 2
    assert (thumbnail(str(tmp_path / "a")) or "").startswith("data:image/webp")
