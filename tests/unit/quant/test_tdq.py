"""Intervals that a network generates from the timestep, and the encodings that it reads."""

import itertools
import math
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from tfmq_exp.quant.functional import fake_quantize
from tfmq_exp.quant.scales.generator import (
    Frequency,
    LayerInit,
    Normalised,
    RandomFourier,
    TimeEncoding,
    softplus_inverse,
)
from tfmq_exp.quant.scales.tdq import TDQConfig, TDQScale
from tfmq_exp.quant.spec import QuantSpec
from tfmq_exp.quant.timestep_context import TimestepContext

TIMESTEPS = tuple(range(991, 0, -10))
ENCODINGS: list[TimeEncoding] = [Frequency(128), Normalised(1000), RandomFourier(32, 4.0, 1000)]
STARTS: list[LayerInit] = ["zero", "default", "he", "xavier", "gaussian"]


def activations(size: float = 1.0) -> Tensor:
    return size * torch.randn(8, 3, 5, generator=torch.Generator().manual_seed(0)) + 0.3 * size


def generated(
    context: TimestepContext,
    last: LayerInit = "zero",
    *,
    spec: QuantSpec = QuantSpec(8),  # noqa: B008
    encoding: TimeEncoding = ENCODINGS[0],
    hidden: Sequence[int] = (64, 64, 64),
    dropout: float = 0.0,
    seed: int = 0,
    size: float = 1.0,
) -> TDQScale:
    """Calibrated on activations of some size, ready to quantize."""
    config = TDQConfig(encoding, tuple(hidden), dropout=dropout, last_layer_init=last, seed=seed)
    made = TDQScale(config, spec, context).eval()
    made.observe(activations(size))
    return made


def scrambled(source: TDQScale, by: float = 0.05) -> TDQScale:
    """As if it had learned something: intervals differ between steps."""
    generator = torch.Generator().manual_seed(1)
    for parameter in source.mlp.parameters():
        parameter.add_(by * torch.randn(parameter.shape, generator=generator))
    return source


@pytest.fixture
def context() -> TimestepContext:
    return TimestepContext(TIMESTEPS)


@pytest.mark.parametrize("encoding", ENCODINGS, ids=repr)
@pytest.mark.parametrize("size", [1e-6, 1e-2, 1.0, 1e4])
def test_zero_last_layer_gives_the_calibrated_scale_at_every_step(
    context: TimestepContext, encoding: TimeEncoding, size: float
) -> None:
    source, x = generated(context, encoding=encoding, dropout=0.2, size=size), activations(size)
    scale, zero_point = source.table()
    assert torch.equal(scale, source.scale.expand(len(TIMESTEPS)))
    assert torch.equal(zero_point, source.zero_point.expand(len(TIMESTEPS)))
    assert float(source.scale) == pytest.approx(float(x.max() - x.min()) / 255, rel=1e-6)


@pytest.mark.parametrize("scheme", ["affine", "symmetric", "unsigned"])
@pytest.mark.parametrize("encoding", ENCODINGS, ids=repr)
def test_merged_table_is_bit_identical_to_the_network(
    context: TimestepContext, encoding: TimeEncoding, scheme: str
) -> None:
    spec = QuantSpec(6, scheme)  # type: ignore[arg-type]
    source = scrambled(generated(context, "default", spec=spec, encoding=encoding, dropout=0.2))
    merged, t = source.tabulated(), torch.tensor([1, 991, 501, 501, 11, 201, 991, 1])
    with context.at(t):
        ours, theirs = source(activations()), merged(activations())
    assert torch.equal(ours.scale, theirs.scale)
    assert torch.equal(ours.zero_point, theirs.zero_point)
    assert len(ours.scale.unique()) == len(t.unique())
    assert not any(isinstance(module, nn.Linear) for module in merged.modules())


