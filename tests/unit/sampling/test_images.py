"""Plans of images, and their bytes."""

import pytest
import torch

from tests.helpers.sampling import SHAPE, predictor
from tfmq_exp.denoisers.denoiser import Denoiser
from tfmq_exp.sampling.guidance import Sampling
from tfmq_exp.sampling.images import ImagePlan, sample_shard, to_uint8
from tfmq_exp.sampling.samplers import DDIM

FOUR = Sampling(DDIM(4))


def test_shards_are_the_whole_run(denoiser: Denoiser) -> None:
    plan = ImagePlan(count=7, seed=5, batch=3)
    assert [list(shard) for shard in plan.shards()] == [[0, 1, 2], [3, 4, 5], [6]]
    predict = predictor(denoiser.network)
    shards = [sample_shard(predict, denoiser, FOUR, plan, indices) for indices in plan.shards()]
    assert [(shard.dtype, tuple(shard.shape)) for shard in shards] == [(torch.uint8, (n, *SHAPE)) for n in (3, 3, 1)]
    alone = sample_shard(predict, denoiser, FOUR, plan, range(4, 5))
    assert int((shards[1][1].int() - alone[0].int()).abs().max()) <= 1


@pytest.mark.parametrize(("count", "batch"), [(0, 1), (1, 0), (-1, 4)])
def test_empty_image_plans_are_refused(count: int, batch: int) -> None:
    with pytest.raises(ValueError, match=r"ImagePlan\.(count|batch) must be a whole number, at least 1 .*, got -?\d+$"):
        ImagePlan(count, 0, batch)


def test_to_uint8_boundaries() -> None:
    half = 0.5 / 127.5
    x = torch.tensor([-7.0, -1.0, -1 + 0.9 * half, -1 + 1.1 * half, 1 - 1.1 * half, 1 - 0.9 * half, 1.0, 7.0])
    assert to_uint8(x, "round").tolist() == [0, 0, 0, 1, 254, 255, 255, 255]
    assert to_uint8(x, "truncate").tolist() == [0, 0, 0, 0, 254, 254, 255, 255]
    assert to_uint8(x, "round").dtype is torch.uint8
    every = torch.arange(256)
    assert torch.equal(to_uint8(every / 127.5 - 1, "round").long(), every)
