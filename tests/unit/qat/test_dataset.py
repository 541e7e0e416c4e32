"""What is trained on: pixels or latents, their mirror images, their order, their labels."""

import errno
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.helpers.learning import noise_with
from tfmq_exp.data.digits import DigitsImages, load_images
from tfmq_exp.denoisers.denoiser import Conditions, Denoiser, NoConditions
from tfmq_exp.denoisers.loading.condition_encoders import ClassEmbedder
from tfmq_exp.pipeline.stages.weights import label_inputs
from tfmq_exp.qat.conditioning import CocoCaptions, ConditionDropout, FolderClasses
from tfmq_exp.qat.dataset import NoisyBatches, TrainingSet, training_set_identity, write_training_set


class Halves:
    """A first stage whose latents are the images halved in size, and at a tenth."""

    def encode(self, images: Tensor) -> Tensor:
        return images[:, :, ::2, ::2] / 10

    def decode(self, x: Tensor) -> Tensor:
        return (10 * x).repeat_interleave(2, 2).repeat_interleave(2, 3)


class Few:
    """Five images of one channel; a reader that stops where it is told."""

    shape = (1, 4, 4)
    identity: Mapping[str, Any] = {"images": 5}

    def __init__(self, stop: int = 5) -> None:
        self.images = torch.arange(5 * 16).reshape(5, 1, 4, 4).to(torch.uint8)
        self.stop = stop

    def __len__(self) -> int:
        return 5

    def batches(self, size: int) -> Iterator[Tensor]:
        for part in self.images.split(size):
            if int(part[0, 0, 0, 0]) >= 16 * self.stop:
                raise OSError("the disk is gone")
            yield part


def denoiser(shape: tuple[int, int, int], **parts: Any) -> Denoiser:
    return Denoiser("tiny", nn.Linear(1, 1), shape, {}, "sha", **parts)


def test_digits_stay_pixels(tmp_path: Path) -> None:
    write_training_set(DigitsImages(), denoiser((1, 16, 16)), tmp_path, 100, horizontal_flip=False)
    found, wanted = TrainingSet.load(tmp_path), load_images()[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["batches.sha256", "examples.npy"]
    assert torch.equal(torch.from_numpy(np.array(found.values)), wanted)
    taken = found.rows(torch.tensor([3, 1796, 3]))
    torch.testing.assert_close(taken, wanted[[3, 1796, 3]].double().div(255).mul(2).sub(1).float())


def test_latents_of_images_and_of_their_mirror_images_across_an_interruption(tmp_path: Path) -> None:
    model = denoiser((1, 2, 2), first_stage=Halves())
    with pytest.raises(OSError, match="the disk is gone"):
        write_training_set(Few(stop=4), model, tmp_path, 2, horizontal_flip=True)
    reported: list[tuple[int, int]] = []
    write_training_set(Few(), model, tmp_path, 2, horizontal_flip=True, progress=lambda *done: reported.append(done))
    assert reported == [(5, 5)]
    images = Few().images.float() / 127.5 - 1
    both = torch.cat([images, images.flip(3)])
    assert torch.equal(TrainingSet.load(tmp_path).rows(torch.arange(10)), Halves().encode(both))


@pytest.mark.parametrize(
    "damage",
    [
        *("empty hashes", "torn hashes", "foreign hashes", "no hashes", "turned hash"),
        *("turned row", "turned header", "short", "empty", "gone"),
    ],
)
@pytest.mark.parametrize("horizontal_flip", [False, True])
def test_what_an_interruption_leaves_is_used_only_where_it_is_right(
    tmp_path: Path, damage: str, horizontal_flip: bool
) -> None:
    """A kill at any moment, and a bit that turned later: the file is that of an uninterrupted attempt, to the byte."""
    model, whole, broken = denoiser((1, 2, 2), first_stage=Halves()), tmp_path / "whole", tmp_path / "broken"
    whole.mkdir(), broken.mkdir()
    write_training_set(Few(), model, whole, 2, horizontal_flip=horizontal_flip)
    with pytest.raises(OSError, match="the disk is gone"):
        write_training_set(Few(stop=4), model, broken, 2, horizontal_flip=horizontal_flip)
    path = broken / ("batches.sha256" if "hash" in damage else "examples.npy")
    content = bytearray(path.read_bytes())
    bytes_now = {
        "empty hashes": b"",
        "torn hashes": content[:-5],
        "foreign hashes": b"\xff\x00 no\nhashes\n",
        "turned hash": content.replace(content[10:11], b"x"),
        "turned row": content[:130] + bytes([content[130] ^ 4]) + content[131:],
        "turned header": content[:20] + bytes([content[20] ^ 1]) + content[21:],
        "short": content[:-3],
        "empty": b"",
    }
    path.unlink()
    if damage in bytes_now:
        path.write_bytes(bytes_now[damage])
    write_training_set(Few(), model, broken, 2, horizontal_flip=horizontal_flip)
    assert (broken / "examples.npy").read_bytes() == (whole / "examples.npy").read_bytes()


def test_no_room_for_the_examples_is_said_before_the_first_image_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    monkeypatch.setattr(Few, "batches", lambda *_: pytest.fail("an image was read"))
    with pytest.raises(OSError, match=r"No space left on device, for \d+ bytes: '.*examples\.npy'"):
        write_training_set(Few(), denoiser((1, 2, 2), first_stage=Halves()), tmp_path, 2, horizontal_flip=False)
    assert not (tmp_path / "examples.npy").exists()


def test_examples_are_known_by_their_images_and_their_first_stage() -> None:
    pixels, latents = denoiser((1, 4, 4)), denoiser((1, 2, 2), first_stage=Halves())
    other = replace(latents, weights_sha256="another")
    found = [
        training_set_identity(Few(), model, horizontal_flip=False)
        for model in (pixels, replace(pixels, weights_sha256="another"))
    ]
    assert found[0] == found[1]
    assert training_set_identity(Few(), latents, horizontal_flip=False) != training_set_identity(
        Few(), other, horizontal_flip=False
    )
    assert training_set_identity(Few(), latents, horizontal_flip=True) != training_set_identity(
        Few(), latents, horizontal_flip=False
    )


def test_images_of_another_size_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tiny is trained on images \(1, 8, 8\), these are \(1, 4, 4\)"):
        write_training_set(Few(), denoiser((1, 8, 8)), tmp_path, 2, horizontal_flip=False)


def test_every_epoch_sees_every_example_once_in_an_order_of_its_own() -> None:
    batches = NoisyBatches(TrainingSet(np.zeros((10, 1, 2, 2), dtype=np.uint8)), 4, 1000, 0.25, seed=1)
    rows = torch.cat([batches.batch(n).rows for n in range(10)]).reshape(4, 10).tolist()
    assert all(sorted(epoch) == list(range(10)) for epoch in rows)
    assert len({tuple(epoch) for epoch in rows}) == 4
    drawn = [batches.batch(n) for n in range(300)]
    t = torch.cat([batch.t for batch in drawn]).double()
    assert 0 <= t.min() < 10
    assert 990 < t.max() < 1000
    assert abs(t.mean() - 499.5) < 4 * 288.7 / 1200**0.5
    assert abs(torch.cat([batch.conditioned for batch in drawn]).double().mean() - 0.75) < 4 * 0.433 / 1200**0.5
    assert torch.equal(batches.batch(7).noise, drawn[7].noise)
    assert not torch.equal(drawn[7].noise, replace(batches, seed=2).batch(7).noise)


def test_noise_has_the_variance_of_its_timestep() -> None:
    alphas = torch.tensor([0.9, 0.5, 0.1])
    clean, noise, t = torch.full((3, 1, 50, 50), 2.0), torch.randn(3, 1, 50, 50), torch.tensor([2, 0, 1])
    x = noise_with(alphas).noisy(clean, noise, t)
    assert torch.allclose(x.mean((1, 2, 3)), 2 * alphas[t].sqrt(), atol=0.1)
    assert torch.allclose(x.var((1, 2, 3)), 1 - alphas[t], rtol=0.15)


class Files:
    names: Sequence[str] = ("n02/a.png", "n01/c.png", "n02/b.png")


def test_classes_are_folders_and_captions_those_of_coco(tmp_path: Path) -> None:
    files: Any = Files()
    assert list(FolderClasses().of(files)) == [1, 0, 1]
    content = {
        "images": [{"id": 7, "file_name": "a.png"}, {"id": 8, "file_name": "b.png"}, {"id": 9, "file_name": "c.png"}],
        "annotations": [
            {"id": 5, "image_id": 7, "caption": "later"},
            {"id": 1, "image_id": 9, "caption": " third "},
            {"id": 2, "image_id": 7, "caption": "first"},
            {"id": 3, "image_id": 8, "caption": "second"},
        ],
    }
    path = tmp_path / "captions.json"
    path.write_text(json.dumps(content))
    assert CocoCaptions(str(path)).of(files) == ["first", "third", "second"]
    content["annotations"].pop()
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"no caption for 1 images, first b\.png"):
        CocoCaptions(str(path)).of(files)
    with pytest.raises(TypeError, match="DigitsImages has none"):
        FolderClasses().of(DigitsImages())


