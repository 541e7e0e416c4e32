"""What methods make of whole networks: through the file and back, mixed widths, stored features, split shortcuts."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from tests.conftest import TIMESTEPS, calibrated, example_inputs, quantizable
from tfmq_exp.denoisers.structure import Role, UNetStructure
from tfmq_exp.denoisers.temporal import TemporalInformationBlock
from tfmq_exp.denoisers.unet import read_structure
from tfmq_exp.diagnostics.temporal_error import temporal_feature_error
from tfmq_exp.methods.temporal_features import CacheFeatures, ComputeFeatures
from tfmq_exp.quant.quantizers.split import SplitQuantizer
from tfmq_exp.quant.scales.dynamic import DynamicConfig
from tfmq_exp.quant.scales.per_step import PerStepScale
from tfmq_exp.quant.scales.tdq import TDQConfig, TDQScale
from tfmq_exp.quant.scales.timestep_groups import TimestepGroupConfig
from tfmq_exp.quant.timestep_encoding import Frequency, Normalised
from tfmq_exp.surgery import serialization
from tfmq_exp.surgery.config import AttentionBits, LayerBits
from tfmq_exp.surgery.quantized_unet import QuantizedUNet
from tfmq_exp.surgery.scales import ScalePlan

INTERVALS = TimestepGroupConfig(2, 1000)
GENERATED = TDQConfig(Frequency(32), (16, 16), 0.2, "default")
THIN = TDQConfig(Normalised(1000), (16, 16), 0.0, "default", seed=1)
CHOSEN = (4, 8, 8, 4)

VARIANTS: dict[str, dict[str, Any]] = {
    "split": {"split": True},
    "outputs": {"output": 8},
    "outputs alone": {"activation": None, "output": 6},
    "operands": {"attention": AttentionBits(8, 16)},
    "operands per step": {"attention": AttentionBits(6, 8), "scales": "all"},
    "intervals": {"scales": ScalePlan(INTERVALS, INTERVALS)},
    "dynamic per sample": {"scales": ScalePlan(DynamicConfig("sample"), DynamicConfig("sample"))},
    "dynamic per tensor": {"scales": ScalePlan(DynamicConfig("tensor"), DynamicConfig("tensor"))},
    "generated": {"scales": ScalePlan(GENERATED, GENERATED)},
    "thin": {"scales": ScalePlan(THIN, THIN)},
    "two widths": {"activation": (4, 8)},
    "everything": {
        "split": True,
        "activation": (8, 4),
        "output": (4, 8),
        "attention": AttentionBits(8, 8),
        "scales": ScalePlan(GENERATED, INTERVALS),
    },
}


def output(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return model(**inputs).sample


def reloaded(model: QuantizedUNet, folder: Path) -> QuantizedUNet:
    model.tabulate_scales()
    serialization.save(model, folder / "model.safetensors")
    return serialization.load(folder / "model.safetensors")


def parts_of(unet: nn.Module) -> UNetStructure:
    return read_structure(unet, example_inputs(unet))


FAMILIES = [("tiny_unet", variant) for variant in VARIANTS] + [
    ("tiny_conditional_unet", variant) for variant in ("split", "outputs", "operands", "everything")
]

Plain = tuple[nn.Module, dict[str, Any], Tensor]


@pytest.fixture(scope="module")
def plain(request: pytest.FixtureRequest) -> Plain:
    """A network, inputs, and what its usual quantized twin returns."""
    unet = request.getfixturevalue(request.param)
    inputs = example_inputs(unet, 2 * TIMESTEPS, seed=5)
    return unet, inputs, output(calibrated(quantizable(unet)), inputs)


# through the file and back


@pytest.mark.parametrize(("plain", "variant"), FAMILIES, indirect=["plain"])
def test_loaded_model_is_bit_equal(plain: Plain, tmp_path: Path, variant: str) -> None:
    unet, inputs, usual = plain
    model = calibrated(quantizable(unet, **VARIANTS[variant]))
    before = output(model, inputs)
    loaded = reloaded(model, tmp_path)
    assert torch.equal(output(model, inputs), before)
    assert torch.equal(output(loaded, inputs), before)
    assert loaded.plan == model.plan
    assert loaded.integers.keys() == model.integers.keys()
    for each in (model, loaded):
        each.use_bits(CHOSEN)
    after = output(loaded, inputs)
    assert torch.equal(after, output(model, inputs))
    assert torch.equal(after, before) is not bool(model.switches())
    assert not torch.equal(after, usual)
    serialization.save(loaded, tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "model.safetensors").read_bytes()


@pytest.mark.parametrize("scale", [GENERATED, THIN])
def test_merging_leaves_tables_and_no_network(tiny_unet: nn.Module, tmp_path: Path, scale: TDQConfig) -> None:
    model = calibrated(quantizable(tiny_unet, scales=ScalePlan(scale, scale)))
    assert all(isinstance(quantizer.source, TDQScale) for quantizer in model.activation_quantizers().values())
    quantizers = model.activation_quantizers().items()
    tables = {name: quantizer.source.table() for name, quantizer in quantizers}  # type: ignore[operator]
    loaded = reloaded(model, tmp_path)
    for name, quantizer in loaded.activation_quantizers().items():
        assert isinstance(quantizer.source, PerStepScale)
        assert torch.equal(quantizer.source.scale, tables[name].scale)
        assert torch.equal(quantizer.source.zero_point, tables[name].zero_point)
        assert len(quantizer.source.scale.unique()) == len(TIMESTEPS)
    assert not any("mlp" in key for key in serialization.read(tmp_path / "model.safetensors")[1])


def test_networks_of_scales_cannot_be_stored(tiny_unet: nn.Module, tmp_path: Path) -> None:
    model = calibrated(quantizable(tiny_unet, scales=ScalePlan(GENERATED, GENERATED)))
    with pytest.raises(TypeError, match="a TDQConfig cannot be stored"):
        serialization.save(model, tmp_path / "model.safetensors")


# mixed widths


@pytest.mark.parametrize("bits", [4, 8])
def test_one_width_at_all_steps_is_the_model_of_that_width(unet: nn.Module, bits: int) -> None:
    inputs, model = example_inputs(unet, 2 * TIMESTEPS, seed=5), calibrated(quantizable(unet, activation=(4, 8)))
    assert model.activation_bits() == (4, 8)
    model.use_bits([bits] * len(TIMESTEPS))
    assert torch.equal(output(model, inputs), output(calibrated(quantizable(unet, activation=bits)), inputs))


def test_every_row_has_the_width_of_its_step(unet: nn.Module) -> None:
    # in double precision, where the batch size moves no activation across the middle between two integers
    model = calibrated(quantizable(unet, activation=(4, 8))).double()
    pure = {bits: calibrated(quantizable(unet, activation=bits)).double() for bits in (4, 8)}
    model.use_bits(CHOSEN)
    inputs = example_inputs(unet, (501, 1, 751, 501, 251))
    inputs = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    together = output(model, inputs)
    for row, t in enumerate(inputs["timestep"].tolist()):
        alone = {key: value[row : row + 1] for key, value in inputs.items()}
        bits = CHOSEN[TIMESTEPS.index(t)]
        torch.testing.assert_close(together[row : row + 1], output(pure[bits], alone), atol=1e-12, rtol=0)
        assert not torch.allclose(together[row : row + 1], output(pure[12 - bits], alone), atol=1e-4)


def test_unknown_width_of_a_model_is_named(tiny_unet: nn.Module) -> None:
    model = quantizable(tiny_unet, activation=(4, 8))
    with pytest.raises(ValueError, match="no quantizer has 6 bits; there are 4, 8"):
        model.use_bits((4, 6, 8, 8))
    assert quantizable(tiny_unet).activation_bits() == ()


# stored temporal features


def scrambled(unet: nn.Module, sites: tuple[str, ...], model: QuantizedUNet) -> None:
    """Give some layers of a model other weights."""
    generator = torch.Generator().manual_seed(3)
    for site in sites:
        for parameter in model.unet.get_submodule(site).parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))


def mixed_temporal_bits(unet: nn.Module) -> dict[str, LayerBits]:
    """Embedding projections that are coarse and fine in turn, after a float time embedding."""
    names = [site.name for site in parts_of(unet).by_role(Role.TIME_PROJ)]
    fine = {name: LayerBits(8, 8) if i % 2 else LayerBits(2, 4) for i, name in enumerate(names)}
    return {"time_embedding.*": LayerBits(8, 8)} | fine


def cached_model(unet: nn.Module, select: Literal["always", "disturbance"], bits: int, **further: Any) -> QuantizedUNet:
    model = calibrated(quantizable(unet, **further))
    CacheFeatures(bits, select)(model, unet, parts_of(unet))
    return model


@pytest.mark.parametrize(
    ("select", "bits", "scales"), [("always", 8, "temporal"), ("always", 3, "none"), ("disturbance", 5, "temporal")]
)
def test_loaded_model_with_stored_features_is_bit_equal(
    unet: nn.Module, tmp_path: Path, select: Literal["always", "disturbance"], bits: int, scales: str
) -> None:
    model = cached_model(unet, select, bits, scales=scales, sites=mixed_temporal_bits(unet))
    inputs = example_inputs(unet, 2 * TIMESTEPS, seed=5)
    before = output(model, inputs)
    loaded = reloaded(model, tmp_path)
    assert torch.equal(output(loaded, inputs), before)
    assert loaded.plan == model.plan
    assert loaded.cached.keys() == model.cached.keys()
    computed = calibrated(quantizable(unet, scales=scales, sites=mixed_temporal_bits(unet)))
    assert not torch.equal(before, output(computed, inputs))


def test_stored_features_are_the_float_ones_on_a_grid_for_each_step(unet: nn.Module) -> None:
    model, t = cached_model(unet, "always", 8), torch.tensor(TIMESTEPS)
    wanted = TemporalInformationBlock(unet, parts_of(unet))(t)
    with model.context.at(t):
        stored = TemporalInformationBlock(model.unet, parts_of(unet))(t)
    for feature, exact in zip(stored, wanted, strict=True):
        for row, exact_row in zip(feature, exact, strict=True):
            lo, hi = min(float(exact_row.min()), 0), max(float(exact_row.max()), 0)
            step = (hi - lo) / 255
            assert float((row - exact_row).abs().max()) <= 0.51 * step
            codes = row.double() / step
            torch.testing.assert_close(codes, codes.round(), atol=1e-2, rtol=0)


def test_nothing_of_the_temporal_information_block_is_left_when_all_is_stored(unet: nn.Module, tmp_path: Path) -> None:
    reloaded(calibrated(quantizable(unet)), tmp_path)
    temporal = parts_of(unet).temporal_sites
    whole = serialization.read(tmp_path / "model.safetensors")[1]
    assert any("time_embedding" in key for key in whole)
    model = cached_model(unet, "always", 8)
    loaded = reloaded(model, tmp_path)
    stored = serialization.read(tmp_path / "model.safetensors")[1]
    kept = [key for key in stored for site in temporal if site in key and not key.startswith("cached/")]
    assert not kept
    assert not set(temporal).intersection(loaded.plan.sites)
    assert set(loaded.cached) == {site.name for site in parts_of(unet).by_role(Role.TIME_PROJ)}
    assert {key for key in whole if not any(site in key for site in temporal)} == {
        key for key in stored if not key.startswith("cached/")
    }


def test_outputs_do_not_depend_on_the_temporal_layers_when_all_is_stored(unet: nn.Module) -> None:
    inputs, outputs = example_inputs(unet, 2 * TIMESTEPS, seed=5), []
    for change in (False, True):
        model = calibrated(quantizable(unet))
        computed = output(model, inputs)
        if change:
            scrambled(unet, parts_of(unet).temporal_sites, model)
            assert not torch.allclose(output(model, inputs), computed, atol=1e-3)
        CacheFeatures(8, "always")(model, unet, parts_of(unet))
        outputs.append(output(model, inputs))
    assert torch.equal(*outputs)


def mean_error(model: QuantizedUNet, unet: nn.Module) -> float:
    rows = temporal_feature_error(model, unet, parts_of(unet))
    return sum(row["relative_mse"] for row in rows) / len(rows)


@pytest.mark.parametrize("select", ["always", "disturbance"])
def test_stored_features_at_8_bits_disturb_less_than_a_block_of_4(
    unet: nn.Module, select: Literal["always", "disturbance"]
) -> None:
    computed = calibrated(quantizable(unet, weight=4, activation=4))
    stored = cached_model(unet, select, 8, weight=4, activation=4)
    assert mean_error(stored, unet) < 0.1 * mean_error(computed, unet)


def test_selection_stores_where_that_disturbs_less(unet: nn.Module) -> None:
    plan, t, parts = mixed_temporal_bits(unet), torch.tensor(TIMESTEPS), parts_of(unet)
    model = calibrated(quantizable(unet, sites=plan))
    block, wanted = TemporalInformationBlock(model.unet, parts), TemporalInformationBlock(unet, parts)(t)
    with model.context.at(t):
        own = block(t)
    expected = set()
    for name, exact, computed in zip(block.names, wanted, own, strict=True):
        errors = {"stored": 0.0, "computed": 0.0}
        for i in range(len(t)):
            lo, hi = exact[i].min().clamp(max=0), exact[i].max().clamp(min=0)
            step = (hi - lo) / (2**5 - 1)
            zero = (-lo / step).round()
            stored = step * (((exact[i] / step).round() + zero).clamp(0, 2**5 - 1) - zero)
            power = exact[i].square().mean()
            errors["stored"] += float((stored - exact[i]).square().mean() / power)
            errors["computed"] += float((computed[i] - exact[i]).square().mean() / power)
        if errors["stored"] < errors["computed"]:
            expected.add(name)
    assert 0 < len(expected) < len(block.names)
    CacheFeatures(5, "disturbance")(model, unet, parts)
    assert set(model.cached) == expected
    with model.context.at(t):
        mixed = TemporalInformationBlock(model.unet, parts)(t)
    for name, computed, now in zip(block.names, own, mixed, strict=True):
        assert torch.equal(computed, now) is (name not in expected)
    assert "time_embedding.linear_1" in model.plan.sites


def test_computing_features_changes_nothing(tiny_unet: nn.Module) -> None:
    model, inputs = calibrated(quantizable(tiny_unet)), example_inputs(tiny_unet, TIMESTEPS)
    before = output(model, inputs)
    ComputeFeatures()(model, tiny_unet, parts_of(tiny_unet))
    assert torch.equal(output(model, inputs), before)


@pytest.mark.parametrize("bits", [1, 9])
def test_stored_features_have_2_to_8_bits(bits: int) -> None:
    with pytest.raises(ValueError, match=f"bits must be a whole number from 2 to 8, got {bits}"):
        CacheFeatures(bits, "always")


def test_unknown_selection_is_named() -> None:
    with pytest.raises(ValueError, match="'never'"):
        CacheFeatures(8, "never")  # type: ignore[arg-type]


# split shortcuts


@contextmanager
def joins(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Tensor, int]]]:
    """Every result of joining two feature maps, and the channels of the first."""
    seen: list[tuple[Tensor, int]] = []
    cat = torch.cat

    def recording(tensors: Any, dim: int = 0) -> Tensor:
        joined = cat(tensors, dim)
        if dim == 1 and len(tensors) == 2 and joined.dim() == 4:
            seen.append((joined, tensors[0].shape[1]))
        return joined

    with monkeypatch.context() as patch:
        patch.setattr(torch, "cat", recording)
        yield seen


def test_split_is_where_trunk_and_skip_were_joined(unet: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    parts, fed = parts_of(unet), dict[str, Tensor]()
    handles = [
        unet.get_submodule(site.name).register_forward_pre_hook(
            lambda _m, args, name=site.name: fed.__setitem__(name, args[0])
        )
        for site in parts.by_role(Role.SHORTCUT)
    ]
    with joins(monkeypatch) as seen, torch.no_grad():
        unet(**example_inputs(unet))
    for handle in handles:
        handle.remove()
    trunk = {name: [size for joined, size in seen if joined is x] for name, x in fed.items()}
    assert {name: [parts.sites[name].split] if parts.sites[name].split else [] for name in fed} == trunk
    assert sum(bool(sizes) for sizes in trunk.values()) == sum(len(block.resnets) for block in unet.up_blocks)
    assert all(site.split is None for site in parts.sites.values() if site.name not in fed)


def test_without_a_middle_the_trunk_comes_from_the_encoder(tiny_unet: nn.Module) -> None:
    bare = UNet2DModel.from_config({**tiny_unet.config, "mid_block_type": None}).eval()
    parts = read_structure(bare, example_inputs(bare))
    first = parts.sites["up_blocks.0.resnets.0.conv_shortcut"]
    assert first.split == bare.down_blocks[-1].resnets[-1].out_channels


def test_only_shortcuts_of_the_decoder_are_split(unet: nn.Module) -> None:
    model, parts = quantizable(unet, split=True), parts_of(unet)
    for name in parts.sites:
        layer, split = model.layer(name), parts.sites[name].split
        assert isinstance(layer.input_quantizer, SplitQuantizer) is (split is not None)
        assert isinstance(layer.weight_quantizer, SplitQuantizer) is (split is not None)
        assert len(layer.weight_parts()) == (2 if split else 1)
    assert not any(line.split for line in quantizable(unet).plan.sites.values())


def test_halves_with_the_grids_of_the_whole_are_the_unsplit_network(unet: nn.Module) -> None:
    whole, split = (calibrated(quantizable(unet, split=split)) for split in (False, True))
    inputs, sources = example_inputs(unet, TIMESTEPS, seed=5), whole.activation_quantizers()
    assert not torch.equal(output(split, inputs), output(whole, inputs))
    for name, quantizer in split.activation_quantizers().items():
        quantizer.load_state_dict(sources[name.split(".parts.")[0]].state_dict())
    for site, line in split.plan.sites.items():
        if line.split:
            codes, grid, spec = whole.integers[site][0]
            pieces = codes.split((line.split, codes.shape[1] - line.split), dim=1)
            split.freeze(site, tuple(type(whole.integers[site][0])(piece, grid, spec) for piece in pieces))
    assert torch.equal(output(split, inputs), output(whole, inputs))


def test_split_halves_are_nearer_to_the_weight(unet: nn.Module) -> None:
    models = [calibrated(quantizable(unet, split=split)) for split in (False, True)]
    for site, line in models[1].plan.sites.items():
        if line.split:
            weight = unet.get_submodule(site).weight
            whole, halves = (float((m.layer(site).weight - weight).square().sum()) for m in models)
            assert halves < whole
