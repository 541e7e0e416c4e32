"""Classes and captions of images, by plan."""

import json
from pathlib import Path

import pytest

from tfmq_exp.sampling.conditioning import Captions, Classes, Unconditional
from tfmq_exp.sampling.guidance import Sampling
from tfmq_exp.sampling.samplers import DDIM


@pytest.mark.parametrize("count", [1, 2, 3, 4, 10, 12, 997, 1000])
def test_classes_in_turn_are_balanced_in_every_part(count: int) -> None:
    labels = Classes(count).choose(0, "images", range(3 * count))
    for start in (0, 1, count // 2, count):
        assert sorted(labels[start : start + count]) == [*range(count)]


@pytest.mark.parametrize("images", [8, 32, 256])
def test_few_images_are_spread_over_all_classes(images: int) -> None:
    labels = sorted(Classes(1000).choose(0, "calibration", range(images)))
    gaps = [b - a for a, b in zip(labels, [*labels[1:], labels[0] + 1000], strict=True)]
    golden = (1 + 5**0.5) / 2
    assert max(gaps) < golden**2 * 1000 / images  # what steps of the golden section leave at most


def test_random_classes_depend_on_seed_stream_and_image_alone() -> None:
    plan = Classes(1000, "random")
    labels = plan.choose(0, "images", range(2000))
    assert plan.choose(0, "images", [5, 17]) == [labels[5], labels[17]]
    assert plan.choose(1, "images", range(2000)) != labels != plan.choose(0, "calibration", range(2000))
    assert len(set(labels)) > 800  # 2000 draws of 1000 leave about 135 out


def test_captions_of_a_text_file_and_of_coco(tmp_path: Path) -> None:
    text, coco = tmp_path / "captions.txt", tmp_path / "captions_val2014.json"
    text.write_text("a cat\n  two dogs \n")
    plan = Captions.read(str(text))
    assert plan.choose(0, "images", range(3)) == ["a cat", "two dogs", "a cat"]
    rows = [
        {"image_id": 9, "id": 1, "caption": "nine"},
        {"image_id": 3, "id": 8, "caption": "three, later"},
        {"image_id": 3, "id": 2, "caption": " three"},
    ]
    coco.write_text(json.dumps({"annotations": rows}))
    assert Captions.read(str(coco)).choose(0, "images", range(2)) == ["three", "nine"]
    assert Captions.read(str(coco)).sha256 != plan.sha256


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", " \n", "holds no captions"),
        ("wrong.json", "[1]", "not a COCO caption file"),
        (None, "", "no captions at"),
    ],
)
def test_captions_that_cannot_be_read_are_named(tmp_path: Path, name: str | None, content: str, message: str) -> None:
    path = tmp_path / (name or "nowhere.txt")
    if name:
        path.write_text(content)
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        Captions.read(str(path))
    assert str(path) in str(error.value)


def test_plans_that_cannot_be_are_named() -> None:
    with pytest.raises(ValueError, match="got 0"):
        Classes(0)
    with pytest.raises(ValueError, match="'sideways'"):
        Classes(2, "sideways").choose(0, "images", [0])  # type: ignore[arg-type]
    assert list(Unconditional().choose(0, "images", range(3))) == []
    with pytest.raises(ValueError, match="'float8'"):
        Sampling(DDIM(4), precision="float8")  # type: ignore[arg-type]