def test_rows_are_told_their_class_or_none() -> None:
    vectors = torch.eye(4)  # three classes, and none
    conditions = ConditionDropout(ClassEmbedder(vectors), [2, 0])
    rows, conditioned = torch.tensor([0, 1, 2]), torch.tensor([True, False, True])  # row 2 is the mirror image of row 0
    found = conditions(rows, conditioned, torch.device("cpu"))["encoder_hidden_states"]
    assert torch.equal(found[:, 0], vectors[[2, 3, 2]])
    assert ConditionDropout(NoConditions(), ())(rows, conditioned, torch.device("cpu")) == {}
    with pytest.raises(ValueError, match="conditioned on nothing, neither class nor caption: got 1"):
        ConditionDropout(NoConditions(), [1, 2])(rows, conditioned, torch.device("cpu"))
    no_null: Any = lambda labels: Conditions({"encoder_hidden_states": vectors[labels, None]})  # noqa: E731
    with pytest.raises(ValueError, match="must be 0"):
        ConditionDropout(no_null, [1, 2])(rows, conditioned, torch.device("cpu"))


def test_other_labels_of_the_same_images_are_another_training() -> None:
    given: list[Sequence[Any]] = [(), [0, 1, 1], [0, 1, 0], ["a cat", "a dog", "a dog"], ["a cat", "a dog", "a cat"]]
    keys = [json.dumps(label_inputs(labels)) for labels in given]
    assert len(set(keys)) == len(given)
    assert label_inputs([0, 1, 1]) == label_inputs((0, 1, 1))
    assert label_inputs(()) == {}, "where the network is unconditional, the key is that of the images"


def test_rows_are_as_noisy_as_their_timesteps() -> None:
    clean, noise = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    alphas = torch.tensor([0.96, 0.36])
    found = noise_with(alphas).noisy(clean, noise, torch.tensor([1, 0]))
    torch.testing.assert_close(found[0], 0.6 * clean[0] + 0.8 * noise[0])
    torch.testing.assert_close(found[1], 0.96**0.5 * clean[1] + 0.2 * noise[1])
