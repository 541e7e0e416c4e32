"""Networks of the original programs, converted, give the outputs of the original programs."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from tfmq_exp.denoisers.families.unet import time_embedding
from tfmq_exp.denoisers.originals import compvis_unet

GOLDENS = Path(__file__).parents[3] / "goldens"
TOLERANCE = 3e-5  # float32 rounding in another order of operations; the goldens' own README
PREFIX = "model.diffusion_model."


def original(name: str) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, Tensor]]:
    """Architecture, weights of the UNet by their original keys, and recorded inputs and outputs."""
    folder = GOLDENS / "compvis"
    config = yaml.safe_load((folder / f"{name}.config.yaml").read_text())
    state = {key: value.float() for key, value in load_file(folder / f"{name}.model.safetensors").items()}
    recorded = load_file(folder / f"{name}.io.safetensors")
    if name.startswith("ddim"):
        return {"config": config}, state, recorded
    kwargs = config["model"]["params"]["unet_config"]["params"]
    return {"kwargs": kwargs}, {k.removeprefix(PREFIX): v for k, v in state.items() if k.startswith(PREFIX)}, recorded


@pytest.mark.parametrize("name", ["ldm_cin256_v2", "ddim_cifar10", "ldm_lsun_churches", "ldm_lsun_beds"])
def test_converted_unet_gives_the_original_outputs(name: str) -> None:
    architecture, state, recorded = original(name)
    network = compvis_unet.load_unet(architecture, state)
    context = {"encoder_hidden_states": recorded["context"]} if "context" in recorded else {}
    for x, eps in (("x", "eps"), ("x_small", "eps_x_small")):
        with torch.no_grad():
            output = network(recorded[x], recorded["t"], **context).sample
        torch.testing.assert_close(output, recorded[eps], atol=TOLERANCE, rtol=0)


def test_reference_network_gives_the_original_outputs() -> None:
    folder = GOLDENS / "reference_run"
    reference = json.loads((folder / "ldm" / "reference.json").read_text())
    assert reference["architecture"] == json.loads((folder / "architectures.json").read_text())["ldm"]
    network = compvis_unet.load_unet(reference["architecture"], load_file(folder / "ldm" / "init_state.safetensors"))
    data = load_file(folder / "ldm" / "data.safetensors")
    for part, wanted in (("cali", "fp_out"), ("held", "fp_out_held")):
        with torch.no_grad():
            output = network(data[f"{part}.x"], data[f"{part}.t"]).sample
        torch.testing.assert_close(output, data[wanted], atol=TOLERANCE, rtol=0)


def test_converted_unet_has_the_original_temporal_features() -> None:
    architecture, state, recorded = original("ddim_cifar10")
    network = compvis_unet.load_unet(architecture, state)
    places = {
        "tib.down.1.block.0.temb_proj": "down_blocks.1.resnets.0.time_emb_proj",
        "tib.mid.block_2.temb_proj": "mid_block.resnets.1.time_emb_proj",
        "tib.up.1.block.0.temb_proj": "up_blocks.0.resnets.0.time_emb_proj",
    }
    embedding = time_embedding(network, recorded["t"], {})
    for recording, place in places.items():
        torch.testing.assert_close(network.get_submodule(place)(embedding), recorded[recording], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("change", ["missing", "unknown", "shape"])
def test_weights_that_do_not_fit_are_refused(change: str) -> None:
    architecture, state, _ = original("ldm_cin256_v2")
    weight = state.pop("out.2.weight")
    if change == "unknown":
        state |= {"out.2.weight": weight, "novelty.weight": weight}
    elif change == "shape":
        state["out.2.weight"] = weight[:1]
    with pytest.raises(ValueError, match="novelty.weight" if change == "unknown" else "conv_out.weight"):
        compvis_unet.load_unet(architecture, state)
