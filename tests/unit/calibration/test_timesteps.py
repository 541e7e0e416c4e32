"""Which calibration samples are kept, on trajectories whose every sample says where it comes from."""

import math

import pytest
import torch
from torch import Tensor

from tfmq_exp.calibration.dataset import CalibrationSet
from tfmq_exp.calibration.timesteps import EveryKth, NormallyDistributed

IMAGES = 7


def timestep(step: int, steps: int) -> int:
    return 1 + 1000 // steps * (steps - 1 - step)


def trajectories(steps: int, images: int = IMAGES) -> CalibrationSet:
    """x of a sample is 1000 step + image; its condition is -x."""
    step, image = torch.arange(steps).repeat_interleave(images), torch.arange(images).repeat(steps)
    x = (1000.0 * step + image).reshape(-1, 1, 1, 1)
    t = torch.tensor([timestep(int(s), steps) for s in step])
    return CalibrationSet(x, t, step, image, {"text": -x.flatten()})


def text(data: CalibrationSet) -> Tensor:
    """What the rows are conditioned on."""
    return data.inputs(torch.device("cpu"))["text"]


def origins(data: CalibrationSet) -> list[tuple[int, int]]:
    """Step and image that every stored x was made at."""
    return [divmod(int(value), 1000) for value in data.x.flatten()]


@pytest.mark.parametrize(
    ("steps", "k", "expected"), [(100, 5, list(range(0, 100, 5))), (50, 2, list(range(0, 50, 2))), (4, 1, [0, 1, 2, 3])]
)
def test_selector_takes_every_kth_step_with_all_its_images(steps: int, k: int, expected: list[int]) -> None:
    kept = EveryKth(k)(trajectories(steps))
    assert len(expected) == {100: 20, 50: 25, 4: 4}[steps]
    assert origins(kept) == [(step, image) for step in expected for image in range(IMAGES)]
    assert kept.t.tolist() == [timestep(step, steps) for step, _ in origins(kept)]
    assert torch.equal(text(kept), -kept.x.flatten())


@pytest.mark.parametrize(("mean", "std"), [(0.4, 0.05), (0.5, 0.1), (0.3, 0.07)])
def test_drawn_levels_have_the_requested_mean_and_spread(mean: float, std: float) -> None:
    samples, steps = 4096, 1000  # so narrow that nothing is clamped
    levels = NormallyDistributed(samples, mean, std).positions(steps).double() / steps
    error = 4 * std / math.sqrt(samples)
    assert float(levels.mean()) == pytest.approx(mean - 0.5 / steps, abs=error)
    assert float(levels.std()) == pytest.approx(std, rel=4 / math.sqrt(2 * samples))
    assert 0 < float(levels.min()) < float(levels.max()) < 1 - 1 / steps


