"""Files of prompts: rows as their publishers write them, deepcompressor's subsets, and damaged files by their lines."""

import json
import random
from pathlib import Path

import pytest
from PIL import Image

from tfmq_exp.data.mjhq import mjhq_images
from tfmq_exp.data.preparation import Unchanged
from tfmq_exp.data.prompt_files import choose_names, read_prompts

MJHQ = {
    f"{i * 7919 % 9973:04x}": {"category": "art" if i % 2 else "food", "prompt": f"picture {i} "} for i in range(40)
}
PARTI = 'Prompt\tCategory\tChallenge\tNote\nbond\tAbstract\tBasic\t\n"G I G" on a wall\tIllustrations\tWriting\t\n'
DRAWBENCH = 'Prompts,Category\r\n"A red, and a blue ""car"".",Colors\r\nTwo dogs,Counting\r\n'
GENEVAL = '{"tag": "single_object", "include": [], "prompt": "a photo of a bench"}\n{"prompt": "two cows"}\n'


def test_rows_as_their_publishers_write_them(tmp_path: Path) -> None:
    files = {
        "PartiPrompts.tsv": (PARTI, ["bond", '"G I G" on a wall']),
        "DrawBench.csv": (DRAWBENCH, ['A red, and a blue "car".', "Two dogs"]),
        "evaluation_metadata.jsonl": (GENEVAL, ["a photo of a bench", "two cows"]),
        "meta_data.json": (json.dumps(MJHQ), [f"picture {i}" for i in range(40)]),
        "qdiff.yaml": (
            "'0000': 'three people '\n'0001': A cat in front of\n  a screen.\n",
            ["three people", "A cat in front of a screen."],
        ),
    }
    for name, (content, expected) in files.items():
        (tmp_path / name).write_text(content, newline="")
        assert list(read_prompts(tmp_path / name).values()) == expected, name
    assert list(read_prompts(tmp_path / "meta_data.json")) == list(MJHQ)


def test_a_shuffled_subset_is_deepcompressors() -> None:
    """Its own lines, on the same names: shuffled by `random.Random(0)`, cut, sorted."""
    names = list(MJHQ)
    expected = list(names)
    random.Random(0).shuffle(expected)
    assert choose_names(names, 12, "shuffled") == sorted(expected[:12]) != names[:12]
    assert choose_names(names, 12, "first") == names[:12]
    assert choose_names(names, None, "shuffled") == names
    with pytest.raises(ValueError, match="41 prompts are asked for, and there are 40"):
        choose_names(names, 41, "first")


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.tsv", "Text\tNote\nbond\t\n", r"a.tsv, line 1: no column prompt or prompts in \['Text', 'Note'\]"),
        ("a.tsv", "Prompt\tNote\nbond\t\nonly\n", r"a.tsv, line 3: 1 cells under 2 titles"),
        ("a.tsv", "Prompt\tNote\nbond\t\n \tx\n", r"a.tsv, line 3: the prompt must be a text, got ' '"),
        ("a.tsv", "", r"a.tsv, line 1: no column prompt or prompts in \[\]"),
        ("a.tsv", "Prompt\n", r"a.tsv holds no prompts"),
        ("a.csv", 'Prompts,Category\n"open,Colors\n', r"a.csv, line 2: damaged, unexpected end of data"),
        ("a.csv", 'Prompts\n"a"b\n', r"a.csv, line 2: damaged"),
        ("a.jsonl", '{"prompt": "a"}\n{"prompt": "b"\n', r"a.jsonl, line 2: damaged"),
        ("a.jsonl", '{"prompt": "a"}\n\n', r"a.jsonl, line 2: damaged"),
        ("a.jsonl", '{"prompt": "a"}\n{"tag": "b"}\n', r"a.jsonl, line 2: the prompt must be a text, got None"),
        ("a.jsonl", "[1]\n", r"a.jsonl, line 1: the prompt must be a text, got \[1\]"),
        ("a.json", '{"a": {"prompt": "b"},\n"c" 1}', r"a.json, line 2: damaged, Expecting ':' delimiter"),
        ("a.json", '["a"]', r"a.json holds a list: expected MJHQ-30K"),
        ("a.json", '{"a": {"prompt": 3}}', r"a.json, a: the prompt must be a text, got 3"),
        ("a.json", "[" * 10_000, r"a.json is damaged"),
        ("a.yaml", "a: b\nc: [d\n", r"a.yaml, line 3: damaged"),
        ("a.yaml", "a: !!python/object/apply:os.system [ls]\n", r"a.yaml, line 1: damaged"),
        ("a.yaml", "a: {b: c}\n", r"a.yaml, a: the prompt must be a text, got None"),
        ("a.parquet", "x", r"a.parquet is no file of prompts"),
    ],
)
def test_damaged_files_are_named_with_their_line(tmp_path: Path, name: str, content: str, said: str) -> None:
    (tmp_path / name).write_text(content, newline="")
    with pytest.raises(ValueError, match=said):
        read_prompts(tmp_path / name)


def test_images_of_mjhq_are_those_of_the_chosen_prompts(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"mjhq30k_imgs.zip, unpacked, beside meta_data.json"):
        mjhq_images(str(tmp_path), 8, Unchanged())
    (tmp_path / "meta_data.json").write_text(json.dumps(MJHQ))
    for i, (name, record) in enumerate(MJHQ.items()):
        folder = tmp_path / "mjhq30k_imgs" / record["category"]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (i, 2 * i, 3 * i)).save(folder / f"{name}.jpg")
    images = mjhq_images(str(tmp_path), 8, Unchanged(), 5)
    chosen = [f"{MJHQ[name]['category']}/{name}.jpg" for name in choose_names(list(MJHQ), 5, "shuffled")]
    assert sorted(images.names) == sorted(chosen)
    assert (len(images), len(mjhq_images(str(tmp_path), 8, Unchanged()))) == (5, 40)
    (tmp_path / "mjhq30k_imgs" / chosen[2]).unlink()
    with pytest.raises(FileNotFoundError, match="1 of 5 images listed in the list are not in"):
        mjhq_images(str(tmp_path), 8, Unchanged(), 5)
    record = {"category": 1, "prompt": "x"}
    (tmp_path / "meta_data.json").write_text(json.dumps({"a": record}))
    with pytest.raises(ValueError, match=r"meta_data.json, a: expected texts `category` and `prompt`"):
        mjhq_images(str(tmp_path), 8, Unchanged())
