"""Partitions of networks into units, and QDrop's mixture of quantized and float elements."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tests.helpers.reconstruction import structure
from tfmq_exp.denoisers.structure import Kind, Role
from tfmq_exp.quant.quantizers import AffineQuantizer, Mode
from tfmq_exp.quant.scales.observed_ranges import EMARange, StaticConfig
from tfmq_exp.quant.spec import QuantSpec
from tfmq_exp.reconstruction.units import Blockwise, MixedInputs, TemporalAware


def test_blockwise_learns_embedding_projections_inside_their_blocks(network: nn.Module) -> None:
    parts = structure(network)
    units = {unit.name: unit for unit in Blockwise()(parts, frozenset(parts.layers))}
    for layer in parts.by_role(Role.TIME_PROJ):
        block = layer.name.removesuffix(".time_emb_proj")
        assert units[block].kind is Kind.RESIDUAL
        assert layer.name in units[block].layers


def test_units_without_anything_to_learn_do_not_appear(tiny_conditional_unet: nn.Module) -> None:
    parts = structure(tiny_conditional_unet)
    learnable = frozenset(layer.name for layer in parts.by_role(Role.ATTN_QKV, Role.ATTN_OUT))
    units = TemporalAware()(parts, learnable)
    assert {unit.kind for unit in units} == {Kind.ATTENTION}
    assert all("attentions" in unit.name for unit in units)


def captured() -> dict[Any, Any]:
    """A unit's inputs from both networks: timesteps, a tensor, something nested, and constants."""
    generator = torch.Generator().manual_seed(0)

    def fed() -> Any:
        x, y = torch.randn(2, 4, 50, 50, generator=generator)
        return torch.tensor([1, 2, 3, 4]), (x, None), {"deep": [y], "flag": True}

    return {"quantized": fed(), "float": fed()}


@pytest.mark.parametrize(("quant_prob", "origin"), [(1.0, "quantized"), (0.0, "float")])
def test_inputs_that_are_never_mixed(quant_prob: float, origin: str) -> None:
    data = captured()
    ours, theirs = (
        pytree.tree_flatten(structure) for structure in (MixedInputs(quant_prob).combine(data), data[origin])
    )
    assert ours[1] == theirs[1]
    for a, b in zip(ours[0], theirs[0], strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a is b


@pytest.mark.parametrize("quant_prob", [0.2, 0.5, 0.9])
def test_inputs_are_mixed_element_by_element(quant_prob: float) -> None:
    data = captured()
    torch.manual_seed(0)
    t, (x, nothing), further = MixedInputs(quant_prob).combine(data)
    assert torch.equal(t, data["float"][0])
    assert nothing is None
    assert further["flag"] is True
    leaves = ((x, *(data[origin][1][0] for origin in ("quantized", "float"))),)
    leaves += ((further["deep"][0], *(data[origin][2]["deep"][0] for origin in ("quantized", "float"))),)
    for mixed, quantized, original in leaves:
        kept = mixed == quantized
        assert torch.equal(mixed, torch.where(kept, quantized, original))
        assert float(kept.float().mean()) == pytest.approx(quant_prob, abs=0.02)


@pytest.mark.parametrize("quant_prob", [0.0, 0.5, 1.0])
def test_activations_inside_the_unit_are_mixed_while_it_learns(quant_prob: float) -> None:
    torch.manual_seed(0)
    x, quantizer = torch.randn(100, 100), AffineQuantizer(EMARange(StaticConfig(), QuantSpec(2)))
    quantizer.observe(x)
    quantizer.mode = Mode.QUANTIZE
    quantized = quantizer(x)
    with MixedInputs(quant_prob).learning_context([quantizer]):
        mixed = quantizer(x)
    kept = mixed == quantized
    assert torch.equal(mixed, torch.where(kept, quantized, x))
    assert float(kept.float().mean()) == pytest.approx(quant_prob, abs=0.02)
    assert torch.equal(quantizer(x), quantized)


@pytest.mark.parametrize("quant_prob", [-0.1, 1.1])
def test_impossible_probabilities_are_named(quant_prob: float) -> None:
    with pytest.raises(ValueError, match=f"got {quant_prob}"):
        MixedInputs(quant_prob)
