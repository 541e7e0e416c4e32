"""Scales generated for all layers together, and encodings of the timestep."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.unit.quant.test_qat_quantizers import FORMS, SIGNED, TIMESTEPS, activations, ready
from tfmq_exp.core.records import decode, encode
from tfmq_exp.quant.observers import AbsMax
from tfmq_exp.quant.qat_functions import Lsq, QATQuantizeFn
from tfmq_exp.quant.qat_quantizers import TrainableQuantizer
from tfmq_exp.quant.scales.dynamic import DynamicGeneratorConfig, DynamicGeneratorScale
from tfmq_exp.quant.scales.generator import Frequency, Normalised, RandomFourier, TimeEncoding
from tfmq_exp.quant.scales.tdq import BatchedGenerators, TDQConfig, TDQScale
from tfmq_exp.quant.spec import QuantSpec
from tfmq_exp.quant.timestep_context import TimestepContext

ENCODINGS = (Frequency, Normalised, RandomFourier)

WIDE = Frequency(32)

ANY_T = torch.tensor([3, 999, 456, 3, 0])


def generated(
    seed: int,
    context: TimestepContext,
    encoding: TimeEncoding = WIDE,
    dropout: float = 0.2,
    width: int = 16,
) -> TDQScale:
    """Calibrated, with a network that says something."""
    config = TDQConfig(encoding, (width, width), dropout=dropout, last_layer_init="default", seed=seed)
    source = TDQScale(config, QuantSpec(4, "symmetric"), context).eval()
    source.observe(activations() * (1 + seed))
    return source


def sources(context: TimestepContext) -> list[TDQScale]:
    """Networks of four kinds, in disorder."""
    thin = Normalised(1000)
    kinds = [(WIDE, 16, 0.2), (thin, 8, 0.0), (WIDE, 16, 0.2), (WIDE, 8, 0.2), (WIDE, 16, 0.0), (thin, 8, 0.0)]
    return [generated(i, context, encoding, dropout, width) for i, (encoding, width, dropout) in enumerate(kinds)]


def by_itself(source: TDQScale, t: Tensor) -> Tensor:
    """Softplus of the network plus a bias, one timestep after the other, in double precision."""
    network, start = copy.deepcopy(source.mlp).double(), source.scale.double().expm1().log()
    outputs = [network(source.encoding(when.reshape(1)).double()) for when in t]
    return nn.functional.softplus(torch.cat(outputs).squeeze(1) + start)


def test_batched_generators_give_what_each_network_gives_at_any_timestep() -> None:
    context = TimestepContext(TIMESTEPS)
    mixed = sources(context)
    generators = BatchedGenerators(mixed)
    assert sorted(len(group) for group in generators.groups) == [1, 1, 2, 2]
    given = generators.scales(ANY_T)
    assert given.keys() == set(mixed)
    for source, rows in given.items():
        torch.testing.assert_close(rows.double(), by_itself(source, ANY_T), rtol=1e-5, atol=0)
        assert len(rows.unique()) == len(ANY_T.unique())


def test_gradients_through_batched_generators_are_those_of_each_network() -> None:
    mixed = sources(TimestepContext(TIMESTEPS))
    for source in mixed:
        source.mlp.requires_grad_(True)
    sum(rows.square().sum() for rows in BatchedGenerators(mixed).scales(ANY_T).values()).backward()  # type: ignore[union-attr]
    together = [[p.grad.clone() for p in source.mlp.parameters()] for source in mixed]  # type: ignore[union-attr]
    for source, grads in zip(mixed, together, strict=True):
        source.mlp.zero_grad()
        start = source.scale.double().expm1().log()
        out = source.mlp(source.encoding(ANY_T)).squeeze(1) + start
        nn.functional.softplus(out).square().sum().backward()
        for parameter, grad in zip(source.mlp.parameters(), grads, strict=True):
            torch.testing.assert_close(grad, parameter.grad, rtol=1e-4, atol=1e-7)


def test_scales_are_in_the_context_for_a_forward_pass() -> None:
    context = TimestepContext(TIMESTEPS)
    mixed, x = sources(context), activations()
    generators, quantizer = BatchedGenerators(mixed), TrainableQuantizer(mixed[0], Lsq())
    with context.at(ANY_T, "nearest", generators.scales(ANY_T)):
        inside = quantizer.quantize(x)
        step = mixed[0](x).scale
        assert step.shape == (5, 1, 1)
        torch.testing.assert_close(step.flatten().double(), by_itself(mixed[0], ANY_T), rtol=1e-5, atol=0)
    assert not context.scales
    for row in range(5):
        one = ANY_T[row : row + 1]
        with context.at(one, "nearest", generators.scales(one)):
            torch.testing.assert_close(quantizer.quantize(x[row : row + 1]), inside[row : row + 1])
    with context.at(ANY_T, "nearest"):  # without them the nearest of the finite set is read
        nearest = torch.tensor([3, 0, 1, 3, 3])
        assert torch.equal(mixed[0](x).scale.flatten(), mixed[0].table().scale[nearest])


def test_batched_generators_drop_out_while_training_and_ignore_half_precision() -> None:
    source = generated(0, TimestepContext(TIMESTEPS))
    generators = BatchedGenerators([source])
    (for_inference,) = generators.scales(ANY_T).values()
    with torch.autocast("cpu", torch.bfloat16):
        (half,) = generators.scales(ANY_T).values()
    assert torch.equal(half, for_inference)
    source.train()
    torch.manual_seed(0)  # in four draws of a hundred both rows of one timestep drop the same units
    (dropped,) = generators.scales(ANY_T).values()
    assert not torch.equal(dropped, for_inference)
    assert dropped[0] != dropped[3]  # rows of one timestep drop apart


@pytest.mark.parametrize("form", FORMS, ids=repr)
def test_merged_table_is_bit_identical_to_the_network(form: QATQuantizeFn) -> None:
    context = TimestepContext(TIMESTEPS)
    quantizer, x = ready(generated(0, context), form), activations()
    t = torch.tensor([301, 1, 901, 1, 601])
    with context.at(t):
        before = quantizer(x)
        quantizer.tabulate()
        assert torch.equal(quantizer(x), before)
    assert not any(isinstance(module, nn.Linear) for module in quantizer.modules())
    assert sum(value.numel() for value in quantizer.scale_provider.state_dict().values()) == 2 * len(TIMESTEPS)


@pytest.mark.parametrize("encoding", [None, Frequency(8)], ids=repr)
def test_statistics_of_every_sample_and_its_time_make_its_interval(encoding: TimeEncoding | None) -> None:
    context, x = TimestepContext(TIMESTEPS), activations()
    start: dict[str, Any] = {"observer": AbsMax(), "int_range": "narrow"}
    config = DynamicGeneratorConfig(encoding, (16, 16), dropout=0.2, last_layer_init="he", seed=3, **start)
    source = DynamicGeneratorScale(config, SIGNED, context).eval()
    source.observe(x)
    reach, network = float(x.abs().max()), copy.deepcopy(source.mlp).double()
    with context.at(ANY_T, "nearest"):
        scale, zero_point = source(x)
    assert scale.shape == (5, 1, 1)
    assert not zero_point.any()
    for row, t, step in zip(x.double(), ANY_T, scale.flatten(), strict=True):
        values = row.flatten() / reach
        mean = values.sum() / values.numel()
        read = torch.stack([values.min(), values.max(), mean, (values - mean).square().sum() / values.numel()])
        if encoding is not None:
            read = torch.cat([read, encoding(t.reshape(1))[0].double()])
        expected = nn.functional.softplus(network(read) + source.scale.double().expm1().log())
        assert float(step) == pytest.approx(float(expected), rel=1e-4)
    assert len(scale.unique()) == 5


def test_statistics_start_at_the_calibrated_interval_and_stay_a_network() -> None:
    context = TimestepContext(TIMESTEPS)
    source = DynamicGeneratorScale(DynamicGeneratorConfig(None, (8,), dropout=0.2), SIGNED, context)
    source.observe(activations())
    assert torch.equal(source(activations()).scale.flatten(), source.scale.expand(5))
    assert source.tabulated() is source
    assert source.generates
    assert {id(p) for p in source.trainable()} == {id(p) for p in source.mlp.parameters()}


@pytest.mark.parametrize("encoding", [Frequency(8), Normalised(1000), RandomFourier(8, 2.0, 1000, seed=4)], ids=repr)
def test_encodings_survive_json(encoding: TimeEncoding) -> None:
    assert decode(encode(encoding, ENCODINGS), TimeEncoding, ENCODINGS) == encoding


def test_unknown_encodings_are_named() -> None:
    with pytest.raises(ValueError, match="'wavelet'; known: frequency, normalised, random_fourier"):
        decode({"kind": "wavelet"}, TimeEncoding, ENCODINGS)
    with pytest.raises(TypeError, match="a function cannot be stored"):
        encode(lambda t: t[:, None].float(), ENCODINGS)  # type: ignore[arg-type, return-value]
