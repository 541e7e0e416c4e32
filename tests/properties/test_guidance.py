"""Conditions and classifier-free guidance, from the plan of labels to what calibration keeps of them."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.calibration import collect
from tfmq_exp.calibration.timesteps import EveryKth, NormallyDistributed
from tfmq_exp.core.seeds import Stream
from tfmq_exp.denoisers.denoiser import Conditions, Denoiser
from tfmq_exp.sampling.conditioning import Captions, Classes
from tfmq_exp.sampling.guidance import Sampling
from tfmq_exp.sampling.images import ImagePlan, sample_shard
from tfmq_exp.sampling.samplers import DDIM, PLMS

SCHEDULE = {"num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}
SHAPE = (4, 8, 8)
CPU = torch.device("cpu")
NULL = 6


class Table:
    """Seven fixed contexts of five tokens; the last is that of no condition."""

    def __init__(self, *, with_null: bool = True) -> None:
        self.rows = torch.randn(NULL + 1, 5, 12, generator=torch.Generator().manual_seed(0))
        self.with_null = with_null

    def __call__(self, choices: Sequence[Any]) -> Conditions:
        null = {"encoder_hidden_states": self.rows[NULL:]} if self.with_null else {}
        return Conditions({"encoder_hidden_states": self.rows[list(choices)]}, null)

    def example(self) -> Conditions:
        return self([0])

    def to(self, device: torch.device) -> None:
        self.rows = self.rows.to(device)


@pytest.fixture
def denoiser(tiny_conditional_unet: nn.Module) -> Denoiser:
    return Denoiser("tiny", tiny_conditional_unet, SHAPE, SCHEDULE, "0" * 64, encoder=Table())


def test_guided_prediction_is_the_formula_from_two_calls(denoiser: Denoiser) -> None:
    x, t = torch.randn(3, *SHAPE, generator=torch.Generator().manual_seed(1)), torch.tensor([901, 501, 1])
    conditions = denoiser.encoder([4, 0, 4])
    null = conditions.null["encoder_hidden_states"].repeat(3, 1, 1)
    with torch.no_grad():
        given = denoiser.network(x, t, **conditions.given).sample
        without = denoiser.network(x, t, encoder_hidden_states=null).sample
        for scale in (0.0, 3.0, 7.5):
            ours = Sampling(DDIM(4), Classes(NULL), guidance=scale).predictor(denoiser.network)(x, t, conditions)
            torch.testing.assert_close(ours, without + scale * (given - without), atol=1e-5, rtol=1e-5)
        plain = Sampling(DDIM(4), Classes(NULL)).predictor(denoiser.network)(x, t, conditions)
    assert torch.equal(plain, given)
    assert (given - without).abs().max() > 1e-3


def test_no_guidance_asks_the_network_once(denoiser: Denoiser) -> None:
    rows: list[int] = []
    handle = denoiser.network.register_forward_pre_hook(lambda _m, args: rows.append(len(args[0])))
    for guidance in (1.0, 3.0):
        sampling = Sampling(DDIM(2), Classes(NULL), guidance=guidance)
        sample_shard(sampling.predictor(denoiser.network), denoiser, sampling, ImagePlan(3, 0, 3), range(3))
    handle.remove()
    assert rows == [3, 3, 6, 6]


def test_a_conditioned_image_does_not_depend_on_its_batch(denoiser: Denoiser) -> None:
    for order in ("in_turn", "random"):
        sampling = Sampling(DDIM(4, 1.0), Classes(NULL, order), guidance=3.0)
        predict, plan = sampling.predictor(denoiser.network), ImagePlan(7, 5, 3)
        whole = sample_shard(predict, denoiser, sampling, plan, range(7))
        parts = torch.cat([sample_shard(predict, denoiser, sampling, plan, shard) for shard in plan.shards()])
        assert int((whole.int() - parts.int()).abs().max()) <= 1


def test_guidance_without_an_unconditional_mode_is_refused(denoiser: Denoiser) -> None:
    tiny = Denoiser("tiny", denoiser.network, SHAPE, SCHEDULE, "0" * 64, encoder=Table(with_null=False))
    with pytest.raises(ValueError, match=r"guidance must be 1, got 3\.0"):
        Sampling(DDIM(4), Classes(NULL), guidance=3.0).conditions(tiny, 0, "images", range(2))


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("sampler", [DDIM(4), PLMS(4)])
def test_calibration_sees_both_halves_of_guidance(
    denoiser: Denoiser, guidance: float, sampler: DDIM | PLMS, tmp_path: Path
) -> None:
    sampling = Sampling(sampler, Classes(NULL), guidance=guidance)
    collect(denoiser, sampling, images=8, seed=3, batch=3).save(tmp_path / "data")
    data, calls = (
        type(collect(denoiser, sampling, images=1, seed=3, batch=1)).load(tmp_path / "data"),
        sampling.calls(denoiser),
    )
    halves = 1 if guidance == 1.0 else 2
    assert len(data) == 8 * len(calls) * halves
    assert len(data.conditions["encoder_hidden_states"]) == 8 + 3 * (halves - 1)  # not one for every sample
    table, seen = Table().rows, data.inputs(CPU)["encoder_hidden_states"]
    for indices in (range(3), range(3, 6), range(6, 8)):
        walk = sampling.trajectory(
            sampling.predictor(denoiser.network), denoiser, seed=3, stream=Stream.CALIBRATION, indices=indices
        )
        for step in walk:
            for row, image in enumerate(indices):
                here = (data.step == step.index) & (data.image == image)
                assert set(data.t[here].tolist()) == {step.t}
                assert all(torch.equal(x, step.x[row]) for x in data.x[here])
                label = sampling.conditioning.choose(3, Stream.CALIBRATION, [image])[0]
                wanted = [table[label], table[NULL]][:halves]
                assert torch.equal(seen[here], torch.stack(wanted))


def test_every_kept_state_keeps_both_halves(denoiser: Denoiser) -> None:
    data = collect(denoiser, Sampling(DDIM(4), Classes(NULL), guidance=3.0), images=4, seed=3, batch=4)
    for policy in (
        EveryKth(2),
        NormallyDistributed(9, 0.4, 0.4),
        NormallyDistributed(9, 0.4, 0.4, released_labels=True),
    ):
        kept = policy(data)
        assert len(kept) == 2 * policy.count(4, 4)
        null = torch.tensor([torch.equal(row, Table().rows[NULL]) for row in kept.inputs(CPU)["encoder_hidden_states"]])
        for half in (null, ~null):
            assert int(half.sum()) == len(kept) // 2
        states = [
            Counter((x.sum().item(), t.item()) for x, t in zip(kept.x[h], kept.t[h], strict=True))
            for h in (null, ~null)
        ]
        assert states[0] == states[1]


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_lower_precision_is_near_and_returns_to_float32(denoiser: Denoiser, precision: Any) -> None:
    x, t = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(1)), torch.tensor([901, 1])
    conditions = denoiser.encoder([1, 2])
    with torch.no_grad():
        exact = Sampling(DDIM(4), Classes(NULL), 3.0).predictor(denoiser.network)(x, t, conditions)
        ours = Sampling(DDIM(4), Classes(NULL), 3.0, precision).predictor(denoiser.network)(x, t, conditions)
    assert ours.dtype is torch.float32
    assert 0 < (ours - exact).abs().max() < 0.1 * exact.abs().max()


def test_a_cpu_computes_tf32_as_float32_and_other_precisions_are_refused(denoiser: Denoiser) -> None:
    x, t = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(1)), torch.tensor([901, 1])
    with torch.no_grad():
        exact, tf32 = (
            Sampling(DDIM(4), Classes(NULL), 3.0, precision).predictor(denoiser.network)(x, t, denoiser.encoder([1, 2]))
            for precision in ("float32", "tf32")
        )
    assert torch.equal(exact, tf32)
    with pytest.raises(ValueError, match=r"precision must be one of float32, tf32, bfloat16, float16, got 'half'"):
        Sampling(DDIM(4), precision="half")  # type: ignore[arg-type]


# plans


def test_a_latent_image_is_decoded_by_its_first_stage(denoiser: Denoiser) -> None:
    class Doubling:
        def decode(self, x: Tensor) -> Tensor:
            return x[:, :3].repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)

    latent = Denoiser("tiny", denoiser.network, SHAPE, SCHEDULE, "0" * 64, encoder=Table(), first_stage=Doubling())
    sampling = Sampling(DDIM(2), Classes(NULL))
    images = sample_shard(sampling.predictor(latent.network), latent, sampling, ImagePlan(2, 0, 2), range(2))
    assert images.shape == (2, 3, 16, 16)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_of_a_network_with_a_learned_variance_the_first_channels_are_the_noise(
    guidance: float, tiny_conditional_unet: nn.Module
) -> None:
    class Learned(nn.Module):
        def forward(self, sample: Tensor, timestep: Tensor, **conditions: Tensor) -> Any:
            noise = tiny_conditional_unet(sample, timestep, **conditions).sample
            return SimpleNamespace(sample=torch.cat([noise, noise.square() + 100], 1))

    sampling, conditions = Sampling(DDIM(2), Classes(NULL), guidance=guidance), Table()([1, 4])
    x, t = torch.randn(2, *SHAPE), torch.tensor([700, 700])
    wanted = sampling.predictor(tiny_conditional_unet)(x, t, conditions)
    assert torch.equal(sampling.predictor(Learned())(x, t, conditions), wanted)


def test_what_a_network_cannot_be_asked_is_said_before_sampling(denoiser: Denoiser) -> None:
    plain = Denoiser("plain", denoiser.network, SHAPE, SCHEDULE, "0" * 64)
    for choice in (Classes(3), Captions("x", hashlib.sha256(b"").hexdigest())):
        with pytest.raises((ValueError, FileNotFoundError), match=r"conditioned on nothing|no captions at x"):
            Sampling(DDIM(2), choice).check(plain)
    no_null = Denoiser("tiny", denoiser.network, SHAPE, SCHEDULE, "0" * 64, encoder=Table(with_null=False))
    Sampling(DDIM(2), Classes(NULL)).check(no_null)
    with pytest.raises(ValueError, match="guidance must be 1"):
        Sampling(DDIM(2), Classes(NULL), guidance=2.0).check(no_null)
