"""The transformer by class that the project ships, and how its training samples it."""

import json
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tfmq_exp.denoisers.digits import WEIGHTS, build_dit, load_classifier, read_weights

sys.path.insert(0, str(Path(__file__).parents[3] / "scripts"))

from diffusers import DiTTransformer2DModel
from digits_training.flow_samples import guided_velocity, sample_classes

STEPS = 6


@pytest.fixture(scope="module")
def dit() -> DiTTransformer2DModel:
    network = build_dit()
    sha256 = read_weights(network, WEIGHTS / "digits_dit.safetensors")
    record = json.loads((WEIGHTS / "digits_dit.json").read_text())
    assert sha256 == record["sha256"]
    assert sum(p.numel() for p in network.parameters()) == record["parameters"]
    return network.eval().requires_grad_(False)


def test_samples_are_digits_of_the_asked_class_and_differ(dit: DiTTransformer2DModel) -> None:
    labels = torch.arange(50) % 10
    images = sample_classes(dit, labels, guidance=1.5, steps=STEPS, seed=1)
    assert images.dtype == torch.uint8
    assert images.shape == (50, 1, 16, 16)
    classifier, _ = load_classifier()
    assert (classifier(images).logits.argmax(1) == labels).float().mean() >= 0.9
    by_class = images.float().reshape(5, 10, -1)
    assert (by_class.std(dim=0).mean(dim=-1) > 10).all()  # of 255: one image per class would give 0


def test_samples_are_those_of_a_plain_euler_loop(dit: DiTTransformer2DModel) -> None:
    labels, guidance = torch.tensor([3, 8]), 2.0
    x = torch.randn(2, 1, 16, 16, generator=torch.Generator().manual_seed(4))
    s = [1 + (0.001 - 1) * i / (STEPS - 1) for i in range(STEPS)] + [0.0]

    def velocity(classes: Tensor, at: float) -> Tensor:
        return dit(x, torch.full((2,), 1000 * at), classes).sample

    for now, after in pairwise(s):
        conditional, null = velocity(labels, now), velocity(torch.tensor([10, 10]), now)
        x = x + (after - now) * ((1 - guidance) * null + guidance * conditional)
    expected = ((x.clamp(-1, 1) + 1) * 127.5).round()
    images = sample_classes(dit, labels, guidance, steps=STEPS, seed=4)
    assert (images.float() - expected).abs().max() <= 1  # a value near a half may round either way
    assert (images.float() != expected).float().mean() < 0.01


def test_guidance_of_one_is_the_velocity_of_the_class(dit: DiTTransformer2DModel) -> None:
    images, labels = torch.randn(3, 1, 16, 16, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 5, 9])
    t = torch.tensor(640.0)
    alone = dit(images, t.expand(3), labels).sample
    torch.testing.assert_close(guided_velocity(dit, images, t, labels, 1.0), alone, rtol=0, atol=1e-5)
    assert (guided_velocity(dit, images, t, labels, 0.0) - alone).abs().max() > 0.05  # the null class is another
