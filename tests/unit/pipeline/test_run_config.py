"""Which layers depend on time alone is confirmed at the sampler's last timestep and a neighbour that the network knows."""

from pathlib import Path

import pytest
from diffusers import DDIMScheduler, UNet2DModel

from tests.unit.sampling.folders import make_generic
from tfmq_exp.denoisers.denoiser import Denoiser
from tfmq_exp.denoisers.loading.pretrained import load_denoiser
from tfmq_exp.pipeline.run_config import measured_structure


@pytest.fixture
def denoiser(tmp_path: Path) -> Denoiser:
    """A network with an embedding of each of its 20 timesteps, and of no other."""
    network = UNet2DModel(
        sample_size=8,
        time_embedding_type="learned",
        num_train_timesteps=20,
        block_out_channels=(16,),
        layers_per_block=1,
        norm_num_groups=8,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        attention_head_dim=16,
    )
    make_generic(network).save_pretrained(tmp_path / "unet")
    DDIMScheduler(num_train_timesteps=20).save_pretrained(tmp_path / "scheduler")
    return load_denoiser("x", tmp_path, None, False)


@pytest.mark.parametrize("last", [0, 7, 19])
def test_any_timestep_may_be_the_last(denoiser: Denoiser, last: int) -> None:
    assert measured_structure(denoiser, last).temporal_layers


def test_a_layer_of_zeros_is_named(denoiser: Denoiser) -> None:
    denoiser.network.get_submodule("mid_block.resnets.1.time_emb_proj").weight.data.zero_()  # type: ignore[union-attr]
    with pytest.raises(
        ValueError, match=r"by measurement 1 layers .* first mid_block\.resnets\.1\.time_emb_proj: are its"
    ):
        measured_structure(denoiser, 7)
