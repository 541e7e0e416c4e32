"""Prompts of images and of calibration: which image has which, and that no prompt is in both."""

import json
from pathlib import Path

import pytest

from tests.e2e.jobs import composed
from tfmq_exp.cli.make_run import make_sampling
from tfmq_exp.core.seeds import Stream
from tfmq_exp.sampling.conditioning import hash_of
from tfmq_exp.sampling.prompt_sets import PromptSets, PromptSubset

pytestmark = pytest.mark.bad_input


def subset(path: Path, *lines: str) -> PromptSubset:
    path.write_text("\n".join(lines) + "\n")
    return PromptSubset.read(str(path))


def test_images_and_calibration_have_prompts_of_their_own(tmp_path: Path) -> None:
    sets = PromptSets(
        subset(tmp_path / "a.txt", "a cat", "a dog"), subset(tmp_path / "b.txt", "a house", "a tree", "a car")
    )
    assert sets.choose(0, Stream.IMAGES, range(3, 6)) == ["a dog", "a cat", "a dog"]
    for stream in (Stream.CALIBRATION, Stream.CORRECTION, Stream.DIAGNOSTICS):
        assert sets.choose(1, stream, [0, 2, 3]) == ["a house", "a car", "a house"]


@pytest.mark.parametrize("same", ["a  cat ", "A CAT", "a cat"])
def test_a_prompt_in_both_is_refused(tmp_path: Path, same: str) -> None:
    images, calibration = subset(tmp_path / "a.txt", "a dog", "a cat"), subset(tmp_path / "b.txt", "a tree", same)
    with pytest.raises(ValueError, match=r"1 of 2 prompts in .*a.txt are among those of calibration, .*b.txt: 'a cat'"):
        PromptSets(images, calibration)


def test_a_subset_is_of_its_file_and_notices_changes(tmp_path: Path) -> None:
    path = tmp_path / "meta_data.json"
    path.write_text(json.dumps({name: {"category": "c", "prompt": f"the {name}"} for name in "dcba"}))
    chosen = PromptSubset.read(str(path), 2)
    assert (chosen.texts, chosen.sha256) == (("the d", "the c"), hash_of(["the d", "the c"]))
    assert chosen != PromptSubset.read(str(path), 3)
    again = PromptSubset.read(str(path), 2)
    path.write_text(path.read_text().replace("the c", "another"))
    with pytest.raises(ValueError, match="has changed since the run began"):
        _ = again.texts
    with pytest.raises(ValueError, match=r"meta_data.json: 5 prompts are asked for, and there are 4"):
        PromptSubset.read(str(path), 5)
    with pytest.raises(ValueError, match="count must be a whole number"):
        PromptSubset.read(str(path), 0)
    with pytest.raises(
        FileNotFoundError, match=r"no prompts at .*none.tsv: nothing is downloaded; put the list of X there"
    ):
        PromptSubset.read(str(tmp_path / "none.tsv"), origin="the list of X")


def test_cocos_annotations_are_captions(tmp_path: Path) -> None:
    rows = [{"image_id": i, "id": 9 - i, "caption": f"caption {i}"} for i in (2, 1)]
    path = tmp_path / "captions_val.json"
    path.write_text(json.dumps({"info": {}, "images": [], "annotations": rows}))
    assert PromptSubset.read(str(path)).texts == ("caption 1", "caption 2")
    path.write_text('{"annotations": [\n{"image_id" 1}]}')
    with pytest.raises(ValueError, match=r"captions_val.json, line 2: damaged"):
        PromptSubset.read(str(path))


def test_a_preset_names_its_files_and_replaces_the_models_captions(tmp_path: Path) -> None:
    words = ("model=sd_v1_4", "prompts=parti", f"paths.data={tmp_path}")
    cfg = composed(tmp_path / "out", *words)
    assert cfg.protocol.sampling.images == 1632
    with pytest.raises(Exception, match=r"PartiPrompts.tsv of github.com/google-research/parti"):
        make_sampling(cfg)
    (tmp_path / "prompts").mkdir()
    (tmp_path / "prompts/PartiPrompts.tsv").write_text("Prompt\tNote\na corgi\t\n")
    lines = [f"'{i:04d}': caption {i}\n" for i in range(200)]
    (tmp_path / "prompts/qdiff.yaml").write_text("".join(lines))
    conditioning = make_sampling(cfg).conditioning
    assert isinstance(conditioning, PromptSets)
    assert (conditioning.images.texts, len(conditioning.calibration.texts)) == (("a corgi",), 128)
    with pytest.raises(ValueError, match="both say what images are of"):
        make_sampling(composed(tmp_path / "out", *words, "captions=x.txt"))
