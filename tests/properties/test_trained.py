"""Networks under quantization-aware training: what is trained, and what is left of it in a file."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import TIMESTEPS, example_inputs
from tfmq_exp.denoisers.families.unet import attentions
from tfmq_exp.denoisers.read_structure import read_structure
from tfmq_exp.denoisers.structure import Role
from tfmq_exp.qat.model import clamp_parameters, finish, observe, penalty, ready, trainable
from tfmq_exp.quant.observers import AbsMax
from tfmq_exp.quant.qat_functions import Duq, Lsq, Nipq, Pact, QATQuantizeFn, Qil
from tfmq_exp.quant.scales.base import ScaleConfig
from tfmq_exp.quant.scales.dynamic import DynamicConfig, DynamicGeneratorConfig
from tfmq_exp.quant.scales.generator import Frequency
from tfmq_exp.quant.scales.observed_ranges import EMARange, StaticConfig, TimestepGroupConfig
from tfmq_exp.quant.scales.tdq import TDQConfig
from tfmq_exp.surgery import serialization
from tfmq_exp.surgery.config import (
    AttentionBits,
    LayerBits,
    QATConfig,
    QuantizationConfig,
    ScalePlan,
    SchemeConfig,
)
from tfmq_exp.surgery.quantized_network import QuantizedNetwork, build_quantized_network
from tfmq_exp.surgery.resolve import resolve

SYMMETRIC = SchemeConfig("symmetric", "channel", "symmetric")
ANY_T = (3, 17, 500, 902)  # none of the sampler's
TDQ = TDQConfig(Frequency(32), (16, 16), 0.2, "zero")
FORMS: dict[str, QATQuantizeFn] = {
    "lsq": Lsq(),
    "tdq_release": Lsq("tdq_release", scaled=False),
    "pact": Pact(),
    "nipq": Nipq(),
    "duq": Duq(),
    "qil": Qil(),
}
SCALES: dict[str, ScaleConfig] = {
    "static": StaticConfig(),
    "tdq": TDQ,
    "intervals": TimestepGroupConfig(3, 1000),
    "dynamic": DynamicConfig("sample"),
    "statistics": DynamicGeneratorConfig(None, (8, 8), 0.2),
    "statistics and time": DynamicGeneratorConfig(Frequency(8), (8, 8), 0.2),
}
# Every form and every scale, and the pairs that the papers compare.
PAIRS = [
    ("lsq", "static"),
    ("tdq_release", "tdq"),
    ("pact", "tdq"),
    ("nipq", "tdq"),
    ("duq", "tdq"),
    ("qil", "intervals"),
    ("lsq", "dynamic"),
    ("lsq", "statistics"),
    ("duq", "statistics and time"),
]


def qat_network(
    unet: nn.Module,
    form: QATQuantizeFn,
    scale: ScaleConfig,
    *,
    weights: QATQuantizeFn | None = None,
    bits: int = 3,
    attention: AttentionBits | None = None,
    further: Mapping[str, Any] | None = None,
    **choices: Any,
) -> QuantizedNetwork:
    """A quantized twin to be trained; nothing placed yet."""
    plan = QuantizationConfig(
        {role.value: LayerBits(bits, bits) for role in Role},
        attention or AttentionBits(),
        grids=SYMMETRIC,
        qat=QATConfig(form, weights or form, AbsMax(0.5), **choices),
        **(further or {}),
    )
    parts = read_structure(unet, example_inputs(unet))
    resolved = resolve(plan, parts, tuple(attentions(unet)), ScalePlan(scale, scale), TIMESTEPS)
    return build_quantized_network(unet, resolved, AbsMax())


def begun(model: QuantizedNetwork) -> QuantizedNetwork:
    """Observed at timesteps that are not the sampler's, and ready."""
    observe(model)
    with torch.no_grad():
        model(**example_inputs(model.network, ANY_T), outside="nearest")
    ready(model)
    return model


def trained(model: QuantizedNetwork, steps: int = 2) -> QuantizedNetwork:
    """After some steps that change everything."""
    model.train()
    learned = trainable(model)
    optimizer = torch.optim.AdamW([*learned.weights, *learned.ranges, *learned.generators], 3e-3)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for _ in range(steps):
            optimizer.zero_grad()
            inputs = example_inputs(model.network, ANY_T)
            ((model(**inputs, outside="nearest").sample - inputs["sample"]).square().mean() + penalty(model)).backward()
            optimizer.step()
            clamp_parameters(model)
    return model


def output(model: nn.Module, timesteps: tuple[int, ...] = TIMESTEPS) -> Tensor:
    nearest = {} if set(timesteps) <= set(TIMESTEPS) else {"outside": "nearest"}
    with torch.no_grad():
        return model(**example_inputs(getattr(model, "network", model), timesteps, seed=5), **nearest).sample


def at_the_samplers_steps(model: QuantizedNetwork) -> Tensor:
    """What the network gives that is still trained, as it will be sampled."""
    for_inference = copy.deepcopy(model).eval()
    for_inference.generators = None
    return output(for_inference)


# from training to a file


