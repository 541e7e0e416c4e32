"""Decoders of first stages: the numbers of their autoencoders, roles of all layers, and what is refused."""

import copy

import pytest
import torch
from diffusers import AutoencoderKLWan

from tests.helpers.components import KINDS, autoencoder, latents
from tests.helpers.pipelines import GOLDENS, call_of, recorded
from tfmq_exp.denoisers.denoiser import Pixels
from tfmq_exp.denoisers.families.decoder import Decoder
from tfmq_exp.denoisers.families.family import layer_names
from tfmq_exp.denoisers.first_stage_decoder import autoencoder_of, decoder_inputs, with_decoder
from tfmq_exp.denoisers.loading.autoencoder import LatentDecoder
from tfmq_exp.denoisers.pipelines.pipeline_decoder import PipelineDecoder
from tfmq_exp.denoisers.pipelines.pipeline_folder import PipelineFolder
from tfmq_exp.denoisers.read_structure import read_structure
from tfmq_exp.denoisers.structure import Role


@pytest.mark.parametrize("name", KINDS)
def test_a_decoder_gives_the_bits_of_its_autoencoder(name: str) -> None:
    own, z = autoencoder(name), latents(name, 2)
    with torch.no_grad():
        assert torch.equal(Decoder(own)(z).sample, own.decode(z).sample)


@pytest.mark.parametrize("name", KINDS)
def test_every_layer_has_a_role_and_one_block(name: str) -> None:
    decoder = Decoder(autoencoder(name))
    structure = read_structure(decoder, {"sample": latents(name, 1), "timestep": torch.zeros(1)})
    assert [*structure.layers] == layer_names(decoder)
    members = [layer for block in structure.blocks for layer in block.layers]
    assert sorted(members) == sorted(structure.layers)
    assert any(len(block.layers) > 1 for block in structure.blocks)
    heads = structure.by_role(Role.HEAD)
    assert len(heads) == 1
    assert decoder.get_submodule(heads[0].name).out_channels == 3  # the image
    assert structure.blocks[-1].layers == (heads[0].name,)
    assert structure.blocks[0].layers[0] in [layer.name for layer in structure.by_role(Role.STEM)]


def test_inputs_are_the_scaled_latents_of_a_first_stage() -> None:
    z = latents("AutoencoderKL", 3)
    assert torch.equal(decoder_inputs(LatentDecoder(autoencoder("AutoencoderKL"), 0.5, rows=2), z), z / 0.5)


def test_inputs_of_a_pipeline_are_unpacked_scaled_and_shifted() -> None:
    """FLUX: two by two latents are one token, and the autoencoder's configuration has a scale and a shift."""
    stage = PipelineDecoder(PipelineFolder(GOLDENS / "flux"), call_of("flux")[1])
    final = recorded("flux")["final_latents"]  # [images, tokens, 4 channels x 2 x 2]
    side = int(final.shape[1] ** 0.5)
    pixels = final.reshape(-1, side, side, 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(-1, 4, 2 * side, 2 * side)
    settings = stage.autoencoder.config
    expected = pixels / settings["scaling_factor"] + settings["shift_factor"]
    assert torch.allclose(decoder_inputs(stage, final), expected, atol=1e-6)


def test_a_first_stage_decodes_with_another_decoder() -> None:
    z = latents("AutoencoderKL", 2)
    stage, other = (LatentDecoder(autoencoder("AutoencoderKL"), 0.5) for _ in range(2))
    before = stage.decode(z)
    torch.nn.init.normal_(other.autoencoder.decoder.conv_out.weight, generator=torch.Generator().manual_seed(5))
    changed = with_decoder(stage, Decoder(other.autoencoder))
    assert torch.equal(changed.decode(z), other.decode(z))
    assert torch.equal(stage.decode(z), before)  # which keeps its own
    assert not torch.equal(changed.decode(z), before)


@pytest.mark.bad_input
def test_what_has_no_known_decoder_is_refused_by_name() -> None:
    video = AutoencoderKLWan(base_dim=8, z_dim=4, dim_mult=[1], num_res_blocks=1, temperal_downsample=[])
    with pytest.raises(
        ValueError, match="no AutoencoderKLWan can be quantized, first_stage=float; those that can: AutoencoderKL,"
    ):
        Decoder(video)
    wide = {"block_out_channels": (32, 32), "norm_num_groups": 32}  # as such norms have to be
    with pytest.raises(ValueError, match="no VQModel with norm_type='spatial' can be quantized"):
        Decoder(autoencoder("VQModel", norm_type="spatial", **wide))
    with pytest.raises(ValueError, match="it has no first stage that could be quantized"):
        autoencoder_of(Pixels())


@pytest.mark.bad_input
def test_a_decoder_of_other_settings_is_refused() -> None:
    stage = LatentDecoder(autoencoder("AutoencoderKL"), 0.5)
    wider = copy.deepcopy(autoencoder("AutoencoderKL", layers_per_block=2))
    with pytest.raises(ValueError, match="with other settings than the model's AutoencoderKL"):
        with_decoder(stage, Decoder(wider))
