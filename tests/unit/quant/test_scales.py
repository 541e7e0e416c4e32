import pytest
import torch

from tfmq_exp.quant.functional import SMALLEST_SCALE, fake_quantize, qparams_from_range
from tfmq_exp.quant.observers import MinMax, SymmetricMSEObserver
from tfmq_exp.quant.quantizers import AffineQuantizer, Mode, modes
from tfmq_exp.quant.scales.observed_ranges import EMARange, PerStepConfig, StaticConfig
from tfmq_exp.quant.spec import QuantSpec
from tfmq_exp.quant.timestep_context import TimestepContext

TIMESTEPS = (751, 501, 251, 1)
SPEC = QuantSpec(8)


@pytest.fixture
def context() -> TimestepContext:
    return TimestepContext(TIMESTEPS)


def rows_per_step(rows: int = 6, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of very different sizes for every timestep."""
    t = torch.tensor(TIMESTEPS).repeat_interleave(rows)
    x = torch.randn(len(t), 3, 5, generator=torch.Generator().manual_seed(seed))
    return x * torch.logspace(-2, 2, 4).repeat_interleave(rows)[:, None, None], t


def test_a_shuffled_mixed_batch_equals_one_step_at_a_time(context):
    x, t = rows_per_step()
    order = torch.randperm(len(t), generator=torch.Generator().manual_seed(1))
    mixed, single = (
        EMARange(PerStepConfig(momentum=0.95), SPEC, context),
        EMARange(PerStepConfig(momentum=0.95), SPEC, context),
    )
    with context.at(t[order]):
        mixed.observe(x[order])
        quantized = fake_quantize(x[order], mixed(x[order]), SPEC)
    for timestep in TIMESTEPS:
        here = t == timestep
        with context.at(t[here]):
            single.observe(x[here])
            expected = fake_quantize(x[here], single(x[here]), SPEC)
        assert not torch.equal(expected, x[here])
        assert torch.equal(quantized[order.argsort()][here], expected)
    assert torch.equal(mixed.scale, single.scale)
    assert torch.equal(mixed.zero_point, single.zero_point)


def test_every_step_has_the_range_of_its_own_rows(context):
    x, t = rows_per_step()
    source = EMARange(PerStepConfig(momentum=0.95), SPEC, context)
    with context.at(t):
        source.observe(x)
    for step, timestep in enumerate(TIMESTEPS):
        q = qparams_from_range(*MinMax()(x[t == timestep], SPEC), SPEC)
        assert float(source.scale[step]) == float(q.scale)
        assert float(source.zero_point[step]) == float(q.zero_point)


def test_equal_tables_quantize_like_static(context):
    x, t = rows_per_step()
    static, table = (
        EMARange(StaticConfig(momentum=0.95), SPEC),
        EMARange(PerStepConfig(momentum=0.95), SPEC, context),
    )
    static.observe(x)
    table.scale.fill_(float(static.scale))
    table.zero_point.fill_(float(static.zero_point))
    with context.at(t):
        assert torch.equal(fake_quantize(x, table(x), SPEC), fake_quantize(x, static(x), SPEC))


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.95])
def test_static_is_a_moving_average(momentum):
    batches = torch.randn(6, 4, 7, generator=torch.Generator().manual_seed(2))
    source = EMARange(StaticConfig(momentum=momentum), SPEC)
    lo = hi = None
    for batch in batches:
        source.observe(batch)
        least, greatest = float(batch.min()), float(batch.max())
        lo = least if lo is None else momentum * lo + (1 - momentum) * least
        hi = greatest if hi is None else momentum * hi + (1 - momentum) * greatest
    assert float(source.lo) == pytest.approx(lo, rel=1e-6)
    assert float(source.hi) == pytest.approx(hi, rel=1e-6)
    assert float(source.scale) == pytest.approx((hi - lo) / 255, rel=1e-6)


def test_the_estimator_gives_the_range_of_every_batch(context):
    x, t = rows_per_step()
    observer = SymmetricMSEObserver(candidates=20)
    static = EMARange(StaticConfig(momentum=0.5, observer=observer), SPEC)
    table = EMARange(PerStepConfig(momentum=0.5, observer=observer), SPEC, context)
    for batch in (x, 3 * x):
        static.observe(batch)
        with context.at(t):
            table.observe(batch)
    for source, entry, rows in ((static, 0, x), *((table, k, x[t == at]) for k, at in enumerate(TIMESTEPS))):
        first, second = (float(observer(batch, SPEC)[1]) for batch in (rows, 3 * rows))
        assert float(source.hi[entry]) == pytest.approx(0.5 * first + 0.5 * second, rel=1e-6)
        assert float(source.lo[entry]) == -float(source.hi[entry])  # the least value is not minus the greatest


def test_scales_alone_can_be_learned_and_stay_positive(context):
    x, t = rows_per_step()
    for source in (EMARange(StaticConfig(), SPEC), EMARange(PerStepConfig(), SPEC, context)):
        with context.at(t):
            source.observe(x)
            assert [parameter is source.scale for parameter in source.trainable()] == [True]
            assert not source.scale.requires_grad
            source.scale.requires_grad_()
            (fake_quantize(x, source(x), SPEC) - x).square().sum().backward()
            assert bool((source.scale.grad != 0).all())
        with torch.no_grad():
            source.scale.sub_(1e6)
        source.clamp_parameters()
        assert bool((source.scale == SMALLEST_SCALE).all())


def test_steps_that_a_batch_lacks_stay_as_they_were(context):
    x, t = rows_per_step()
    source = EMARange(PerStepConfig(momentum=0.95), SPEC, context)
    with context.at(t[t != 251]):
        source.observe(x[t != 251])
    assert source.uncalibrated() == [2]
    before = source.scale.clone()
    with context.at(t[t == 1]):
        source.observe(10 * x[t == 1])
    changed = source.scale != before
    assert changed.tolist() == [False, False, True, True]  # NaN differs from itself
    assert bool(source.scale[2].isnan())


@pytest.mark.parametrize("shape", [(4, 3), (4, 3, 5), (4, 3, 5, 5)])
def test_parameters_broadcast_over_any_shape(context, shape):
    x = torch.randn(shape)
    for source in (
        EMARange(StaticConfig(momentum=0.9), SPEC),
        EMARange(PerStepConfig(momentum=0.9), SPEC, context),
    ):
        with context.at(torch.tensor(TIMESTEPS)):
            source.observe(x)
            assert fake_quantize(x, source(x), SPEC).shape == x.shape


def test_only_scales_are_saved(context):
    source = EMARange(PerStepConfig(momentum=0.95), SPEC, context)
    assert set(source.state_dict()) == {"scale", "zero_point"}
    assert source.scale.shape == (4,)


def test_one_sided_and_zero_batches_keep_zero_on_the_grid():
    for x in (torch.zeros(2, 3), torch.full((2, 3), 5.0), torch.full((2, 3), -5.0)):
        source = EMARange(StaticConfig(momentum=0.9), SPEC)
        source.observe(x)
        assert 0 <= float(source.zero_point) <= 255
        torch.testing.assert_close(fake_quantize(x, source(x), SPEC), x)


@pytest.mark.parametrize("momentum", [-0.1, 1.0])
def test_momentum_outside_its_range_raises(momentum):
    with pytest.raises(ValueError, match="momentum"):
        EMARange(StaticConfig(momentum=momentum), SPEC)


def test_ranges_per_channel_are_refused():
    with pytest.raises(ValueError, match="axis"):
        EMARange(StaticConfig(), QuantSpec(8, axis=1))


def test_modes_of_a_quantizer():
    x = torch.randn(4, 5)
    quantizer = AffineQuantizer(EMARange(StaticConfig(momentum=0.9), SPEC))
    assert quantizer(x) is x
    assert quantizer.scale_provider.uncalibrated() == [0]
    with modes([quantizer], Mode.OBSERVE):
        assert quantizer(x) is x
    assert quantizer.scale_provider.uncalibrated() == []
    with modes([quantizer], Mode.QUANTIZE):
        assert torch.equal(quantizer(x), fake_quantize(x, quantizer.scale_provider(x), SPEC))
    with pytest.raises(RuntimeError, match="inside"), modes([quantizer], Mode.QUANTIZE):
        raise RuntimeError("inside")
    assert quantizer.mode is Mode.OFF
