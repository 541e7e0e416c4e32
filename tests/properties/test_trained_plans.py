"""Plans of quantization-aware training: grids and forms, and those that cannot be."""

import json
from typing import Any

import pytest
import torch
from torch import nn

from tests.conftest import example_inputs, quantizable
from tests.properties.test_trained import FORMS, PAIRS, SCALES, SYMMETRIC, TDQ, output, qat_network
from tfmq_exp.core.records import decode, encode
from tfmq_exp.denoisers.read_structure import read_structure
from tfmq_exp.denoisers.structure import Role
from tfmq_exp.pipeline.store import canonical
from tfmq_exp.qat.model import observe
from tfmq_exp.quant.observers import AbsMax
from tfmq_exp.quant.qat_functions import Lsq, Qil
from tfmq_exp.quant.qat_quantizers import TrainableQuantizer, TrainableWeightQuantizer
from tfmq_exp.quant.quantizers import Mode
from tfmq_exp.quant.scales.observed_ranges import StaticConfig
from tfmq_exp.surgery.config import (
    AFTER_SILU,
    LayerBits,
    QATConfig,
    QuantizationConfig,
    SchemeConfig,
)
from tfmq_exp.surgery.resolve import STORED, ResolvedConfig


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
