"""Calibration data is the float model's trajectories."""

import pytest
import torch

from tests.helpers.calibration import collect
from tests.helpers.sampling import SCHEDULE, SHAPE, predictor
from tfmq_exp.calibration.timesteps import EveryKth
from tfmq_exp.core.seeds import Stream, image_generators, initial_noise
from tfmq_exp.denoisers.denoiser import Conditions, Denoiser
from tfmq_exp.sampling.guidance import Sampling
from tfmq_exp.sampling.samplers import DDIM
from tfmq_exp.sampling.trajectory import trajectory

CPU = torch.device("cpu")
NONE = Conditions()
FOUR = Sampling(DDIM(4))


def test_collection_calls_the_denoiser_once_per_step(denoiser: Denoiser) -> None:
    calls: list[int] = []
    handle = denoiser.network.register_forward_hook(lambda *_: calls.append(1))
    seen: list[int] = []
    data = collect(denoiser, FOUR, images=5, seed=3, batch=2, each_step=seen.append)
    handle.remove()
    assert len(calls) == 3 * 4
    assert seen == [0, 1, 2, 3] * 3
    assert len(data) == 4 * 5


def test_collected_inputs_are_the_trajectory(denoiser: Denoiser) -> None:
    data = collect(denoiser, FOUR, images=5, seed=3, batch=2)
    assert data.step.tolist() == [0] * 5 + [1] * 5 + [2] * 5 + [3] * 5
    assert data.image.tolist() == [0, 1, 2, 3, 4] * 4
    for indices in (range(2), range(2, 4), range(4, 5)):
        generators = image_generators(3, Stream.CALIBRATION, indices)
        x = initial_noise(generators, SHAPE, CPU)
        for step in trajectory(predictor(denoiser.network), DDIM(4), SCHEDULE, x, generators, NONE):
            rows = (data.step == step.index) & torch.isin(data.image, torch.tensor(indices))
            assert torch.equal(data.x[rows], step.x)
            assert set(data.t[rows].tolist()) == {step.t}


def test_evaluation_does_not_see_calibration_noise(denoiser: Denoiser) -> None:
    calibration = collect(denoiser, Sampling(DDIM(1)), images=8, seed=0, batch=8).x
    evaluation = initial_noise(image_generators(0, Stream.IMAGES, range(8)), SHAPE, CPU)
    distances = torch.cdist(calibration.flatten(1), evaluation.flatten(1))
    assert distances.min() > 10  # independent noise in 192 dimensions is about 19.6 apart


@pytest.mark.parametrize("k", [1, 2, 3, 9])
def test_every_kth_step_with_its_rows(denoiser: Denoiser, k: int) -> None:
    data = collect(denoiser, FOUR, images=2, seed=3, batch=2)
    kept = EveryKth(k)(data)
    rows = [row for row in range(8) if (row // 2) % k == 0]
    assert torch.equal(kept.x, data.x[rows])
    assert torch.equal(kept.t, data.t[rows])
    assert torch.equal(kept.image, data.image[rows])


def test_every_zeroth_step_is_refused() -> None:
    with pytest.raises(ValueError, match="got 0"):
        EveryKth(0)
