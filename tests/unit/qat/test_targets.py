"""What a network is trained on: inputs, targets and timesteps of diffusers' schedulers and of the digits' own training."""

from typing import Any

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from tests.helpers.sampling import SCHEDULE
from tfmq_exp.denoisers.denoiser import Denoiser
from tfmq_exp.denoisers.digits import load_dit
from tfmq_exp.denoisers.families.dit import keep_labels
from tfmq_exp.denoisers.loading.scheduler_config import FLOW
from tfmq_exp.qat.training_noise import TrainingNoise, draw_timesteps
from tfmq_exp.sampling.network_convention import NetworkConvention, PipelineSampler
from tfmq_exp.sampling.samplers import DDIM

FLOWING = {"num_train_timesteps": 1000, "prediction_type": FLOW}
T = torch.tensor([0, 3, 500, 999])


def pair() -> tuple[Tensor, Tensor]:
    clean, noise = torch.randn(2, 4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    return clean, noise


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_inputs_and_targets_of_betas_are_those_of_diffusers(kind: str) -> None:
    settings: Any = SCHEDULE | {"prediction_type": kind}
    (clean, noise), scheduler = pair(), DDPMScheduler(**settings)
    t: Any = T
    found = TrainingNoise.of(SCHEDULE | {"prediction_type": kind}, DDIM(4))
    wanted = {"epsilon": noise, "sample": clean, "v_prediction": scheduler.get_velocity(clean, noise, t)}[kind]
    torch.testing.assert_close(found.noisy(clean, noise, T), scheduler.add_noise(clean, noise, t), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.target(clean, noise, T), wanted, rtol=1e-4, atol=1e-4)
    assert (found.timesteps, found.given.dtype, found.drawn) == (tuple(range(1000)), torch.int64, "uniform")


@pytest.mark.parametrize("negated", [False, True])
def test_inputs_and_targets_of_flows_are_those_of_diffusers(*, negated: bool) -> None:
    """As Lumina 2 counts: 1 - t / 1000, and the negative of the velocity."""
    scheduler: Any = FlowMatchEulerDiscreteScheduler()
    clean, noise = pair()
    convention = NetworkConvention((("divide", 1000.0), ("subtract_from", 1.0)), negated)
    found = TrainingNoise.of(FLOWING, PipelineSampler(DDIM(4), convention) if negated else DDIM(4))
    t = torch.tensor([float(place + 1) for place in T])
    wanted = scheduler.scale_noise(clean, t, noise)
    torch.testing.assert_close(found.noisy(clean, noise, T), wanted, rtol=1e-5, atol=1e-5)
    sign, given = (-1, 1 - t / 1000) if negated else (1, t)
    torch.testing.assert_close(found.target(clean, noise, T), sign * (noise - clean), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found.given[T], given)
    assert found.given.dtype is torch.float32


def test_timesteps_of_a_flow_are_drawn_as_in_the_training_of_the_digits() -> None:
    drawn = draw_timesteps("logit_normal", 1000, 20_000, torch.Generator().manual_seed(0)).double() / 1000
    for share, at in ((0.1587, -1.0), (0.5, 0.0), (0.8413, 1.0)):
        assert float(drawn.quantile(share)) == pytest.approx(float(torch.tensor(at).sigmoid()), abs=0.01)


def test_what_is_not_known_is_refused() -> None:
    with pytest.raises(ValueError, match="prediction_type=edm is not supported: the network predicts a mixture"):
        TrainingNoise.of({"num_train_timesteps": 1000, "prediction_type": "edm"}, DDIM(4))
    with pytest.raises(ValueError, match="rescale_betas_zero_snr=True is not supported"):
        TrainingNoise.of(SCHEDULE | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}, DDIM(4))


def test_only_the_training_drops_classes() -> None:
    """Diffusers' blocks would each drop others."""
    denoiser: Denoiser = load_dit()
    network: Any = denoiser.network.train()
    inputs = {"hidden_states": torch.randn(64, 1, 16, 16), "timestep": torch.full((64,), 500.0)}
    given = {**inputs, "class_labels": torch.arange(64) % 10}
    with torch.no_grad():
        dropped, again = (network(**given).sample for _ in range(2))
        assert not torch.equal(dropped, again)
        keep_labels(network)
        kept = network(**given).sample
        assert torch.equal(kept, network.eval()(**given).sample)