@pytest.mark.parametrize(("form", "scale"), PAIRS)
def test_a_finished_network_is_bit_equal_to_what_was_trained_and_to_its_file(
    tiny_unet: nn.Module, tmp_path: Path, form: str, scale: str
) -> None:
    operands = AttentionBits(operands=3, probabilities=8) if scale == "tdq" else None
    offset = "learned" if scale == "static" else "zero"
    model = qat_network(
        tiny_unet, FORMS[form], SCALES[scale], attention=operands, silu_offset=True, other_offset=offset
    )
    trained(begun(model))
    before = at_the_samplers_steps(model)
    assert finish(model) is model
    assert torch.equal(output(model), before)
    serialization.save(model, tmp_path / "model.safetensors")
    loaded = serialization.load(tmp_path / "model.safetensors")
    assert torch.equal(output(loaded), before)
    assert loaded.plan == model.plan
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.generators is None
    with pytest.raises(ValueError, match="timestep 3 is outside"):
        model(**example_inputs(model.network, ANY_T))
    if not scale.startswith("statistics"):
        kept = [name for name, _ in loaded.network.named_parameters() if ".mlp." in name]
        assert kept == []


def test_conditional_networks_with_split_shortcuts_too(tiny_conditional_unet: nn.Module, tmp_path: Path) -> None:
    model = qat_network(
        tiny_conditional_unet, Duq(), TDQ, weights=Qil(learn_gamma=True), further={"split_shortcuts": True}
    )
    trained(begun(model))
    before = at_the_samplers_steps(model)
    serialization.save(finish(model), tmp_path / "model.safetensors")
    assert torch.equal(output(serialization.load(tmp_path / "model.safetensors")), before)


def test_integers_of_a_finished_network_have_the_bits_of_the_plan(tiny_unet: nn.Module) -> None:
    model = finish(trained(begun(qat_network(tiny_unet, Lsq("tdq_release"), StaticConfig()))))
    assert set(model.integers) == set(model.weight_layers())
    for layer, ((codes, (scale, zero_point), spec),) in model.integers.items():
        signed = codes.int() + spec.qmin
        assert -2 <= int(signed.min()) < int(signed.max()) <= 2
        assert not zero_point.any()
        assert torch.equal(model.layer(layer).weight, signed * scale)


def test_a_table_is_what_the_networks_said(tiny_unet: nn.Module) -> None:
    model = trained(begun(qat_network(tiny_unet, Lsq(), TDQ)))
    assert model.generators is not None
    found = model.eval().generators.scales(torch.tensor(TIMESTEPS))  # type: ignore[union-attr]
    said = {id(source): rows.detach() for source, rows in found.items()}
    names = {id(q.scale_provider): name for name, q in model.activation_quantizers().items()}
    assert said.keys() == names.keys()
    finish(model)
    for key, name in names.items():
        source = model.activation_quantizers()[name].scale_provider
        assert type(source) is EMARange
        assert source.per_step
        torch.testing.assert_close(source.scale.data, said[key], rtol=1e-6, atol=0)
        assert len(source.scale.unique()) == len(TIMESTEPS)


# what is trained


@pytest.mark.parametrize(("form", "scale"), [("duq", "static"), ("nipq", "tdq"), ("lsq", "statistics and time")])
def test_every_parameter_is_of_one_kind_and_has_a_gradient(tiny_unet: nn.Module, form: str, scale: str) -> None:
    model = begun(qat_network(tiny_unet, FORMS[form], SCALES[scale], other_offset="learned"))
    model.train()
    learned = trainable(model)
    everything = [*learned.weights, *learned.ranges, *learned.generators]
    assert len({id(parameter) for parameter in everything}) == len(everything)
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in everything}
    floats = {name for name, _ in tiny_unet.named_parameters()}
    assert {id(p) for name, p in model.network.named_parameters() if name in floats} == {id(p) for p in learned.weights}
    assert bool(learned.generators) is (scale in ("tdq", "statistics", "statistics and time"))
    inputs = example_inputs(model.network, ANY_T)
    (model(**inputs, outside="nearest").sample - 1).square().mean().backward()
    assert all(parameter.grad is not None for parameter in everything)
    assert sum(bool((parameter.grad != 0).any()) for parameter in learned.ranges) > 0.9 * len(learned.ranges)  # type: ignore[union-attr]


def test_tied_quantizers_are_trained_once(tiny_unet: nn.Module) -> None:
    free = trainable(begun(qat_network(tiny_unet, Duq(), StaticConfig())))
    tied = trainable(begun(qat_network(tiny_unet, Duq(), StaticConfig(), further={"tie_qkv": True})))
    groups = 2 * len(attentions(tiny_unet))
    assert len(free.ranges) - len(tied.ranges) == 2 * groups  # step and gain of two of three


def test_tdq_starts_as_the_static_method(tiny_unet: nn.Module) -> None:
    static, generated = (begun(qat_network(tiny_unet, Lsq(), scale)) for scale in (StaticConfig(), TDQ))
    assert torch.equal(output(static, ANY_T), output(generated, ANY_T))


def test_intervals_follow_the_timesteps_of_the_batch_while_training(tiny_unet: nn.Module) -> None:
    model = trained(begun(qat_network(tiny_unet, Lsq(), TDQ))).eval()
    seen: dict[int, Tensor] = {}
    quantizer = model.activation_quantizers()["conv_in.input_quantizer"]
    quantizer.register_forward_hook(lambda module, x, _: seen.update({0: module.scale_provider(x[0]).scale.flatten()}))
    steps = {}
    for t in (0, 500, 999):
        output(model, (t, t))
        steps[t] = seen[0].clone()
        assert torch.equal(steps[t][:1], steps[t][1:])
    output(model, (999, 0, 500))
    torch.testing.assert_close(seen[0], torch.stack([steps[t][0] for t in (999, 0, 500)]), rtol=1e-6, atol=0)
    assert len({float(step[0]) for step in steps.values()}) == 3
