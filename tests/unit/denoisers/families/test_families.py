"""Roles, blocks and temporal features of networks of diffusers, against recordings and inside the networks themselves."""

import copy
import json
from typing import Any

import pytest
import torch
from diffusers import HunyuanDiT2DModel
from torch import Tensor, nn

from tests.conftest import generic
from tests.helpers.transformers import GOLDENS, NAMES, Stored, cast, outputs_inside, read_stored
from tfmq_exp.denoisers.denoiser import nested
from tfmq_exp.denoisers.families.family import roles_by_pattern
from tfmq_exp.denoisers.families.find import family_of
from tfmq_exp.denoisers.read_structure import read_structure
from tfmq_exp.denoisers.structure import TEMPORAL_ROLES, Kind, Role
from tfmq_exp.denoisers.temporal import TemporalInformationBlock, measured_temporal_layers, temporal_pairs
from tfmq_exp.quant.scales.observed_ranges import StaticConfig
from tfmq_exp.surgery.config import AttentionBits, LayerBits, QuantizationConfig, ScalePlan
from tfmq_exp.surgery.resolve import resolve


@pytest.fixture(params=NAMES)
def stored(request: pytest.FixtureRequest) -> Stored:
    return read_stored(request.param)


def replaced(stored: Stored, variation: str) -> dict[str, Any]:
    """Arguments of a variation of the conditions."""
    prefix = f"cond.{variation}."
    other = {k.removeprefix(prefix): v for k, v in stored.recorded.items() if variation and k.startswith(prefix)}
    return {**stored.arguments, **other}


def test_temporal_roles_are_those_of_the_recorded_layers(stored: Stored) -> None:
    found = stored.structure().by_role(*TEMPORAL_ROLES)
    assert {layer.name for layer in found} == set(stored.settings["feature_sites"])


