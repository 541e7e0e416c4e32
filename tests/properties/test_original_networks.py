"""Every family of original networks can be quantized whole: roles, temporal layers, artefacts, learning."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn

from tests.conftest import SCALES, TIMESTEPS
from tfmq_exp.denoisers.denoiser import Conditions
from tfmq_exp.denoisers.families.unet import attentions
from tfmq_exp.denoisers.originals import compvis_unet
from tfmq_exp.denoisers.read_structure import read_structure
from tfmq_exp.denoisers.structure import Role
from tfmq_exp.denoisers.temporal import TemporalInformationBlock, measured_temporal_layers
from tfmq_exp.quant.observers import MinMax
from tfmq_exp.quant.quantizers import Mode
from tfmq_exp.reconstruction.units import TemporalAware
from tfmq_exp.sampling.guidance import Sampling
from tfmq_exp.sampling.samplers import DDIM
from tfmq_exp.surgery import serialization
from tfmq_exp.surgery.config import AttentionBits, LayerBits, QuantizationConfig
from tfmq_exp.surgery.quantized_network import build_quantized_network
from tfmq_exp.surgery.resolve import resolve

GOLDENS = Path(__file__).parents[1] / "goldens/compvis"
PREFIX = "model.diffusion_model."
# number of residual blocks with an embedding projection; in churches the resampling blocks have one too
PROJECTIONS = {"ddim_cifar10": 8, "ldm_cin256_v2": 8, "ldm_lsun_beds": 8, "ldm_lsun_churches": 10}


def network(name: str) -> nn.Module:
    config = yaml.safe_load((GOLDENS / f"{name}.config.yaml").read_text())
    state = {key: value.float() for key, value in load_file(GOLDENS / f"{name}.model.safetensors").items()}
    if name.startswith("ddim"):
        return compvis_unet.load_unet({"config": config}, state)
    kwargs = config["model"]["params"]["unet_config"]["params"]
    return compvis_unet.load_unet(
        {"kwargs": kwargs}, {k.removeprefix(PREFIX): v for k, v in state.items() if k.startswith(PREFIX)}
    )


def inputs(unet: Any, rows: int, seed: int = 0) -> dict[str, Any]:
    """Keyword arguments of a forward pass; rows take timesteps in turn."""
    generator = torch.Generator().manual_seed(seed)
    size, channels = unet.config["sample_size"], unet.config["in_channels"]
    found = {
        "sample": torch.randn(rows, channels, size, size, generator=generator),
        "timestep": torch.tensor([TIMESTEPS[i % len(TIMESTEPS)] for i in range(rows)]),
    }
    width = unet.config.get("cross_attention_dim")
    return found | ({"encoder_hidden_states": torch.randn(rows, 5, width, generator=generator)} if width else {})


@pytest.mark.parametrize("name", PROJECTIONS)
def test_every_layer_has_a_role_and_the_temporal_ones_are_measured(name: str) -> None:
    unet = network(name)
    parts = read_structure(unet, inputs(unet, 1))
    layers = {n for n, m in unet.named_modules() if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d)}
    assert set(parts.layers) == layers
    assert len(parts.by_role(Role.TIME_PROJ)) == PROJECTIONS[name]
    assert measured_temporal_layers(unet, inputs(unet, 1), 1, 751) == set(parts.temporal_layers)
    units = TemporalAware()(parts, frozenset(parts.layers))
    covered = [layer for unit in units for layer in unit.layers]
    assert sorted(covered) == sorted(layers)  # each in one unit


@pytest.mark.parametrize("name", PROJECTIONS)
def test_the_whole_network_is_quantized_saved_and_read_back_bit_by_bit(name: str, tmp_path: Path) -> None:
    unet = network(name)
    parts = read_structure(unet, inputs(unet, 1))
    tie = not parts.by_role(Role.FEED_FORWARD)
    plan = QuantizationConfig(
        {role.value: LayerBits(4, 8) for role in Role}, AttentionBits(8, 8), split_shortcuts=True, tie_qkv=tie
    )
    resolved = resolve(plan, parts, tuple(attentions(unet)), SCALES["temporal"], TIMESTEPS)
    assert any(line.split for line in resolved.layers.values())
    model = build_quantized_network(unet, resolved, MinMax())
    with torch.no_grad():
        wanted = unet(**inputs(unet, 4, 5)).sample
        torch.testing.assert_close(model(**inputs(unet, 4, 5)).sample, wanted, atol=1e-4, rtol=0)  # all is off yet
        model.calibrate_weights()
        for layer in model.weight_layers():
            model.freeze(layer)
        model.set_activations(Mode.OBSERVE)
        model(**inputs(unet, 16, 1))
        model.set_activations(Mode.QUANTIZE)
        ours = model(**inputs(unet, 4, 5)).sample
        serialization.save(model, tmp_path / "model.safetensors")
        again = serialization.load(tmp_path / "model.safetensors")
        assert torch.equal(again(**inputs(unet, 4, 5)).sample, ours)
        error = float((ours - wanted).square().mean() / wanted.var())
        assert 0 < error < 0.3
        features = TemporalInformationBlock(model.network, parts)
        t = torch.tensor(TIMESTEPS)
        with model.context.at(t), again.context.at(t):
            assert all(map(torch.equal, features(t), TemporalInformationBlock(again.network, parts)(t)))


def test_lower_precision_reaches_the_quantized_network_too() -> None:
    unet = network("ldm_lsun_beds")
    parts = read_structure(unet, inputs(unet, 1))
    plan = QuantizationConfig({role.value: LayerBits(8, 8) for role in Role}, AttentionBits(8, 8))
    model = build_quantized_network(
        unet, resolve(plan, parts, tuple(attentions(unet)), SCALES["temporal"], TIMESTEPS), MinMax()
    )
    with torch.no_grad():
        model.calibrate_weights()
        for layer in model.weight_layers():
            model.freeze(layer)
        model.set_activations(Mode.OBSERVE)
        model(**inputs(unet, 16, 1))
        model.set_activations(Mode.QUANTIZE)
        fed = inputs(unet, 4, 5)
        exact, half = (
            Sampling(DDIM(4), precision=precision).predictor(model)(fed["sample"], fed["timestep"], Conditions())
            for precision in ("float32", "bfloat16")
        )
    assert 0 < float((half - exact).square().mean() / exact.var()) < 0.01
