"""Samples of the transformer by class, with classifier-free guidance: scores by the classifier, and a picture."""

from pathlib import Path
from typing import Any

import torch
from diffusers import DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from digits_training.rectified_flow import CLASSES, TIMESTEPS
from digits_training.training import save_picture
from tfmq_exp.data.digits import IMAGE_SIZE, load_images
from tfmq_exp.denoisers.digits import load_classifier
from tfmq_exp.evaluation.metrics import FeatureMoments, FrechetDistance

GUIDANCES = (1.0, 1.5, 2.0, 3.0)
BATCH = 64
SHOWN = 2.0  # guidance of the picture


def guided_velocity(
    dit: DiTTransformer2DModel, images: Float[Tensor, "batch 1 16 16"], t: Tensor, labels: Tensor, guidance: float
) -> Float[Tensor, "batch 1 16 16"]:
    """Velocity of the null class plus `guidance` times the difference to the asked one (arXiv 2207.12598).

    Args:
        dit: the network.
        images: points of the paths.
        t: the timestep, 0-d, 0 to 1000.
        labels: classes, one for each image.
        guidance: the paper's 1 + w; 1 for the velocity of the class itself.
    """
    both: Any = torch.cat([labels, torch.full_like(labels, CLASSES)])
    timesteps: Any = t.expand(len(both))  # annotated as a LongTensor there
    conditional, null = dit(torch.cat([images, images]), timesteps, both).sample.chunk(2)
    return null + guidance * (conditional - null)


@torch.no_grad()
def sample_classes(
    dit: DiTTransformer2DModel, labels: Int[Tensor, "batch"], guidance: float, steps: int = 20, seed: int = 0
) -> UInt8[Tensor, "batch 1 16 16"]:
    """Images of the asked classes by Euler's method, all in one batch.

    Args:
        dit: the network in evaluation mode, on the CPU.
        labels: classes, 0 to 9.
        guidance: scale of classifier-free guidance, 1 for none.
        steps: of Euler's method, two evaluations each.
        seed: of the initial noise.
    """
    scheduler: Any = FlowMatchEulerDiscreteScheduler(num_train_timesteps=TIMESTEPS)  # its annotations are too narrow
    scheduler.set_timesteps(steps)
    images = torch.randn(len(labels), 1, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(seed))
    for t in scheduler.timesteps:
        images = scheduler.step(guided_velocity(dit, images, t, labels, guidance), t, images).prev_sample
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def scores_by_guidance(dit: DiTTransformer2DModel, count: int = 512, steps: int = 20) -> dict[str, Any]:
    """Fréchet distance to all real digits and share classified as asked, for `count` samples of every class in turn.

    Features are the classifier's. `real` is of as many real digits, each drawn at random from its class: what a perfect
    sampler would get.
    """
    (images, real_labels), (classifier, _) = load_images(), load_classifier()
    moments = FeatureMoments(64)
    moments.update(classifier(images).pooled)
    statistics = moments.compute()

    def scores(images: Tensor, labels: Tensor) -> dict[str, float]:
        features, distance = classifier(images), FrechetDistance(statistics)
        distance.update(features.pooled)
        accuracy = (features.logits.argmax(1) == labels).float().mean()
        return {"fid": float(distance.compute()), "accuracy": float(accuracy)}

    labels = torch.arange(count) % CLASSES
    of_class = (real_labels == labels[:, None]).float()
    drawn = torch.multinomial(of_class, 1, generator=torch.Generator().manual_seed(0)).squeeze(1)
    by_guidance = {}
    for scale in GUIDANCES:
        batches = [sample_classes(dit, part, scale, steps, seed) for seed, part in enumerate(labels.split(BATCH))]
        by_guidance[str(scale)] = scores(torch.cat(batches), labels)
    real = scores(images[drawn], labels)
    return {"images": count, "euler_steps": steps, "guidance": by_guidance, "real": real}


def save_class_samples(dit: DiTTransformer2DModel, path: Path, rows: int = 6) -> None:
    """Write a picture of guided samples: a column for each digit."""
    labels = torch.arange(CLASSES).repeat(rows)
    save_picture(sample_classes(dit, labels, SHOWN).numpy(), CLASSES, path)