def test_timesteps_in_one_batch_equal_separate_runs(context: TimestepContext) -> None:
    source, x = scrambled(generated(context, "default", dropout=0.2)), activations()
    t = torch.tensor([1, 991, 501, 501, 11, 201, 991, 1])
    with context.at(t):
        together = fake_quantize(x, source(x), source.spec)
    for row in range(len(t)):
        with context.at(t[row : row + 1]):
            alone = fake_quantize(x[row : row + 1], source(x[row : row + 1]), source.spec)
        assert torch.equal(together[row : row + 1], alone)


def test_interval_is_softplus_of_the_network_plus_a_bias(context: TimestepContext) -> None:
    source = scrambled(generated(context, "default"))
    start = math.log(math.expm1(float(source.scale)))
    for step, (scale, zero_point) in enumerate(zip(*source.table(), strict=True)):
        read = Frequency(128)(torch.tensor(TIMESTEPS[step : step + 1]))
        expected = math.log1p(math.exp(float(source.mlp(read)) + start))
        assert float(scale) == pytest.approx(expected, rel=1e-4)
        below = float(source.zero_point * source.scale)
        assert float(zero_point) == min(max(round(below / float(scale)), 0), 255)


def test_softplus_inverse() -> None:
    y = torch.logspace(-8, 3, 200, dtype=torch.float64)
    torch.testing.assert_close(torch.logaddexp(softplus_inverse(y), torch.zeros_like(y)), y, rtol=1e-9, atol=0)
    torch.testing.assert_close(softplus_inverse(y[y < 500]), y[y < 500].expm1().log(), rtol=1e-7, atol=1e-9)


def test_every_start_but_zero_moves_the_intervals_and_no_two_agree(context: TimestepContext) -> None:
    shares = {last: generated(context, last).table().scale / generated(context).scale for last in STARTS}
    assert bool((shares.pop("zero") == 1).all())
    assert all(bool((share != 1).any()) and bool((share > 0).all()) for share in shares.values())
    assert not any(torch.equal(one, other) for one, other in itertools.combinations(shares.values(), 2))


@pytest.mark.parametrize("size", [0.1, 1.0, 10.0])
def test_default_start_stays_near_the_calibrated_scale(context: TimestepContext, size: float) -> None:
    sources = [generated(context, "default", seed=seed, size=size) for seed in range(10)]
    shares = torch.stack([source.table().scale / source.scale for source in sources])
    assert 0.8 <= float(shares.min()) < float(shares.max()) <= 1.25


def test_starts_depend_on_the_seed_alone(context: TimestepContext) -> None:
    torch.manual_seed(0)
    one = generated(context, "default", seed=1).table().scale
    torch.manual_seed(1)
    assert torch.equal(generated(context, "default", seed=1).table().scale, one)
    assert not torch.equal(generated(context, "default", seed=2).table().scale, one)


def test_unknown_start_is_named(context: TimestepContext) -> None:
    with pytest.raises(ValueError, match="'ones'"):
        generated(context, "ones")  # type: ignore[arg-type]


@pytest.mark.parametrize("scheme", ["symmetric", "unsigned"])
def test_only_affine_grids_have_a_zero_point(context: TimestepContext, scheme: str) -> None:
    source = scrambled(generated(context, "default", spec=QuantSpec(8, scheme)))  # type: ignore[arg-type]
    assert bool((source.table().zero_point == 0).all())


@pytest.mark.parametrize("by", [1.0, 10.0])
def test_intervals_are_positive_and_zero_points_on_the_grid_whatever_was_learned(
    context: TimestepContext, by: float
) -> None:
    scale, zero_point = scrambled(generated(context, "default"), by).table()
    assert bool((scale > 0).all())
    assert bool(scale.isfinite().all())
    assert torch.equal(zero_point, zero_point.round().clamp(0, 255))


def test_dropout_acts_while_learning_alone(context: TimestepContext) -> None:
    source = scrambled(generated(context, "default", dropout=0.5))
    assert torch.equal(source.table().scale, source.table().scale)
    source.train()
    assert not torch.equal(source.table().scale, source.table().scale)


# learning


