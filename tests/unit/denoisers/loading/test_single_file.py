"""Weights of one file with an original program's names, against this project's own map of names, and against FLUX's published ones."""

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import FluxTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from tfmq_exp.denoisers.loading.single_file import read_single_file, renamed
from tfmq_exp.denoisers.originals.compvis_checkpoint import load_compvis
from tfmq_exp.denoisers.pipelines.load import load_pipeline

GOLDENS = Path(__file__).parents[3] / "goldens"
PIPELINES = GOLDENS / "transformers/pipelines"


def joined(state: dict[str, Tensor], name: str, *sources: str) -> dict[str, Tensor]:
    """A layer whose weights and biases are those of several layers, one below the other."""
    found = {leaf: [state[f"{source}.{leaf}"] for source in sources] for leaf in ("weight", "bias")}
    return {f"{name}.{leaf}": torch.cat(parts) for leaf, parts in found.items()}


def double_block(state: dict[str, Tensor], own: str, block: str) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    streams = (
        ("img", "norm1", "to_{}", "norm_{}", "to_out.0", "ff"),
        ("txt", "norm1_context", "add_{}_proj", "norm_added_{}", "to_add_out", "ff_context"),
    )
    for theirs, norm, qkv, rms, out, ff in streams:
        found |= joined(state, f"{own}.{theirs}_mod.lin", f"{block}.{norm}.linear")
        found |= joined(state, f"{own}.{theirs}_attn.qkv", *(f"{block}.attn.{qkv.format(part)}" for part in "qkv"))
        found |= joined(state, f"{own}.{theirs}_attn.proj", f"{block}.attn.{out}")
        found |= joined(state, f"{own}.{theirs}_mlp.0", f"{block}.{ff}.net.0.proj")
        found |= joined(state, f"{own}.{theirs}_mlp.2", f"{block}.{ff}.net.2")
        for part, scale in (("q", "query_norm"), ("k", "key_norm")):
            found[f"{own}.{theirs}_attn.norm.{scale}.scale"] = state[f"{block}.attn.{rms.format(part)}.weight"]
    return found


def single_block(state: dict[str, Tensor], own: str, block: str) -> dict[str, Tensor]:
    found = joined(state, f"{own}.modulation.lin", f"{block}.norm.linear")
    found |= joined(state, f"{own}.linear1", *(f"{block}.attn.to_{part}" for part in "qkv"), f"{block}.proj_mlp")
    found |= joined(state, f"{own}.linear2", f"{block}.proj_out")
    for part, scale in (("q", "query_norm"), ("k", "key_norm")):
        found[f"{own}.norm.{scale}.scale"] = state[f"{block}.attn.norm_{part}.weight"]
    return found


def flux_names(state: dict[str, Tensor], double: int, single: int) -> dict[str, Tensor]:
    """Weights of FLUX by the names that black-forest-labs publishes; the last layer's modulation has its shift first there."""
    found: dict[str, Tensor] = {}
    for theirs, ours in (("time_in", "timestep"), ("vector_in", "text"), ("guidance_in", "guidance")):
        for i, layer in enumerate(("in_layer", "out_layer"), start=1):
            found |= joined(state, f"{theirs}.{layer}", f"time_text_embed.{ours}_embedder.linear_{i}")
    for theirs, ours in (("img_in", "x_embedder"), ("txt_in", "context_embedder"), ("final_layer.linear", "proj_out")):
        found |= joined(state, theirs, ours)
    for i in range(double):
        found |= double_block(state, f"double_blocks.{i}", f"transformer_blocks.{i}")
    for i in range(single):
        found |= single_block(state, f"single_blocks.{i}", f"single_transformer_blocks.{i}")
    for leaf in ("weight", "bias"):  # diffusers: scale, shift
        scale, shift = state[f"norm_out.linear.{leaf}"].chunk(2)
        found[f"final_layer.adaLN_modulation.1.{leaf}"] = torch.cat([shift, scale])
    return found


def test_flux_by_its_published_names() -> None:
    """At its published width, which diffusers' function takes for granted, with fewer blocks; shapes and names alone."""
    with torch.device("meta"):
        network: Any = FluxTransformer2DModel(num_layers=1, num_single_layers=2, guidance_embeds=True)
    expected = network.state_dict()
    found = renamed(flux_names(expected, 1, 2), network)
    assert {name: value.shape for name, value in found.items()} == {name: v.shape for name, v in expected.items()}


def test_a_checkpoint_of_ldm_is_that_of_the_own_map() -> None:
    path = GOLDENS / "compvis/ldm_cin256_v2.model.safetensors"
    config = yaml.safe_load((GOLDENS / "compvis/ldm_cin256_v2.config.yaml").read_text())
    expected = load_compvis(path, config, ema=False, tokenizer=None, decode_rows=1).network
    found = read_single_file(path, expected)
    own = expected.state_dict()
    assert found.keys() == own.keys()
    # attention's projections are convolutions of one pixel in LDM
    assert all(torch.equal(found[name].float().reshape(own[name].shape), own[name]) for name in own)


def test_weights_with_diffusers_names_are_taken_as_they_are(tmp_path: Path) -> None:
    state = load_file(PIPELINES / "sd3/transformer/diffusion_pytorch_model.safetensors")
    state["proj_out.bias"] = state["proj_out.bias"] + 1
    save_file(state, tmp_path / "tuned.safetensors")
    settings = {"height": 16, "width": 16, "max_sequence_length": 8}
    plain, tuned = (
        load_pipeline(PIPELINES / "sd3", settings=settings, checkpoint=checkpoint)
        for checkpoint in (None, tmp_path / "tuned.safetensors")
    )
    assert torch.equal(tuned.network.proj_out.bias, plain.network.proj_out.bias + 1)
    assert tuned.weights_sha256 != plain.weights_sha256


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no checkpoint at"),
        (b"PK\x03\x04", "is no safetensors file"),
        ({"a": torch.zeros(1)}, "tuned.safetensors"),
    ],
)
def test_other_files_are_refused(content: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "tuned.safetensors"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content:
        save_file(content, path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_pipeline(PIPELINES / "sd3", checkpoint=path)
