"""Networks under quantization-aware training: what is trained, what is left of it, and the file that it becomes."""

import copy
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.conftest import TIMESTEPS, example_inputs, quantizable
from tfmq_exp.core.records import decode, encode
from tfmq_exp.denoisers.families.unet import attentions
from tfmq_exp.denoisers.read_structure import read_structure
from tfmq_exp.denoisers.structure import Role
from tfmq_exp.pipeline.store import canonical
from tfmq_exp.qat.model import clamp_parameters, finish, observe, penalty, ready, trainable
from tfmq_exp.quant.observers import AbsMax
from tfmq_exp.quant.qat_functions import Duq, Lsq, Nipq, Pact, QATQuantizeFn, Qil
from tfmq_exp.quant.qat_quantizers import TrainableQuantizer, TrainableWeightQuantizer
from tfmq_exp.quant.quantizers import Mode
from tfmq_exp.quant.scales.base import ScaleConfig
from tfmq_exp.quant.scales.dynamic import DynamicConfig, DynamicGeneratorConfig
from tfmq_exp.quant.scales.generator import Frequency
from tfmq_exp.quant.scales.observed_ranges import EMARange, PerStepConfig, StaticConfig, TimestepGroupConfig
from tfmq_exp.quant.scales.tdq import TDQConfig
from tfmq_exp.quant.spec import IntRangeKind, QuantSpec, Scheme
from tfmq_exp.quant.timestep_context import TimestepContext
from tfmq_exp.surgery import serialization
from tfmq_exp.surgery.config import (
    AFTER_SILU,
    AttentionBits,
    LayerBits,
    QATConfig,
    QuantizationConfig,
    ScalePlan,
    SchemeConfig,
)
from tfmq_exp.surgery.quantized_network import QuantizedNetwork, build_quantized_network
from tfmq_exp.surgery.resolve import STORED, ActivationConfig, ResolvedConfig, resolve

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


def test_ranges_without_data_start_as_the_nearest(tiny_unet: nn.Module) -> None:
    model = qat_network(tiny_unet, Lsq(), PerStepConfig())
    observe(model)
    with torch.no_grad():
        model(**example_inputs(tiny_unet, (740, 20)), outside="nearest")  # nearest to the first and the last step
    source = model.activation_quantizers()["conv_in.input_quantizer"].scale_provider
    assert isinstance(source, EMARange)
    assert source.scale.isnan().tolist() == [False, True, True, False]
    first, last = float(source.scale[0]), float(source.scale[3])
    ready(model)
    assert source.scale.tolist() == [first, first, last, last]


def test_an_unobserved_network_is_not_ready(tiny_unet: nn.Module) -> None:
    with pytest.raises(RuntimeError, match="has seen no calibration data"):
        ready(qat_network(tiny_unet, Lsq(), StaticConfig()))


# the penalty


def test_penalty_of_static_clip_values_by_hand(tiny_unet: nn.Module) -> None:
    model = begun(qat_network(tiny_unet, Pact(decay=0.25), StaticConfig(), weights=Lsq()))
    clips = [float(q.scale_provider.scale.detach()) * 3 for q in model.activation_quantizers().values()]  # type: ignore[arg-type]
    assert penalty(model).item() == pytest.approx(0.25 * sum(clip**2 for clip in clips), rel=1e-5)
    penalty(model).backward()
    for quantizer in model.activation_quantizers().values():
        expected = 0.25 * 2 * 9 * float(quantizer.scale_provider.scale.detach())  # type: ignore[arg-type]
        assert float(quantizer.scale_provider.scale.grad) == pytest.approx(expected, rel=1e-5)  # type: ignore[arg-type, union-attr]


