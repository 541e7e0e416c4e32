"""Pictures of every format, mode and size, and files that are none: read as documented, or named as what they are."""

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from tfmq_exp.data.decoding import decode
from tfmq_exp.data.folder import SUFFIXES, ImageFolder
from tfmq_exp.data.preparation import (
    AliasedResizeThenCrop,
    CropThenResize,
    HalveThenResizeThenCrop,
    Preparation,
    ResizeThenCrop,
    Unchanged,
)

pytestmark = pytest.mark.bad_input

PIXELS = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
RGB = Image.fromarray(PIXELS)
SMOOTH = Image.fromarray((np.mgrid[0:256:16, 0:256:16].sum(0) // 2).astype(np.uint8)[..., None].repeat(3, 2))


def encoded(image: Image.Image, form: str, **how: object) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **how)
    return file.getvalue()


def source(folder: Path, size: int = 16) -> ImageFolder:
    return ImageFolder(str(folder), size, Unchanged())


def png_header(width: int, height: int) -> bytes:
    """A PNG that says its size and has no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


LOSSLESS = {
    **{".png": "PNG", ".apng": "PNG", ".webp": "WEBP", ".bmp": "BMP", ".dib": "BMP", ".tif": "TIFF", ".tiff": "TIFF"},
    **{".ppm": "PPM", ".pnm": "PPM", ".jp2": "JPEG2000", ".j2k": "JPEG2000", ".tga": "TGA", ".qoi": "QOI"},
    **{".jpf": "JPEG2000", ".jpx": "JPEG2000"},
}
LOSSY = {".jpg": "JPEG", ".jpeg": "JPEG", ".jpe": "JPEG", ".jfif": "JPEG", ".avif": "AVIF"}
FLAT = {".gif": "GIF", ".pgm": "PPM", ".pbm": "PPM"}  # 256 colours, grey, black and white


def test_every_suffix_is_tried_here() -> None:
    assert set(SUFFIXES) == {*LOSSLESS, *LOSSY, *FLAT}


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("case", [str.lower, str.upper])
def test_pictures_of_all_formats_are_read(tmp_path: Path, suffix: str, case: Callable[[str], str]) -> None:
    form = (LOSSLESS | LOSSY | FLAT)[suffix]
    image = {".pgm": RGB.convert("L"), ".pbm": RGB.convert("1"), ".gif": RGB.quantize(200)}.get(suffix, RGB)
    image = SMOOTH if suffix in LOSSY else image
    (tmp_path / case(f"a{suffix}")).write_bytes(encoded(image, form, **({"lossless": True} if form == "WEBP" else {})))
    (found,) = source(tmp_path).batches(9)
    expected = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
    assert (found[0].int() - expected.int()).abs().float().mean() <= (3 if suffix in LOSSY else 0)


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.tif"])
@pytest.mark.parametrize("form", ["PNG", "BMP", "GIF", "TIFF", "QOI"])
def test_the_content_says_the_format_and_not_the_name(tmp_path: Path, name: str, form: str) -> None:
    image = RGB.quantize(200).convert("RGB")
    (tmp_path / name).write_bytes(encoded(image, form))
    assert next(source(tmp_path).batches(1))[0].permute(1, 2, 0).numpy().tolist() == np.asarray(image).tolist()


OTHERS = {
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n": "it is PostScript",
    b"%PDF-1.7\n": "it is a PDF",
    b"<!DOCTYPE html><html>404": r"it is a web page \(HTML\)",
    b"\n <HTML>": r"it is a web page \(HTML\)",
    b"version https://git-lfs.github.com/spec/v1\n": "it is a pointer of Git LFS",
    b"<svg xmlns='http://www.w3.org/2000/svg'/>": "it is XML",
    b"PK\x03\x04": "it is a zip archive",
    b"": "it is empty",
    b"\xff\xd8\xff\xe0" + b"x" * 99: "it begins as a picture, and is damaged",
    b"\x89PNG\r\n\x1a\n" + b"x" * 99: "it begins as a picture, and is damaged",
    b"\0" * 999: "no PNG, JPEG, WEBP",
    b"GRIB" + b"\0" * 99: "no PNG, JPEG, WEBP",
}


@pytest.mark.parametrize("content", OTHERS, ids=lambda content: str(content[:12]))
@pytest.mark.parametrize("name", ["a.png", "a.tga"])
def test_other_files_are_named_as_what_they_are(name: str, content: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("a program was started"))
    with pytest.raises(ValueError, match=f"{name} cannot be read as an image .*{OTHERS[content]}"):
        decode(name, content, 8, ResizeThenCrop())


@pytest.mark.filterwarnings("ignore:Truncated File Read")
@pytest.mark.parametrize("share", [0.1, 0.3, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("suffix", sorted({*LOSSLESS, *LOSSY, ".gif"}))
def test_truncated_files_are_named(suffix: str, share: float) -> None:
    content = encoded(RGB, (LOSSLESS | LOSSY | FLAT)[suffix])
    with pytest.raises(ValueError, match=f"x{suffix} cannot be read as an image"):
        decode(f"x{suffix}", content[: int(len(content) * share)], 16, Unchanged())


GREY = RGB.convert("L")
MODES: dict[str, tuple[bytes, Image.Image]] = {
    "1 bit": (encoded(RGB.convert("1"), "PNG"), RGB.convert("1")),
    "grey": (encoded(GREY, "PNG"), GREY),
    "grey and transparent": (encoded(Image.merge("LA", [GREY, GREY.rotate(90)]), "PNG"), GREY),
    "transparent": (encoded(Image.merge("RGBA", [*RGB.split(), GREY]), "PNG"), RGB),
    "transparent tiff": (encoded(Image.merge("RGBA", [*RGB.split(), GREY]), "TIFF"), RGB),
    "palette": (encoded(RGB.quantize(99), "PNG"), RGB.quantize(99)),
    "transparent colour": (encoded(RGB.quantize(99), "PNG", transparency=3), RGB.quantize(99)),
    "transparent palette": (encoded(RGB.quantize(99), "PNG", transparency=bytes(range(99))), RGB.quantize(99)),
    "orientation": (encoded(RGB, "PNG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0"), RGB),
    "profile": (
        encoded(RGB, "PNG", icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()),
        RGB,
    ),
    "animation": (encoded(RGB, "PNG", save_all=True, append_images=[RGB.rotate(90)]), RGB),
    "pages": (encoded(RGB, "TIFF", save_all=True, append_images=[RGB.rotate(90)]), RGB),
    "cmyk": (encoded(RGB.convert("CMYK"), "TIFF"), RGB),
}


@pytest.mark.parametrize("name", MODES)
@pytest.mark.filterwarnings("error")
def test_modes_become_rgb_as_documented(name: str) -> None:
    content, expected = MODES[name]
    np.testing.assert_array_equal(decode(name, content, 16, Unchanged()), np.asarray(expected.convert("RGB")))


def test_cmyk_of_adobes_jpegs_is_not_inverted() -> None:
    flat = Image.new("CMYK", (16, 16), (200, 40, 10, 0))  # much cyan
    found = decode("a.jpg", encoded(flat, "JPEG", quality=100), 16, Unchanged())
    assert np.abs(found.astype(int) - (55, 215, 245)).max() <= 2


def test_colours_of_sixteen_bits_keep_the_upper_eight() -> None:
    wide = np.random.default_rng(1).integers(0, 65536, (16, 16, 3)).astype(">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in wide)
    head = png_header(16, 16)
    start = head[:24] + b"\x10" + head[25:29]  # 16 bits
    kind = b"IHDR" + start[16:29]
    content = start + struct.pack(">I", zlib.crc32(kind))
    for name, data in ((b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        content += struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    np.testing.assert_array_equal(decode("a.png", content, 16, Unchanged()), (wide >> 8).astype(np.uint8))


@pytest.mark.parametrize(
    ("image", "form"),
    [
        (Image.fromarray(np.full((16, 16), 40_000, np.uint16)), "PNG"),
        (Image.fromarray(np.full((16, 16), 40_000, np.uint16)), "TIFF"),
        (Image.fromarray(np.full((16, 16), 40_000, np.int32)), "TIFF"),
        (Image.fromarray(np.full((16, 16), 0.5, np.float32)), "TIFF"),
        (Image.fromarray(np.full((16, 16), 40_000, np.uint16)), "PPM"),
        (Image.fromarray(np.full((16, 16), 40_000, np.uint16)), "JPEG2000"),
    ],
    ids=lambda value: getattr(value, "mode", value),
)
def test_grey_of_more_than_eight_bits_is_refused_and_never_clipped(image: Image.Image, form: str) -> None:
    with pytest.raises(ValueError, match=r"depth has pixels of mode [IF].*at most 8 bits per channel"):
        decode("depth", encoded(image, form), 16, Unchanged())


@pytest.mark.parametrize(
    ("width", "height", "named"),
    [
        (50_000, 50_000, "2500000000 pixels"),
        (2**31 - 1, 2**31 - 1, "pixels"),
        (12_000, 12_000, "12000x12000, at most 89478485 pixels"),
        (89_478_486, 1, "89478486x1, at most"),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_sizes_are_judged_before_pixels_are_decoded(
    width: int, height: int, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("pixels were decoded"))
    with pytest.raises(ValueError, match=f"big is too large to be decoded.*{named}"):
        decode("big", png_header(width, height), 16, ResizeThenCrop())


@pytest.mark.parametrize(
    "preparation",
    [ResizeThenCrop(), HalveThenResizeThenCrop(), AliasedResizeThenCrop()],
    ids=lambda p: type(p).__name__,
)
def test_a_thread_of_pixels_does_not_fill_the_memory(preparation: Preparation) -> None:
    content = encoded(Image.new("L", (60_000, 1)), "PNG")
    with pytest.raises(
        ValueError, match=r"long, 60000x1 pixels: its short side resized, it would have \d+x\d+; at most"
    ):
        decode("long", content, 256, preparation)
    assert decode("long", content, 256, CropThenResize()).shape == (256, 256, 3)
    assert decode("dot", encoded(Image.new("L", (1, 1), 7), "PNG"), 64, preparation).tolist() == [[[7] * 3] * 64] * 64
