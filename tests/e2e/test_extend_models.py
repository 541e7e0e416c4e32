"""Models of one's own, as the guide to extending the project shows them."""

import importlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification

from tests.e2e.test_extend import PAGE, lab, rows, run, stored  # noqa: F401 - fixtures
from tests.e2e.test_models import GOLDENS, checkpoint
from tfmq_exp.denoisers.families.find import family_of

pytestmark = pytest.mark.filterwarnings("ignore::Warning:pytorch_lightning")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, tiny_unet: nn.Module) -> Path:
    """What a user has: a diffusers folder, a feature extractor, an original checkpoint with its configuration, images."""
    root = tmp_path_factory.mktemp("files")
    saved: Any = tiny_unet
    saved.save_pretrained(root / "flowers-ddpm/unet")
    DDPMScheduler().save_pretrained(root / "flowers-ddpm/scheduler")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic")
        ResNetForImageClassification(config).save_pretrained(root / "resnet-flowers")
    (root / "cars256").mkdir()
    checkpoint("ldm_lsun_beds", root / "cars256")
    (root / "cars256/config.yaml").write_text((GOLDENS / "ldm_lsun_beds.config.yaml").read_text())
    (root / "flowers").mkdir()
    generator = np.random.default_rng(0)
    for i in range(12):
        Image.fromarray(generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(root / f"flowers/{i}.png")
    return root


def frechet(one: Tensor, other: Tensor) -> float:
    """The distance of two Gaussians, from its formula."""
    (m1, m2), (s1, s2) = (np.mean(x, 0) for x in (one, other)), (np.cov(x, rowvar=False) for x in (one, other))
    roots = np.sqrt(np.clip(np.linalg.eigvals(s1 @ s2).real, 0, None))
    return float(((m1 - m2) ** 2).sum() + np.trace(s1) + np.trace(s2) - 2 * roots.sum())


def test_a_diffusers_folder_and_the_extractor(lab: Path, files: Path, tmp_path: Path) -> None:
    places = (f"paths.checkpoints={files}", f"paths.data={files}", "data.size=8", "eval.extract.side=32")
    found = run(lab, tmp_path, "model=flowers", "method=nearest", *places, "protocol.sampling.images=16")
    row = rows(found)[1]
    assert row["model"] == "flowers"
    assert row["evaluator"]["name"] == "ResNet flowers"
    extractor = importlib.import_module("ideas.resnet_extractor")
    extract = extractor.resnet_extractor(str(files / "resnet-flowers"), side=32, version=1)
    assert row["evaluator"]["sha256"] == extract.identity["sha256"]
    images = torch.cat([load_file(file)["images"] for file in sorted(stored(found, "images").glob("*.safetensors"))])
    real = np.stack([np.asarray(Image.open(file)).transpose(2, 0, 1) for file in (files / "flowers").glob("*.png")])
    features = (extract(x).pooled.double().numpy() for x in (torch.tensor(real), images))
    assert row["scores"]["fid"] == pytest.approx(frechet(*features), rel=1e-3)


def test_an_original_checkpoint(lab: Path, files: Path, tmp_path: Path) -> None:
    places = (f"paths.checkpoints={files}", f"data.path={files / 'flowers'}", "data.size=64")
    found = run(lab, tmp_path, "model=ldm_cars", "method=nearest", "until=trajectory", *places)
    inputs = json.loads((stored(found, "trajectory") / "inputs.json").read_text())
    assert inputs["model"] == "ldm_cars"
    cfg = OmegaConf.load(found / "config.yaml")
    assert cfg.model.denoiser.config == str(files / "cars256/config.yaml")
    assert cfg.protocol.sampling.eta == 0.0  # ldm_bedroom: 1


def test_another_family_is_asked_for() -> None:
    with pytest.raises(ValueError, match="a Linear is a denoiser of no known family; known: UNet2DModel") as error:
        family_of(nn.Linear(1, 1))
    assert f"*{str(error.value).split(';')[0]}*" in " ".join(PAGE.split())
