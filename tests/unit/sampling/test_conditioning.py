"""Line i is the caption of image i, whatever wrote the file."""

import codecs
import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from tfmq_exp.core.text_files import read_lines
from tfmq_exp.data.folder import read_listing
from tfmq_exp.sampling.conditioning import Captions, read_captions, read_coco

pytestmark = pytest.mark.bad_input

TWO = ["a café", "two dogs"]
TEXT = "a café\ntwo dogs\n"


@pytest.mark.parametrize(
    "data",
    [
        TEXT.encode(),
        TEXT.rstrip().encode(),
        TEXT.replace("\n", "\r\n").encode(),
        TEXT.replace("\n", "\r").encode(),
        TEXT.encode("utf-8-sig"),
        codecs.BOM_UTF8 + TEXT.encode("utf-8-sig"),
        codecs.BOM_UTF16_LE + TEXT.encode("utf-16-le"),
        codecs.BOM_UTF16_BE + TEXT.replace("\n", "\r\n").encode("utf-16-be"),
        codecs.BOM_UTF32_LE + TEXT.encode("utf-32-le"),
        codecs.BOM_UTF32_BE + TEXT.encode("utf-32-be"),
        "\ta café \n two dogs\t\n".encode(),
        "a café\n\ufefftwo dogs\n".encode(),  # two files with marks, joined
    ],
)
def test_the_same_two_captions(data: bytes, tmp_path: Path) -> None:
    file = tmp_path / "captions.txt"
    file.write_bytes(data)
    assert list(read_captions(file)) == TWO
    assert Captions.read(str(file)).choose(0, "images", range(3)) == [*TWO, TWO[0]]


@pytest.mark.parametrize("caption", ["<cat-toy> on a beach", "<x>", "{a, b}", "[a]", "mustard", "🦩", "?", "\u200da"])
def test_captions_of_unusual_signs_are_captions(caption: str, tmp_path: Path) -> None:
    file = tmp_path / "captions.txt"
    for text in (f"{caption}\n", f"{'a' * (258 - len(caption))}{caption}\n"):
        file.write_text(text, encoding="utf-8")
        assert read_captions(file) == (text.strip(),)


@pytest.mark.parametrize("separator", ["\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"])
def test_only_ends_of_lines_end_lines(separator: str, tmp_path: Path) -> None:
    file = tmp_path / "captions.txt"
    file.write_text(f"a{separator}cat\ntwo dogs\n", encoding="utf-8", newline="")
    assert read_captions(file) == (f"a{separator}cat", "two dogs")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("a\ncafé\n".encode("latin-1"), "is not UTF-8: byte 0xe9 in line 2; save it as UTF-8"),
        ("猫\n".encode("shift-jis"), "is not UTF-8: byte 0x94 in line 1"),
        (codecs.BOM_UTF8 + "café\n".encode("latin-1"), "is not UTF-8: byte 0xe9 in line 1"),
        (codecs.BOM_UTF16_LE + b"a\0\n\0b", "is not UTF-16-LE"),
        ("a\nb\n".encode("utf-16-le"), "NUL character in line 1: UTF-16 without a byte order mark"),
        ("a\nb\n".encode("utf-16-be"), "NUL character in line 1"),
        (b"a\nb\0c\n", "NUL character in line 2"),
        (b"a\rb\nc\n", "a carriage return inside line 1"),
        (b"a\nb\n\x1a", "line 3 is blank"),
        ("a\n\u200b\nb\n".encode(), "line 2 is blank"),
        ("\u200e\n\u00ad\u3000\n".encode(), "holds no captions"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 3\n", "is a pointer of Git LFS"),
        (b"\xef\xbb\xbf<!DOCTYPE html>\n<html><body>404</body></html>\n", "is a web page"),
        (gzip.compress(b"a cat\n", mtime=0), "is a gzip archive"),
        (b"a\n\nb\n", "line 2 is blank: line i is the caption of image i"),
        (b"\na\n", "line 1 is blank"),
        (b"a\n \t \nb\n\xc2\x85\n", "2 lines are blank, first line 2"),
        (b"a\nb\n\n", "line 3 is blank"),
        (b"", "holds no captions"),
        (b"\n \n", "holds no captions"),
        (codecs.BOM_UTF8, "holds no captions"),
    ],
)
def test_what_could_shift_captions_is_refused(data: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "captions.txt"
    file.write_bytes(data)
    with pytest.raises(ValueError, match=message) as caught:
        Captions.read(str(file))
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "image,caption\n1000268201_69.jpg,A child in a pink dress\n1000268201_70.jpg,A girl\n",  # Flickr8k
        "1000268201_69.jpg#0\tA child in a pink dress\n1000268201_69.jpg#1\tA girl\n",
        "image| comment\n1.jpg| a cat\n1.jpg| a dog\n",  # Flickr30k
        '"a b","c"\n"1.PNG","a cat"\n',
        "a.webp;a cat\n",
        '{"file_name": "1.png", "text": "a cat"}\n{"file_name": "2.png", "text": "a dog"}\n',
        '{"text": "a cat"}\n',
        '["a cat", "a dog"]',
        '[\n  "a cat",\n  "a dog"\n]\n',
        '{\n "annotations": []\n}\n',
    ],
)
def test_tables_under_the_name_of_a_text(text: str, tmp_path: Path) -> None:
    (tmp_path / "captions.txt").write_text(text)
    with pytest.raises(ValueError, match=r"captions\.txt is a table: give a text file with one caption a line"):
        read_captions(tmp_path / "captions.txt")


