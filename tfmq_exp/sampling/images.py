"""Images from a denoiser, in shards of fixed seed ranges."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from tfmq_exp.core.finite import require_finite
from tfmq_exp.core.validate import COUNT, SEED, check_fields
from tfmq_exp.denoisers.denoiser import Denoiser
from tfmq_exp.sampling.guidance import Sampling
from tfmq_exp.sampling.sampler import Predict

STREAM = "images"
Rule = Literal["round", "truncate"]


def to_uint8(x: Float[Tensor, "*shape"], rule: Rule) -> UInt8[Tensor, "*shape"]:
    """[-1, 1] to 0 .. 255: the only place where images change their range.

    (x + 1) * 127.5 is rounded by DDIM's own program and by diffusers, and truncated by LDM's scripts; FID can tell.

    Raises:
        NotFiniteError: a NaN, which would become a byte like any other, or an infinity, which would be clamped.
    """
    require_finite(x, "the images that the first stage returns")
    scaled = (x.clamp(-1, 1) + 1) * 127.5
    return (scaled.round() if rule == "round" else scaled).to(torch.uint8)


@dataclass(frozen=True)
class ImagePlan:
    """How many images, from which seed, how many go through the network together, and how they become bytes."""

    count: int
    seed: int
    batch: int
    uint8: Rule = "round"

    def __post_init__(self) -> None:
        check_fields(self, count=COUNT, seed=SEED, batch=COUNT)
        if self.uint8 not in ("round", "truncate"):
            raise ValueError(f"uint8 must be round or truncate, got {self.uint8!r}")

    def shards(self) -> list[range]:
        """Ranges of image indices, one batch each. The last may be short."""
        return [range(start, min(start + self.batch, self.count)) for start in range(0, self.count, self.batch)]


@torch.no_grad()
def sample_shard(
    predict: Predict,
    denoiser: Denoiser,
    sampling: Sampling,
    plan: ImagePlan,
    indices: range,
    each_step: Callable[[int], None] = lambda _: None,
) -> UInt8[Tensor, "batch channels height width"]:
    """Images `indices` of a plan."""
    last = None
    for step in sampling.trajectory(predict, denoiser, seed=plan.seed, stream=STREAM, indices=indices):
        each_step(step.index)
        last = step.x_next
    if last is None:
        raise ValueError("the sampler takes no step")
    return to_uint8(denoiser.first_stage.decode(last), plan.uint8).cpu().contiguous()
