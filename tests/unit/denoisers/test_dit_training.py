"""Training of a rectified flow by class: paths, velocity, labels, the first steps."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import tfmq_exp  # noqa: F401 - before diffusers, whose warnings about other packages it drops
from tfmq_exp.data.digits import load_images

sys.path.insert(0, str(Path(__file__).parents[3] / "scripts"))

from diffusers import DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler
from digits_training.flow_samples import sample_classes
from digits_training.rectified_flow import (
    RectifiedFlowTraining,
    draw_times,
    drop_labels,
    keep_labels,
    noisy_images,
    start_at_identity,
    velocity,
)


def tiny_dit() -> DiTTransformer2DModel:
    return DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=1,
        out_channels=1,
        num_layers=2,
        sample_size=16,
        patch_size=4,
        num_embeds_ada_norm=10,
        norm_eps=1e-6,
    )


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


class TrueVelocity(nn.Module):
    """The velocity of known images, solved for the noise; it keeps what it was called with."""

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self.images, self.calls = images, []

    def forward(self, noisy: Tensor, timestep: Tensor, class_labels: Tensor) -> SimpleNamespace:
        self.calls.append((timestep, class_labels))
        s = timestep.double().reshape(-1, 1, 1, 1) / 1000
        noise = (noisy.double() - (1 - s) * self.images) / s
        return SimpleNamespace(sample=(noise - self.images).float())


def test_paths_are_those_of_diffusers() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000)
    scheduler.set_timesteps(7)
    torch.testing.assert_close(scheduler.timesteps, 1000 * scheduler.sigmas[:-1], rtol=0, atol=0)
    images, noise = torch.randn(2, 7, 1, 4, 4)
    expected = scheduler.scale_noise(images, scheduler.timesteps, noise)
    torch.testing.assert_close(noisy_images(images, noise, scheduler.sigmas[:-1]), expected)


def test_the_velocity_is_the_derivative_of_the_path() -> None:
    images, noise = torch.randn(2, 3, 1, 4, 4, dtype=torch.float64)
    s = torch.rand(3, dtype=torch.float64)
    quotient = (noisy_images(images, noise, s + 0.25) - noisy_images(images, noise, s)) / 0.25  # paths are straight
    torch.testing.assert_close(velocity(images, noise), quotient)


def test_the_true_velocity_has_no_loss_and_its_samples_are_the_images() -> None:
    pixels, labels = (part[:256] for part in load_images())
    images = pixels.double() / 127.5 - 1
    network = TrueVelocity(images)
    module = RectifiedFlowTraining(tiny_dit(), steps=1)
    module.network = network
    module.log = lambda *_, **__: None
    assert module.training_step((pixels, labels), 0) < 1e-9
    ((timesteps, given),) = network.calls
    assert timesteps.dtype == torch.float32
    assert 0 < timesteps.min() < 200 < 800 < timesteps.max() < 1000
    assert set(given[given != labels].tolist()) == {10}

    two = TrueVelocity(images[:2].repeat(2, 1, 1, 1))  # with guidance every image is there twice
    torch.testing.assert_close(sample_classes(two, labels[:2], guidance=3.0, steps=5), pixels[:2])


def test_times_are_logit_normal() -> None:
    logits = draw_times(20_000).double().logit()
    probabilities = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    normal = torch.distributions.Normal(0.0, 1.0).icdf(probabilities)
    torch.testing.assert_close(logits.quantile(probabilities), normal, rtol=0, atol=0.05)


def test_a_tenth_of_the_labels_becomes_the_null_class() -> None:
    labels = torch.arange(20_000) % 10
    dropped = drop_labels(labels)
    changed = dropped != labels
    assert (dropped[changed] == 10).all()
    assert abs(changed.float().mean() - 0.1) < 0.01
    per_class = torch.bincount(labels[changed], minlength=10) / 2000
    assert ((per_class - 0.1).abs() < 0.04).all()
    assert (drop_labels(labels, 1.0) == 10).all()
    assert (drop_labels(labels, 0.0) == labels).all()


def test_diffusers_drops_no_labels_of_its_own() -> None:
    images, t, labels = torch.randn(64, 1, 16, 16), torch.full((64,), 500.0), torch.arange(64) % 10
    dit = tiny_dit().train()
    assert not torch.equal(dit(images, t, labels).sample, dit(images, t, labels).sample)
    keep_labels(dit)
    kept = dit(images, t, labels).sample
    torch.testing.assert_close(kept, dit(images, t, labels).sample, rtol=0, atol=0)
    torch.testing.assert_close(kept, dit.eval()(images, t, labels).sample)
    assert not torch.equal(kept, dit(images, t, torch.full_like(labels, 10)).sample)


def test_blocks_start_as_the_identity_and_the_velocity_as_zero() -> None:
    dit = start_at_identity(tiny_dit()).eval()
    calls: list[tuple[Tensor, Tensor]] = []
    for block in dit.transformer_blocks:
        block.register_forward_hook(lambda _, inputs, output: calls.append((inputs[0], output)))
    found = dit(torch.randn(3, 1, 16, 16), torch.tensor([1.0, 500.0, 999.0]), torch.tensor([0, 5, 10])).sample
    assert len(calls) == 2
    for before, after in calls:
        torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert not found.any()


def test_the_loss_starts_at_that_of_zero_and_falls() -> None:
    pixels, labels = load_images()
    module = RectifiedFlowTraining(tiny_dit(), steps=100)
    module.log = lambda *_, **__: None
    first = float(module.training_step((pixels, labels), 0).detach())
    of_zero = 1 + float((pixels / 127.5 - 1).square().mean())  # noise and image are independent
    assert first == pytest.approx(of_zero, abs=0.02)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    for _ in range(40):
        rows = torch.randint(len(pixels), (128,))
        optimizer.zero_grad()
        module.training_step((pixels[rows], labels[rows]), 0).backward()
        optimizer.step()
    with torch.no_grad():
        assert module.training_step((pixels, labels), 0) < 0.5 * first