def test_measurement_finds_the_same_layers(stored: Stored) -> None:
    arguments, (t, other, *_) = nested(stored.arguments), stored.timesteps.tolist()
    conditions = family_of(stored.network).conditions
    found = measured_temporal_layers(stored.network, arguments, t, other, conditions)
    assert found == set(stored.settings["feature_sites"])
    if "cls" not in stored.settings["varied"]:  # a class is no real number, which the measurement moves
        alone = measured_temporal_layers(stored.network, arguments, t, other)
        assert alone == set(stored.settings["only_t"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_features_are_those_inside_the_network_and_the_recorded_ones(stored: Stored, dtype: torch.dtype) -> None:
    structure = stored.structure()
    network = nn.Module.to(copy.deepcopy(stored.network), dtype)
    block, family = TemporalInformationBlock(network, structure), family_of(network)
    names = [layer.name for layer in structure.by_role(Role.TIME_PROJ)]
    for i, variation in enumerate(stored.settings["conditions"]):
        for j, t in enumerate(stored.timesteps):
            arguments = replaced(stored, variation)
            arguments["timestep"] = torch.full_like(arguments["timestep"], t.item())
            arguments = cast(arguments, dtype)
            given = {name: arguments[name] for name in family.conditions if arguments.get(name) is not None}
            with torch.no_grad():
                features = block.features(arguments["timestep"], given)
            assert set(names) <= features.keys()
            inside = outputs_inside(network, list(features), arguments)
            for name, feature in features.items():
                assert torch.equal(feature, inside[name])
                golden = stored.recorded[f"feature.{name}"][i, j]
                assert (feature[0] - golden).abs().max() <= 1e-5


def test_every_timestep_with_every_condition(stored: Stored) -> None:
    family, structure = family_of(stored.network), stored.structure()
    conditions = {k: stored.arguments[k] for k in family.conditions if stored.arguments.get(k) is not None}
    block = TemporalInformationBlock(stored.network, structure)
    t, given = temporal_pairs(stored.timesteps, conditions)
    count = len(next(iter(conditions.values()), t[:1]))
    with torch.no_grad():
        every = block.features(t, given)
        for row in (0, len(t) - 1):
            one = {name: value[row % count][None] for name, value in conditions.items()}
            for name, feature in block.features(stored.timesteps[row // count][None], one).items():
                torch.testing.assert_close(every[name][row], feature[0], atol=1e-5, rtol=1e-5)


def test_blocks_come_in_the_recorded_order(stored: Stored) -> None:
    golden = json.loads((GOLDENS / "temporal/blocks.json").read_text(encoding="utf-8"))["families"][stored.name]
    recorded = [block["name"] for block in golden]
    blocks = stored.structure().blocks
    assert [block.name for block in blocks if block.kind is Kind.TRANSFORMER] == recorded
    layers = [layer for block in blocks for layer in block.layers]
    assert sorted(layers) == sorted(stored.structure().layers)


def hunyuan_dit() -> tuple[nn.Module, dict[str, Tensor]]:
    """A tiny network whose pooler uses weights of layers that never run, and arguments for it."""
    network = generic(
        lambda: HunyuanDiT2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            patch_size=2,
            sample_size=4,
            hidden_size=16,
            activation_fn="gelu-approximate",
            num_layers=4,
            cross_attention_dim=8,
            cross_attention_dim_t5=8,
            pooled_projection_dim=8,
            text_len=3,
            text_len_t5=2,
        )
    )
    generator = torch.Generator().manual_seed(0)
    return network, {
        "hidden_states": torch.randn(2, 4, 4, 4, generator=generator),
        "timestep": torch.tensor([300.0, 300.0]),
        "encoder_hidden_states": torch.randn(2, 3, 8, generator=generator),
        "text_embedding_mask": torch.ones(2, 3, dtype=torch.int64),
        "encoder_hidden_states_t5": torch.randn(2, 2, 8, generator=generator),
        "text_embedding_mask_t5": torch.ones(2, 2, dtype=torch.int64),
        "image_meta_size": torch.tensor([[64, 64, 64, 64, 0, 0], [32, 64, 32, 64, 0, 8]]),
        "style": torch.tensor([0, 0]),
        "image_rotary_emb.0": torch.randn(4, 8, generator=generator),
        "image_rotary_emb.1": torch.randn(4, 8, generator=generator),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_features_of_hunyuan_dit_pass_through_its_single_precision(dtype: torch.dtype) -> None:
    network, arguments = hunyuan_dit()
    one = {name: value if "rotary" in name else value[:1] for name, value in arguments.items()}
    structure = read_structure(network, nested(one))
    network, arguments = nn.Module.to(network, dtype), cast(arguments, dtype)
    given = {name: arguments[name] for name in family_of(network).conditions}
    with torch.no_grad():
        features = TemporalInformationBlock(network, structure).features(arguments["timestep"], given)
    inside = outputs_inside(network, list(features), arguments)
    assert features.keys() == {*(f"blocks.{i}.norm1.linear" for i in range(4)), "norm_out.linear"}
    assert all(torch.equal(feature, inside[name]) for name, feature in features.items())


def test_layers_that_never_run_are_in_no_structure() -> None:
    network, arguments = hunyuan_dit()
    one = {name: value if "rotary" in name else value[:1] for name, value in arguments.items()}
    structure = read_structure(network, nested(one))
    unused = {name for name, _ in network.named_modules() if name.startswith("time_extra_emb.pooler.")}
    assert unused == {f"time_extra_emb.pooler.{part}_proj" for part in "qkvc"}
    assert not unused & structure.layers.keys()
    assert not unused & {layer for block in structure.blocks for layer in block.layers}
    assert structure.layers["blocks.3.skip_linear"].split == 16


def test_layers_that_never_run_cannot_be_quantized() -> None:
    network, arguments = hunyuan_dit()
    one = {name: value if "rotary" in name else value[:1] for name, value in arguments.items()}
    structure, layer = read_structure(network, nested(one)), "time_extra_emb.pooler.q_proj"
    roles = {role.value: LayerBits(4, None) for role in Role}
    config = QuantizationConfig(roles, AttentionBits(), {layer: LayerBits(4, None)})
    with pytest.raises(ValueError, match=f"the pattern '{layer}' in surgery.sites matches no layer"):
        resolve(config, structure, (), ScalePlan(StaticConfig(), StaticConfig()), (1,))


def test_unknown_networks_and_layers_are_named() -> None:
    with pytest.raises(ValueError, match=r"a Linear is a denoiser of no known family; known: UNet2DModel, .*Flux2"):
        family_of(nn.Linear(1, 1))
    with pytest.raises(ValueError, match="no role is known for 1 layers of Sequential, first '1'"):
        roles_by_pattern({"0": Role.STEM})(nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1)))
