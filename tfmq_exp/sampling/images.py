"""Images from a denoiser, in shards of consecutive indices."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from tfmq_exp.core.batches import batches
from tfmq_exp.core.finite import require_finite
from tfmq_exp.core.seeds import Stream
from tfmq_exp.core.validate import COUNT, SEED, check_fields, one_of
from tfmq_exp.denoisers.denoiser import Denoiser
from tfmq_exp.sampling.guidance import Sampling
from tfmq_exp.sampling.trajectory import Predict

ToUint8 = Literal["round", "truncate"]


def to_uint8(x: Float[Tensor, "*shape"], rule: ToUint8) -> UInt8[Tensor, "*shape"]:
    """[-1, 1] to 0 .. 255, the only place where images change their range.

    (x + 1) * 127.5 is rounded by DDIM's own program and by diffusers, and truncated by LDM's scripts; FID depends on it.

    Raises:
        NotFiniteError: a NaN, which would become a byte like any other, or an infinity, which would be clamped.
    """
    require_finite(x, "the images that the first stage returns")
    scaled = (x.clamp(-1, 1) + 1) * 127.5
    return (scaled.round() if rule == "round" else scaled).to(torch.uint8)


@dataclass(frozen=True)
class ImagePlan:
    """Images to sample: their number, seed, the batch that goes through the network together, and the rule of `to_uint8`."""

    count: int
    seed: int
    batch: int
    uint8: ToUint8 = "round"

    def __post_init__(self) -> None:
        check_fields(self, count=COUNT, seed=SEED, batch=COUNT, uint8=one_of("round", "truncate"))

    def shards(self) -> list[range]:
        """Ranges of image indices, one batch each."""
        return batches(self.count, self.batch)


@torch.no_grad()
def sample_shard(
    predict: Predict,
    denoiser: Denoiser,
    sampling: Sampling,
    plan: ImagePlan,
    indices: range,
    each_step: Callable[[int], None] = lambda _: None,
) -> UInt8[Tensor, "batch channels height width"]:
    """Images `indices` of a plan.

    Args:
        predict: the network's prediction after guidance, see `Sampling.predictor`.
        denoiser: first stage, conditions and schedule.
        sampling: sampler and conditions.
        plan: seed and rule of `to_uint8`.
        indices: of the images.
        each_step: called with the index of each finished step.
    """
    x = torch.empty(0)  # every sampler takes a step
    for step in sampling.trajectory(predict, denoiser, seed=plan.seed, stream=Stream.IMAGES, indices=indices):
        each_step(step.index)
        x = step.x_next
    return to_uint8(denoiser.first_stage.decode(x), plan.uint8).cpu().contiguous()