@pytest.mark.parametrize("steps", [4, 20, 250])
def test_wide_draws_are_clamped_to_both_ends(steps: int) -> None:
    samples, mean, std = 4096, 0.4, 0.4
    levels = NormallyDistributed(samples, mean, std).positions(steps)

    def below(level: int) -> float:
        """Chance of a draw below a level, before clamping."""
        return 0.5 * (1 + math.erf((level / steps - mean) / std / math.sqrt(2)))

    for level, chance in ((0, below(1)), (steps - 1, 1 - below(steps - 1)), (steps // 2, None)):
        chance = below(level + 1) - below(level) if chance is None else chance
        share = float((levels == level).double().mean())
        assert share == pytest.approx(chance, abs=4 * math.sqrt(chance / samples))
    assert levels.min() == 0
    assert levels.max() == steps - 1


@pytest.mark.parametrize("steps", [4, 20, 100])
def test_every_sample_has_the_label_of_its_own_noise_level(steps: int) -> None:
    policy = NormallyDistributed(200, 0.4, 0.4, seed=3)
    kept, levels = policy(trajectories(steps)), policy.positions(steps).tolist()
    assert len(kept) == 200
    for (step, _), level, t, labelled in zip(origins(kept), levels, kept.t.tolist(), kept.step.tolist(), strict=True):
        assert step == labelled == steps - 1 - level
        assert t == timestep(step, steps)
    assert kept.image.tolist() == [image for _, image in origins(kept)]
    assert torch.equal(text(kept), -kept.x.flatten())


@pytest.mark.parametrize("steps", [4, 20, 100])
def test_released_labels_count_from_the_wrong_end(steps: int) -> None:
    policy = NormallyDistributed(200, 0.4, 0.4, seed=3, released_labels=True)
    kept = policy(trajectories(steps))
    for (step, image), drawn, t, labelled, own in zip(
        origins(kept),
        policy.positions(steps).tolist(),
        kept.t.tolist(),
        kept.step.tolist(),
        kept.image.tolist(),
        strict=True,
    ):
        j = min(drawn, steps - 2)  # after the last reverse step there is no input of the network any more
        level = steps - 1 - step  # of what was captured after reverse step j
        assert level == steps - 2 - j
        assert t == timestep(steps - 1 - j, steps)
        assert labelled == steps - 1 - j
        assert own == image
    assert torch.equal(text(kept), -kept.x.flatten())
    wrong = [t != timestep(step, steps) for (step, _), t in zip(origins(kept), kept.t.tolist(), strict=True)]
    assert sum(wrong) > 100


@pytest.mark.parametrize("released", [False, True])
@pytest.mark.parametrize("images", [1, 3, 500])
def test_trajectories_take_turns(images: int, released: bool) -> None:
    kept = NormallyDistributed(200, 0.4, 0.4, released_labels=released)(trajectories(10, images))
    assert kept.image.tolist() == [i % images for i in range(200)]


@pytest.mark.parametrize("released", [False, True])
def test_order_of_the_set_does_not_matter(released: bool) -> None:
    data, policy = trajectories(20), NormallyDistributed(100, 0.4, 0.4, released_labels=released)
    shuffled = data[torch.randperm(len(data), generator=torch.Generator().manual_seed(0))]
    assert torch.equal(policy(shuffled).x, policy(data).x)
    assert torch.equal(policy(shuffled).t, policy(data).t)


def test_draws_depend_on_the_seed_alone() -> None:
    one = NormallyDistributed(50, 0.4, 0.4, seed=1).positions(100)
    torch.manual_seed(5)
    assert torch.equal(NormallyDistributed(50, 0.4, 0.4, seed=1).positions(100), one)
    assert not torch.equal(NormallyDistributed(50, 0.4, 0.4, seed=2).positions(100), one)


@pytest.mark.parametrize(("samples", "std"), [(0, 0.4), (-1, 0.4), (5, -0.1)])
def test_impossible_draws_are_named(samples: int, std: float) -> None:
    with pytest.raises(ValueError, match=r"NormallyDistributed\.(samples|std) must be"):
        NormallyDistributed(samples, 0.4, std)


def test_incomplete_trajectories_are_refused() -> None:
    data = trajectories(5, 3)
    with pytest.raises(ValueError, match="whole trajectories"):
        NormallyDistributed(4, 0.4, 0.4)(data[torch.arange(len(data)) != 7])
    with pytest.raises(ValueError, match="of 1 steps"):
        NormallyDistributed(4, 0.4, 0.4, released_labels=True)(trajectories(1, 3))


@pytest.mark.parametrize("policy", [EveryKth(1), EveryKth(3), EveryKth(7), NormallyDistributed(11, 0.4, 0.4)])
@pytest.mark.parametrize("steps", [2, 6, 10])
def test_count_is_how_many_are_kept(policy: EveryKth | NormallyDistributed, steps: int) -> None:
    assert policy.count(IMAGES, steps) == len(policy(trajectories(steps)))
