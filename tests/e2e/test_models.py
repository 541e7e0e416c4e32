"""Every published model, from a tiny checkpoint in its original format: load, calibrate, sample, decode; one of each kind to its table."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from tests.e2e.jobs import job
from tests.helpers.inception import random_weights

GOLDENS = Path(__file__).parents[1] / "goldens/compvis"
# configuration, recorded weights, side of the images, and what a caption or label needs
MODELS: dict[str, tuple[str, int, tuple[str, ...]]] = {
    "ddim_cifar10": ("ddim_cifar10", 8, ()),
    "ldm_bedroom": ("ldm_lsun_beds", 64, ("runtime.estimate=true",)),
    "ldm_church": ("ldm_lsun_churches", 128, ()),
    "ldm_ffhq": ("ldm_ffhq_ema", 64, ()),  # the architecture of ldm_celebahq, too
    "ldm_imagenet": ("ldm_cin256_v2", 64, ("model.sampling.conditioning.count=10",)),
    "sd_v1_4": ("sd_v1", 128, ()),
}
JUDGED = ("ddim_cifar10", "ldm_church", "ldm_imagenet", "sd_v1_4")  # Inception sees pixels of the others alike

pytestmark = pytest.mark.filterwarnings("ignore::Warning:pytorch_lightning")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random Inception weights, a tokenizer of single letters and two captions."""
    folder = tmp_path_factory.mktemp("shared")
    torch.save(random_weights(0), folder / "inception.pth")
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    words = [*letters, *(f"{letter}</w>" for letter in letters)]
    vocabulary = {word: i for i, word in enumerate(words)} | {"<|startoftext|>": 97, "<|endoftext|>": 98}
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer/vocab.json").write_text(json.dumps(vocabulary))
    (folder / "tokenizer/merges.txt").write_text("#version: 0.2\n")
    (folder / "captions.txt").write_text(f"a cat\n{'two dogs ' * 20}\n")
    return folder


def checkpoint(name: str, folder: Path) -> Path:
    """The recorded weights as the original programs save them."""
    state = {key: value.clone() for key, value in load_file(GOLDENS / f"{name}.model.safetensors").items()}
    state = {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
    if not name.startswith("ddim") and not any(key.startswith("model_ema.") for key in state):
        names = [key for key in state if key.startswith("model.")]
        state |= {f"model_ema.{key.removeprefix('model.').replace('.', '')}": state[key] for key in names}
    content = state if name.startswith("ddim") else {"state_dict": state, "epoch": 3, "global_step": 7}
    torch.save(content, folder / "model.ckpt")
    return folder / "model.ckpt"


def real_images(folder: Path, side: int) -> Path:
    generator = np.random.default_rng(0)
    folder.mkdir()
    for i in range(12):
        coarse = Image.fromarray(generator.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize((side, side), Image.Resampling.BILINEAR).save(folder / f"{i}.png")
    return folder


@pytest.mark.parametrize("model", MODELS)
def test_model(model: str, tmp_path: Path, shared: Path) -> None:
    recorded, side, more = MODELS[model]
    if model == "sd_v1_4":
        more = (
            "runtime.estimate=true",
            f"model.denoiser.tokenizer={shared / 'tokenizer'}",
            f"model.sampling.conditioning.path={shared / 'captions.txt'}",
        )
    folder = job(
        tmp_path,
        f"model={model}",
        "debug=smoke",
        "protocol.sampling.images=10",
        f"model.denoiser.path={checkpoint(recorded, tmp_path)}",
        f"model.denoiser.config={GOLDENS / f'{recorded}.config.yaml'}",
        "data=image_folder",
        f"data.path={real_images(tmp_path / 'real', side)}",
        f"data.size={side}",
        f"paths.inception={shared / 'inception.pth'}",
        f"until={'scores' if model in JUDGED else 'images'}",
        *more,
    )
    assert json.loads((folder / "quantized.json").read_text())["weight_share"] == 1.0
    assert (folder / "samples.png").is_file()
    if model not in JUDGED:
        return
    rows: list[dict[str, Any]] = json.loads((folder / "results.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["float", "tfmq"]
    for row in rows:
        assert row["model"] == model
        assert row["scores"]["fid"] > 1
        assert row["scores"]["sfid"] > 1
        assert row["scores"]["is"] >= 1
        assert "Inception" in row["evaluator"]["name"]
    assert rows[1]["quantized"]["weight_share"] == 1.0
    assert rows[1]["errors"]["trajectory"] > 0
    counts = {"different": 2, "cut": 1, "tokens": 77} if model == "sd_v1_4" else None
    assert all(row["protocol"].get("captions") == counts for row in rows)
    guided = rows[0]["protocol"]["guidance"] != 1.0
    assert guided == (model in ("ldm_imagenet", "sd_v1_4"))
