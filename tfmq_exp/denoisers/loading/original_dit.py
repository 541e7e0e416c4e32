"""DiT by class (arXiv 2212.09748): an original checkpoint of its program, and the folder of an autoencoder of diffusers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tfmq_exp.core.file_kind import why_missing
from tfmq_exp.core.files import hash_of_json, sha256_of
from tfmq_exp.denoisers.denoiser import Denoiser, DenoiserParts
from tfmq_exp.denoisers.loading.condition_encoders import ClassLabels
from tfmq_exp.denoisers.loading.diffusers_folder import load_first_stage, open_component
from tfmq_exp.denoisers.loading.network_config import AUTOENCODERS
from tfmq_exp.denoisers.loading.weight_files import weight_files
from tfmq_exp.denoisers.originals.dit_checkpoint import DEFAULTS, published, read_dit

SCHEDULE = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
# Of four: the program guides the first three "for exact reproducibility", and so do its published numbers.
GUIDED_CHANNELS = 3


def load_original_dit(
    path: str | Path,
    autoencoder: str | Path,
    size: str = "DiT-XL/2",
    image_size: int = 256,
    arguments: Mapping[str, Any] | None = None,
    guided_channels: int | None = GUIDED_CHANNELS,
    name: str = "dit_imagenet",
    decode_rows: int = 8,
) -> Denoiser:
    """Read a DiT as its program published it: float32, in evaluation mode, without gradients, on the CPU.

    Args:
        path: the checkpoint, DiT-XL-2-256x256.pt, or the same tensors as safetensors.
        autoencoder: folder of the AutoencoderKL whose latents it denoises, with config.json and safetensors.
        size: of the paper, see `published`.
        image_size: pixels of a side.
        arguments: of the original's class, in place of a published size.
        guided_channels: how many channels guidance changes; None for all.
        name: of the model, as results have it.
        decode_rows: images that the autoencoder decodes together; bounds its memory.

    Raises:
        FileNotFoundError: no checkpoint, or no autoencoder; nothing is downloaded.
        ValueError: damaged, of another size, or an autoencoder of other latents.
    """
    path, folder = Path(path), Path(autoencoder)
    if not path.is_file():
        expected = "expected DiT-XL-2-256x256.pt, published at github.com/facebookresearch/DiT; nothing is downloaded"
        raise FileNotFoundError(f"no weights of {name} at {path}{why_missing(path)}: {expected}")
    if not (folder / "config.json").is_file():
        expected = "expected the folder of an AutoencoderKL of diffusers (sd-vae-ft-ema); nothing is downloaded"
        raise FileNotFoundError(f"no config.json in {folder}{why_missing(folder)}: {expected}")
    given = {**DEFAULTS, **(published(size, image_size) if arguments is None else arguments)}
    stage, network = load_first_stage(open_component(folder, AUTOENCODERS), decode_rows), read_dit(path, given)
    if stage.channels != given["in_channels"]:
        raise ValueError(f"{folder}: latents have {stage.channels} channels, and {path} takes {given['in_channels']}")
    encoder = ClassLabels(given["num_classes"], guided_channels)
    shape = (given["in_channels"], given["input_size"], given["input_size"])
    parts = DenoiserParts(network, shape, SCHEDULE, encoder, stage)
    stages = {file.name: sha256_of(file) for file in (folder / "config.json", *weight_files(folder))}
    settings = {"architecture": given, "guided_channels": guided_channels, "autoencoder_sha256": hash_of_json(stages)}
    return Denoiser(name=name, weights_sha256=sha256_of(path), settings=settings, **parts._asdict())
