"""Partitions of networks into units."""

from torch import nn

from tests.helpers.reconstruction import structure
from tfmq_exp.denoisers.structure import Kind, Role
from tfmq_exp.reconstruction.units import Blockwise, TemporalAware


def test_blockwise_learns_embedding_projections_inside_their_blocks(unet: nn.Module) -> None:
    parts = structure(unet)
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
