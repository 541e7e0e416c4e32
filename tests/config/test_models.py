"""Models bring their sampler, data and evaluator, and have the published sizes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from tests.e2e.jobs import CONF, composed
from tfmq_exp.denoisers.loading import autoencoder
from tfmq_exp.denoisers.originals import compvis_unet

FULL_SIZE = ("ddim_cifar10", "ldm_bedroom", "ldm_church", "ldm_celebahq", "ldm_ffhq", "ldm_imagenet", "sd_v1_4")


def test_a_model_brings_its_sampler_data_and_evaluator_and_the_command_line_wins(tmp_path: Path) -> None:
    sampler = composed(tmp_path, "model=sd_v1_4").sampler._target_
    assert sampler.endswith("PLMS")
    assert composed(tmp_path, "model=sd_v1_4", "sampler=ddim").sampler._target_.endswith("DDIM")
    bedroom, celeba = (composed(tmp_path, f"model={name}") for name in ("ldm_bedroom", "ldm_celebahq"))
    assert bedroom.eval.name == celeba.eval.name != composed(tmp_path).eval.name
    assert bedroom.data != celeba.data
    assert bedroom.model.denoiser.config == celeba.model.denoiser.config


def test_any_folder_of_diffusers_is_a_model(tmp_path: Path) -> None:
    cfg = composed(tmp_path, "model=diffusers", "path=some/folder")
    assert (cfg.model.denoiser.path, cfg.model.denoiser.config) == ("some/folder", None)


def test_models_say_the_same_things(tmp_path: Path) -> None:
    def read(name: str) -> DictConfig:
        cfg: Any = OmegaConf.load(CONF / "model" / f"{name}.yaml")
        bases = [base for base in cfg.get("defaults", []) if isinstance(base, str) and base != "_self_"]
        return OmegaConf.merge(*map(read, bases), cfg.get("model", cfg))  # type: ignore[return-value]

    def groups(name: str) -> dict[str, set[str]]:
        overrides = ("path=some/folder",) if name == "diffusers" else ()
        protocol = composed(tmp_path, f"model={name}", *overrides).protocol
        return {group: set(values) for group, values in protocol.items()}

    digits = read("digits")
    for name in (*FULL_SIZE, "diffusers"):
        model = read(name)
        assert model.name == name
        assert groups(name) == groups("digits"), name
        assert model.sampling.keys() == digits.sampling.keys(), name
        assert {"name", "path", "config", "ema", "tokenizer"} <= model.denoiser.keys(), name


# parameters of the original networks, counted in the originals: UNet and first stage
PARAMETERS = {
    "ddim_cifar10": (35_746_307, 0),
    "ldm_bedroom": (274_056_163, 55_322_782),
    "ldm_church": (294_966_916, 83_653_863),
    "ldm_imagenet": (400_920_579, 55_322_782),
    "sd_v1_4": (859_520_964, 83_653_863),
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_architectures_have_the_published_size(name: str) -> None:
    model: Any = OmegaConf.load(CONF / "model" / f"{name}.yaml")
    config: Any = OmegaConf.to_container(model.denoiser.config)
    with torch.device("meta"):
        if name == "ddim_cifar10":
            networks: Any = (compvis_unet.ddim_unet(config),)
        else:
            params = config["model"]["params"]
            networks = (
                compvis_unet.openai_unet(params["unet_config"]["params"]),
                autoencoder.build_autoencoder(params["first_stage_config"], scale=1.0),
            )
    counts = tuple(sum(p.numel() for p in network.parameters()) for network in networks)
    assert counts == PARAMETERS[name][: len(counts)]
    protocol: Any = OmegaConf.merge(*(OmegaConf.load(CONF / f"protocol/{file}.yaml") for file in ("default", name)))
    width = networks[0].config["block_out_channels"][0]
    assert protocol.scales.encoding_width == width  # TDQ reads timesteps as the network does