def test_penalty_of_generated_clip_values_is_their_mean_over_the_finite_set(tiny_unet: nn.Module) -> None:
    model = trained(begun(qat_network(tiny_unet, Pact(decay=0.25), TDQ, weights=Lsq()))).eval()
    tables = [q.scale_provider.table().scale for q in model.activation_quantizers().values()]  # type: ignore[operator]
    by_hand = sum(0.25 * (3 * table).double().square().mean().item() for table in tables)
    assert penalty(model).item() == pytest.approx(by_hand, rel=1e-5)
    assert penalty(model).requires_grad


def test_layers_that_are_one_in_the_original_are_penalised_once(tiny_unet: nn.Module) -> None:
    """q, k and v with one clip value: its gradient is that of one quantizer, static or of a network."""
    for scale in (StaticConfig(), TDQ):
        tied, free = (
            begun(qat_network(tiny_unet, Pact(decay=0.25), scale, weights=Lsq(), further={"tie_qkv": tie}))
            for tie in (True, False)
        )
        quantizers = free.activation_quantizers()
        sources: list[Any] = [
            q.scale_provider for name, q in quantizers.items() if not {"to_k", "to_v"} & set(name.split("."))
        ]
        assert len(sources) < len(quantizers)
        clips = [float((s.table().scale if scale is TDQ else s.scale).detach().square().mean()) for s in sources]
        assert penalty(tied).item() == pytest.approx(0.25 * 9 * sum(clips), rel=1e-5)


def test_every_network_starts_on_its_own(tiny_unet: nn.Module) -> None:
    """And all of them as the seed says."""
    first, again, other = (
        begun(qat_network(tiny_unet, Lsq(), replace(TDQ, seed=seed), attention=AttentionBits(3, 4)))
        for seed in (0, 0, 1)
    )
    starts = [
        [q.scale_provider.mlp[0].weight.detach() for q in model.activation_quantizers().values()]  # type: ignore[index, union-attr]
        for model in (first, again, other)
    ]
    assert all(torch.equal(a, b) for a, b in zip(starts[0], starts[1], strict=True))
    different = [start.sum().item() for start in (*starts[0], *starts[2])]
    assert len(set(different)) == len(different)


@pytest.mark.parametrize("kind", ["full", "narrow", "tdq_release"])
@pytest.mark.parametrize(("scheme", "bits"), [("symmetric", 3), ("symmetric", 4), ("unsigned", 3), ("unsigned", 4)])
def test_ranges_at_run_time_keep_their_largest_value(kind: IntRangeKind, scheme: Scheme, bits: int) -> None:
    config = DynamicConfig("sample").for_qat(AbsMax(), kind).tabulated()
    line = decode(
        encode(ActivationConfig((QuantSpec(bits, scheme),), config, Lsq(kind)), STORED), ActivationConfig, STORED
    )
    quantizer: Any = line.quantizer(TimestepContext(TIMESTEPS))
    quantizer.mode = Mode.QUANTIZE
    x = torch.rand(3, 40, generator=torch.Generator().manual_seed(0)) + 0.1
    torch.testing.assert_close(quantizer.eval()(x).amax(dim=1), x.amax(dim=1))
    assert quantizer(x).unique().numel() > 3


def test_other_forms_have_no_penalty(tiny_unet: nn.Module) -> None:
    assert all(FORMS[form].decay == 0 for form in FORMS if form != "pact")
    assert penalty(begun(qat_network(tiny_unet, Nipq(), TDQ))).item() == 0


# the plan


def test_offset_grids_lie_where_silu_comes_before(network: nn.Module) -> None:
    model = qat_network(network, Lsq(), StaticConfig(), silu_offset=True)
    parts = read_structure(network, example_inputs(network))
    for name, quantizer in model.activation_quantizers().items():
        assert isinstance(quantizer, TrainableQuantizer)
        silu = parts.layers[name.removesuffix(".input_quantizer")].role in AFTER_SILU
        assert quantizer.spec.scheme == ("unsigned" if silu else "symmetric")
        assert (quantizer.offset is not None) is silu
    observe(model)
    lowest: dict[str, float] = {}

    def look(name: str) -> Any:
        return lambda _, inputs: lowest.update({name: float(inputs[0].min())})

    for name, quantizer in model.activation_quantizers().items():
        if quantizer.spec.scheme == "unsigned":
            quantizer.register_forward_pre_hook(look(name))
    output(model)
    assert all(-0.2786 <= value < 0 for value in lowest.values())


