"""Step-aware mixed precision: each row by the quantizer of its own step."""

import pytest
import torch
from torch import Tensor

from tfmq_exp.quant.quantizers import AffineQuantizer, Mode, StepSwitch
from tfmq_exp.quant.scales.observed_ranges import EMARange, PerStepConfig, StaticConfig
from tfmq_exp.quant.spec import QuantSpec
from tfmq_exp.quant.timestep_context import TimestepContext

TIMESTEPS = (751, 501, 251, 1)
CHOSEN = (4, 8, 6, 4)
ROWS = torch.tensor([1, 751, 251, 501, 251, 1])


def activations(shape: tuple[int, ...] = (6, 3, 5)) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def switch(context: TimestepContext, source: str = "static", widths: tuple[int, ...] = (4, 8, 6)) -> StepSwitch:
    """Calibrated on `activations()`, one row of it for each timestep of `ROWS`."""

    def choice(bits: int) -> AffineQuantizer:
        spec = QuantSpec(bits)
        return AffineQuantizer(
            EMARange(StaticConfig(), spec) if source == "static" else EMARange(PerStepConfig(), spec, context)
        )

    made = StepSwitch([choice(bits) for bits in widths], context)
    for quantizer in made.choices:
        quantizer.mode = Mode.OBSERVE
    with context.at(ROWS):
        made(activations())
    for quantizer in made.choices:
        quantizer.mode = Mode.QUANTIZE
    return made


@pytest.fixture
def context() -> TimestepContext:
    return TimestepContext(TIMESTEPS)


@pytest.mark.parametrize("source", ["static", "per_step"])
@pytest.mark.parametrize("shape", [(6, 7), (6, 3, 5), (6, 3, 5, 5)])
def test_mixed_steps_in_one_batch_equal_each_alone(
    context: TimestepContext, source: str, shape: tuple[int, ...]
) -> None:
    x, mixed = activations(shape), switch(context, source)
    mixed.use(CHOSEN)
    with context.at(ROWS):
        together = mixed(x)
    by_bits = {choice.spec.bits: choice for choice in mixed.choices}
    for row, t in enumerate(ROWS.tolist()):
        bits = CHOSEN[TIMESTEPS.index(t)]
        with context.at(ROWS[row : row + 1]):
            alone, expected = mixed(x[row : row + 1]), by_bits[bits](x[row : row + 1])
        assert torch.equal(alone, expected)
        assert torch.equal(together[row : row + 1], expected)
        others = [by_bits[other] for other in by_bits if other != bits]
        with context.at(ROWS[row : row + 1]):
            assert not any(torch.equal(expected, other(x[row : row + 1])) for other in others)


@pytest.mark.parametrize("widths", [(4, 8), (8, 4), (4, 8, 6)])
def test_the_widest_acts_until_a_choice_is_made(context: TimestepContext, widths: tuple[int, ...]) -> None:
    x, made = activations(), switch(context, widths=widths)
    with context.at(ROWS):
        assert torch.equal(made(x), made.choices[widths.index(8)](x))


def test_every_step_needs_a_width(context: TimestepContext) -> None:
    with pytest.raises(ValueError, match=f"{context.num_steps} steps"):
        switch(context, widths=(4, 8)).use([4])


def test_order_of_the_choices_does_not_matter(context: TimestepContext) -> None:
    x, one, other = activations(), switch(context, widths=(4, 6, 8)), switch(context, widths=(8, 4, 6))
    for made in (one, other):
        made.use(CHOSEN)
    with context.at(ROWS):
        assert torch.equal(one(x), other(x))


def test_all_choices_observe(context: TimestepContext) -> None:
    x = activations()
    made = StepSwitch([AffineQuantizer(EMARange(StaticConfig(), QuantSpec(bits))) for bits in (4, 8)], context)
    made.use((4, 4, 4, 4))
    for choice in made.choices:
        choice.mode = Mode.OBSERVE
    with context.at(ROWS):
        assert torch.equal(made(x), x)
    for choice in made.choices:
        assert float(choice.scale_provider.lo) == float(x.min())
        assert float(choice.scale_provider.hi) == float(x.max())


def test_switched_off_passes_everything(context: TimestepContext) -> None:
    x, made = activations(), switch(context)
    for choice in made.choices:
        choice.mode = Mode.OFF
    with context.at(ROWS):
        assert torch.equal(made(x), x)


def test_unknown_width_is_named_and_changes_nothing(context: TimestepContext) -> None:
    x, made = activations(), switch(context)
    made.use(CHOSEN)
    with context.at(ROWS):
        before = made(x)
        with pytest.raises(ValueError, match="no quantizer has 5 bits; there are 4, 8, 6"):
            made.use((4, 5, 8, 4))
        assert torch.equal(made(x), before)


def test_gradient_reaches_the_scales_that_act(context: TimestepContext) -> None:
    made = switch(context)
    made.use((4, 4, 8, 8))
    for choice in made.choices:
        choice.scale_provider.scale.requires_grad_(True)
    with context.at(ROWS):
        made(activations()).square().sum().backward()
    reached = {choice.spec.bits: choice.scale_provider.scale.grad is not None for choice in made.choices}
    assert reached == {4: True, 6: False, 8: True}


def test_one_width_acts_at_every_step_without_a_look_at_the_steps(context: TimestepContext) -> None:
    x, mixed = activations(), switch(context)
    mixed.use([6] * len(TIMESTEPS))
    assert mixed.choices[2].spec.bits == 6
    assert torch.equal(mixed(x), mixed.choices[2](x))  # outside of any step
    mixed.use(CHOSEN)
    with pytest.raises(RuntimeError, match="context is not set"):
        mixed(x)
