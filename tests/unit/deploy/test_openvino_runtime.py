"""A folder that holds no exported model, or a damaged one, is refused by the file that is wrong."""

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openvino")
from tfmq_exp.deploy.openvino.runtime import FORMAT, ExportedUNet

pytestmark = pytest.mark.bad_input

GOOD = {"deployed.json": json.dumps({"format": FORMAT, "timesteps": [3, 1]}), "model.xml": "<net/>", "model.bin": "x"}
ROW = {"attention": "a", "scores": "f32"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        *(({name: None}, f"there is no {name}") for name in GOOD),
        *(({name: "version https://git-lfs.github.com/spec/v1\n"}, f"{name} is a pointer of Git LFS") for name in GOOD),
        *(({"deployed.json": text}, "deployed.json is damaged") for text in ("", "{", "[" * 100_000, "<html>")),
        *(({"deployed.json": text}, "is of format None") for text in ("[]", "3", "null", "{}")),
        ({"deployed.json": '{"format": "x"}'}, "is of format 'x'"),
        *(({"deployed.json": {"timesteps": t}}, "timesteps must be") for t in (None, [], [-1], ["1"], [1.5], {}, 3)),
        *(
            ({"deployed.json": {"timesteps": [3], "attention": a}}, "attention must be rows of names and scores")
            for a in (None, {}, [3], [{"attention": "a"}], [ROW | {"scores": "f16"}], [ROW | {"attention": 1}])
        ),
        *(({"model.xml": text}, "model.xml or model.bin is damaged") for text in ("", "x", "<net/>", "<html></html>")),
    ],
)
def test_what_is_no_exported_model(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    for name, text in (GOOD | changes).items():
        content = json.dumps({"format": FORMAT, **text}) if isinstance(text, dict) else text
        if content is not None:
            (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=r"\S") as caught:
        ExportedUNet(tmp_path)
    assert words in str(caught.value)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)