def learned(source: TDQScale, target: Tensor, steps: int) -> list[float]:
    """Losses while the intervals of all steps are drawn to a target by Adam."""
    parameters = list(source.trainable())
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer, losses = torch.optim.Adam(parameters, 1e-2), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (source.table().scale / target - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_learning_moves_the_scales_of_the_steps_apart(context: TimestepContext) -> None:
    source = generated(context, encoding=Frequency(32), hidden=(16, 16))
    before, lower_end = source.scale.clone(), source.zero_point.clone()
    target = before * torch.linspace(0.5, 2, len(TIMESTEPS))
    losses = learned(source, target, 300)
    assert losses[-1] < 0.05 * losses[0]
    assert len(source.table().scale.unique()) == len(TIMESTEPS)
    assert torch.equal(source.scale, before)
    assert torch.equal(source.zero_point, lower_end)


@pytest.mark.parametrize("encoding", ENCODINGS, ids=repr)
def test_gradient_reaches_the_whole_network_after_one_step(context: TimestepContext, encoding: TimeEncoding) -> None:
    source, x = generated(context, encoding=encoding, hidden=(16, 16), spec=QuantSpec(4)), activations()
    parameters = list(source.trainable())
    reached = []
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(parameters, 1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        with context.at(torch.tensor(TIMESTEPS[: len(x)])):
            (fake_quantize(x, source(x), source.spec) - x).abs().pow(2.4).sum().backward()
        reached.append([bool((parameter.grad != 0).any()) for parameter in parameters])  # type: ignore[union-attr]
        optimizer.step()
    assert reached[0] == [False] * (len(parameters) - 2) + [True] * 2  # a zero layer passes nothing on
    assert all(reached[1])


# encodings


@pytest.mark.parametrize("width", [2, 8, 32])
def test_frequency_encoding_by_its_formula(width: int) -> None:
    t = [0, 1, 17, 999]
    for when, row in zip(t, Frequency(width)(torch.tensor(t)), strict=True):
        angles = [when * 10000 ** (-2 * i / width) for i in range(width // 2)]
        expected = [math.cos(angle) for angle in angles] + [math.sin(angle) for angle in angles]
        assert row.tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("width", [0, 1, 7, -2])
def test_odd_and_empty_frequency_encodings_are_refused(width: int) -> None:
    for encoding in (Frequency, lambda width: RandomFourier(width, 1.0, 1000)):
        with pytest.raises(ValueError, match=f"width must be an even whole number from 2 to 65536, got {width}"):
            encoding(width)


def test_normalised_encoding_is_a_share() -> None:
    assert Normalised(1000)(torch.tensor([0, 1, 500, 999])).tolist() == [
        pytest.approx([share]) for share in (0, 0.001, 0.5, 0.999)
    ]


def test_random_fourier_encoding_by_its_formula() -> None:
    width, sigma = 4000, 3.0
    encoding = RandomFourier(width, sigma, 1000, seed=5)
    cosines, sines = encoding(torch.tensor([1])).double().split(width // 2, dim=1)
    b = torch.atan2(sines, cosines) * 1000 / (2 * math.pi)  # no angle has gone round at t = 1
    assert float(b.mean()) == pytest.approx(0, abs=4 * sigma / math.sqrt(width // 2))
    assert float(b.std()) == pytest.approx(sigma, rel=4 / math.sqrt(width))
    for t in (0, 3, 250, 999):
        expected = torch.cat([(2 * math.pi * b * t / 1000).cos(), (2 * math.pi * b * t / 1000).sin()], dim=1)
        torch.testing.assert_close(encoding(torch.tensor([t])).double(), expected, rtol=0, atol=1e-2)
    assert torch.equal(encoding(torch.tensor([3])), RandomFourier(width, sigma, 1000, seed=5)(torch.tensor([3])))
    assert not torch.equal(encoding(torch.tensor([3])), RandomFourier(width, sigma, 1000, seed=6)(torch.tensor([3])))