@pytest.mark.parametrize(
    "lines",
    [
        ("a cat, logo.png, 4k", "a dog"),
        ("a.png, as a painting", "a dog"),
        ("[cat], best quality", "{dog}"),
        ("[", "{"),
        ('{"a": 1}', "a dog"),
    ],
)
def test_captions_that_are_like_rows_of_tables(lines: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "captions.txt").write_text("\n".join(lines))
    assert read_captions(tmp_path / "captions.txt") == lines


@pytest.mark.parametrize("sign", ["\0", "\ud83d"])
def test_characters_of_no_text_in_json(sign: str, tmp_path: Path) -> None:
    file = tmp_path / "captions.json"
    file.write_text(json.dumps(coco((1, 1, "a cat"), (2, 2, f"a {sign} dog"))))
    with pytest.raises(ValueError, match=r"captions\.json: caption 2 has a character that is in no text: 'a "):
        read_captions(file)
    file.write_text(json.dumps(coco((1, 1, "🦩"))))  # a pair in JSON
    assert read_captions(file) == ("🦩",)


def test_what_is_no_file_of_captions(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a folder; expected a text file"):
        read_captions(tmp_path)
    for name in ("a.csv", "a.tsv", "a.JSONL", "a.parquet", "a.xlsx"):
        (tmp_path / name).write_text("1,a cat\n")
        with pytest.raises(ValueError, match=f"{name} is a table"):
            read_captions(tmp_path / name)
    with pytest.raises(FileNotFoundError, match="no captions at"):
        read_captions(tmp_path / "nowhere.txt")


def coco(*rows: tuple[Any, Any, Any], images: list[Any] | None = None) -> dict[str, Any]:
    annotations = [{"image_id": image, "id": number, "caption": caption} for image, number, caption in rows]
    return {"annotations": annotations} | ({} if images is None else {"images": images})


def image(number: int) -> dict[str, Any]:
    return {"id": number, "file_name": f"{number}.jpg"}


def test_coco_has_the_first_caption_of_every_image_in_the_order_of_ids(tmp_path: Path) -> None:
    file = tmp_path / "captions.JSON"
    content = coco(
        (9, 1, "nine"),
        (3, 8, "later"),
        (3, 1000, ""),
        (3, 2, " three\n"),
        (3, 0, " "),
        (10, 5, "ten"),
        images=[image(n) for n in (10, 3, 9)],
    )
    for data in (json.dumps(content).encode(), json.dumps(content).encode("utf-8-sig")):
        file.write_bytes(data)
        assert read_captions(file) == ("three", "nine", "ten")
        assert read_coco(file).names == {3: "3.jpg", 9: "9.jpg", 10: "10.jpg"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "is not a COCO caption file"),
        (["a cat"], "expected names with values, got a list; captions alone go into a text file"),
        ({}, "KeyError 'annotations'"),
        ({"annotations": {}}, "annotations must be of type list"),
        (coco(), "holds no captions"),
        (coco((1, 1, None)), "caption must be of type str, got None"),
        (coco(("1", 1, "a")), "image_id must be of type int, got '1'"),
        (coco((True, 1, "a")), "image_id must be of type int, got True"),
        ({"annotations": [{"image_id": 1, "caption": "a"}]}, "KeyError 'id'"),
        (coco((1, 1, "a"), (2, 7, " ")), "1 images have only blank captions, first image 2"),
        (coco((1, 1, "a"), (2, 1, "b")), "1 annotations share their id with another, first 1"),
        (coco((1, 1, "a"), images=[image(2), image(1), image(3)]), "2 of 3 images have no caption, first image 2"),
    ],
)
def test_coco_files_that_could_shift_captions(content: Any, message: str, tmp_path: Path) -> None:
    file = tmp_path / "captions.json"
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as caught:
        read_captions(file)
    assert str(file) in str(caught.value)


def test_a_file_that_changes_during_a_run(tmp_path: Path) -> None:
    file = tmp_path / "captions.txt"
    file.write_text(TEXT, encoding="utf-8")
    plan = Captions.read(str(file))
    file.write_text("another\n", encoding="utf-8")
    with pytest.raises(ValueError, match="has changed since the run began"):
        plan.choose(0, "images", [0])


def test_listings_of_images_are_read_alike(tmp_path: Path) -> None:
    for name in ("a.png", "b c.png", "é.png"):
        (tmp_path / name).write_bytes(b"")
    listing = tmp_path / "list.txt"
    listing.write_bytes("é.png\r\n\r\nb c.png\r\n".encode("utf-8-sig"))
    assert read_listing(listing, tmp_path) == ["b c.png", "é.png"]
    assert read_lines(listing) == ["é.png", "", "b c.png"]
    listing.write_bytes("é.png\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r"list\.txt is not UTF-8"):
        read_listing(listing, tmp_path)
    with pytest.raises(ValueError, match="is a folder"):
        read_listing(tmp_path, tmp_path)