@pytest.mark.parametrize(("form", "scale"), PAIRS)
def test_plans_survive_json(tiny_unet: nn.Module, form: str, scale: str) -> None:
    plan = qat_network(tiny_unet, FORMS[form], SCALES[scale], silu_offset=True).plan
    merged = plan.tabulated()
    assert merged.tabulated() == merged
    assert decode(json.loads(json.dumps(encode(merged, STORED))), ResolvedConfig, STORED) == merged
    if form in ("pact", "nipq") or scale == "tdq":
        with pytest.raises(TypeError, match="cannot be stored; classes that can: "):
            encode(plan, STORED)


def test_a_key_names_the_form_and_others_keys_do_not_change(tiny_unet: nn.Module) -> None:
    texts = {
        name: json.dumps(canonical(qat_network(tiny_unet, form, TDQ).plan.layers["conv_in"].input))
        for name, form in FORMS.items()
    }
    assert len(set(texts.values())) == len(FORMS)
    plain = canonical(quantizable(tiny_unet).plan.layers["conv_in"].input)
    assert plain["specs"] == [{"class": "QuantSpec", "bits": 8, "scheme": "affine", "axis": None}]
    assert plain.keys() == {"class", "specs", "scale", "fn", "offset"}
    assert plain["scale"].keys() == {"class", "int_range", "momentum", "observer"}


def test_few_bits_are_for_trained_ranges() -> None:
    roles = {role.value: LayerBits(3, 3) for role in Role}
    with pytest.raises(ValueError, match=r"activation bits must be 4 to 8 .* got 3"):
        QuantizationConfig(roles)
    for role in Role:
        roles[role.value] = LayerBits(3, 1)
    with pytest.raises(ValueError, match=r"activation bits must be 2 to 8 .* got 1"):
        QuantizationConfig(roles, grids=SYMMETRIC, qat=QATConfig(Lsq(), Lsq(), AbsMax()))


@pytest.mark.parametrize("wrong", ["weights", "activations"])
def test_unfit_grids_are_named(wrong: str) -> None:
    grids = {"weights": "symmetric", "activations": "symmetric"} | {wrong: "affine"}
    qat = QATConfig(Lsq(), Lsq(), AbsMax())
    with pytest.raises(ValueError, match=f"grids.{wrong} symmetric, got 'affine'"):
        QuantizationConfig({role.value: LayerBits(4, 4) for role in Role}, grids=SchemeConfig(**grids), qat=qat)  # type: ignore[arg-type]


def test_unfit_forms_are_named() -> None:
    with pytest.raises(ValueError, match="silu_offset must be true or false, got 'shifted'"):
        QATConfig(Lsq(), Lsq(), AbsMax(), silu_offset="shifted")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="other_offset must be one of zero, learned, got 'mean'"):
        QATConfig(Lsq(), Lsq(), AbsMax(), other_offset="mean")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="learn_gamma is for weights"):
        QATConfig(Qil(learn_gamma=True), Lsq(), AbsMax())


def test_weights_are_placed_by_the_weight_observer_and_float_when_off(tiny_unet: nn.Module) -> None:
    model = qat_network(tiny_unet, Lsq("narrow"), StaticConfig(), bits=8)
    assert torch.allclose(output(model), output(tiny_unet), atol=2e-6)
    model.calibrate_weights()
    for quantizer, weight in (part for layer in model.weight_layers() for part in model.layer(layer).weight_parts()):
        assert isinstance(quantizer, TrainableWeightQuantizer)
        assert quantizer.mode is Mode.OFF
        largest = weight.abs().flatten(1).amax(dim=1)
        torch.testing.assert_close(quantizer.scale.flatten(), largest / 127)
