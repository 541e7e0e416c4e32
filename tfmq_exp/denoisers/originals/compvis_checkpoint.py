"""A denoiser from one file of an original program: CompVis' latent diffusion and Stable Diffusion, or DDIM."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tfmq_exp.core.finite import require_finite, require_finite_weights
from tfmq_exp.denoisers.denoiser import ConditionEncoder, DenoiserParts, NoConditions, Pixels
from tfmq_exp.denoisers.loading.autoencoder import LatentDecoder, load_autoencoder
from tfmq_exp.denoisers.loading.checkpoint import Checkpoint
from tfmq_exp.denoisers.loading.condition_encoders import (
    VIT_L_14,
    ClassEmbedder,
    TextEncoder,
    load_text_model,
    read_tokenizer,
)
from tfmq_exp.denoisers.originals.compvis_unet import load_unet

UNET, FIRST_STAGE, CONDITIONS = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
UNCONDITIONAL = "__is_unconditional__"
ENCODERS = ("ClassEmbedder", "FrozenCLIPEmbedder")


def at(config: Mapping[str, Any], place: str) -> Any:
    """The value at a dotted place of an architecture; ValueError if there is none."""
    value: Any = config
    for key in place.split("."):
        if not isinstance(value, Mapping) or key not in value:
            layouts = "`model.params` of latent diffusion, or `model`, `data` and `diffusion` of DDIM"
            raise ValueError(f"the architecture has no {place!r}: expected the original program's layout, {layouts}")
        value = value[key]
    return value


def is_ddim(config: Mapping[str, Any]) -> bool:
    """Whether an architecture is in the layout of the DDIM program; LDM's otherwise."""
    return "diffusion" in config


def unet_architecture(config: Mapping[str, Any]) -> dict[str, Any]:
    """The part of an architecture that `load_unet` takes."""
    if is_ddim(config):
        return {"config": {section: at(config, section) for section in ("model", "data")}}
    return {"kwargs": at(config, "model.params.unet_config.params")}


def sample_shape(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """Channels, height and width of one sample."""
    section = at(config, "data" if is_ddim(config) else "model.params")
    return int(at(section, "channels")), int(at(section, "image_size")), int(at(section, "image_size"))


def training_schedule(config: Mapping[str, Any]) -> dict[str, Any]:
    """The noise that the network was trained on, as arguments of diffusers' schedulers; ValueError for other kinds."""
    if is_ddim(config):
        places = ("beta_schedule", "num_diffusion_timesteps", "beta_start", "beta_end")
        kind, count, start, end = (at(config, f"diffusion.{place}") for place in places)
    else:
        params = at(config, "model.params")
        usual = {"beta_schedule": "linear", "timesteps": 1000, "linear_start": 1e-4, "linear_end": 2e-2}
        kind, count, start, end = (params.get(key, value) for key, value in usual.items())
        if params.get("parameterization", "eps") != "eps":
            raise ValueError(f"parameterization must be eps, got {params['parameterization']!r}")
    if kind != "linear":
        raise ValueError(f"beta_schedule must be linear, got {kind!r}")
    kept = "linear" if is_ddim(config) else "scaled_linear"  # LDM's linear schedule is linear in the square root
    betas = {"beta_start": float(start), "beta_end": float(end), "beta_schedule": kept}
    return {"num_train_timesteps": int(count), **betas}


def check_schedule(file: Checkpoint, schedule: Mapping[str, Any]) -> None:
    """ValueError if the file holds the betas of another schedule: the architecture is another model's."""
    if "betas" in file.names():
        betas = file.tensors(["betas"])["betas"].double()
        found = (len(betas), float(f"{betas[0]:.3g}"), float(f"{betas[-1]:.3g}"))
        expected = tuple(schedule[key] for key in ("num_train_timesteps", "beta_start", "beta_end"))
        # a file of half precision has them rounded
        if any(abs(a - b) > 1e-2 * b for a, b in zip(found, expected, strict=True)):
            values = f"(steps, first beta, last beta) = {found}"
            raise ValueError(f"it was trained with {values}, the architecture says {expected}")


def read_encoder(file: Checkpoint, config: Mapping[str, Any], tokenizer: Path | None) -> ConditionEncoder:
    """The encoder of the conditions, whose weights are in the same file."""
    stage = at(config, "model.params").get("cond_stage_config", UNCONDITIONAL)
    if stage == UNCONDITIONAL:
        return NoConditions()
    kind = str(stage.get("target") if isinstance(stage, Mapping) else stage).rpartition(".")[2]
    if kind not in ENCODERS:
        raise ValueError(f"cond_stage_config must be {UNCONDITIONAL} or one of {', '.join(ENCODERS)}, got {kind!r}")
    if kind == "FrozenCLIPEmbedder":
        words = read_tokenizer(tokenizer)  # first, for it is what tends to be missing
        model = load_text_model(config.get("clip_text_config", VIT_L_14), file.read(f"{CONDITIONS}transformer."))
        require_finite_weights(model, "the weights of text_encoder")
        return TextEncoder(model, words)
    embedding = file.read(CONDITIONS).get("embedding.weight")
    found = None if embedding is None else tuple(embedding.shape)
    expected = tuple(at(stage, f"params.{key}") for key in ("n_classes", "embed_dim"))
    if embedding is None or found != expected:
        raise ValueError(f"cond_stage_model.embedding.weight must have shape {expected}, got {found}")
    return ClassEmbedder(require_finite(embedding.float(), "the weights of the class embedding"))


def read_decoder(file: Checkpoint, params: Mapping[str, Any], decode_rows: int) -> LatentDecoder:
    """The first stage of a latent diffusion model, and the factor of its latents: given, or measured in training and stored."""
    scale = float(params.get("scale_factor", 1.0))
    if params.get("scale_by_std"):
        if "scale_factor" not in file.names():
            raise ValueError("it holds no scale_factor, which scale_by_std asks for")
        scale = float(file.tensors(["scale_factor"])["scale_factor"])
    network = load_autoencoder(at(params, "first_stage_config"), file.read(FIRST_STAGE), scale)
    require_finite_weights(network, "the weights of first_stage")
    return LatentDecoder(network, scale, decode_rows)


def load_compvis(
    path: Path, config: Mapping[str, Any], *, ema: bool, tokenizer: Path | None, decode_rows: int
) -> DenoiserParts:
    """Read a checkpoint: its networks one after the other; everything else in the file stays there.

    Args:
        path: the file.
        config: its architecture, as the original program has it; `clip_text_config` is a text model other than ViT-L/14.
        ema: the average of the UNet's weights instead of the last ones.
        tokenizer: folder of CLIP's vocabulary, for text.
        decode_rows: images that the first stage decodes together.

    Raises:
        FileNotFoundError: no tokenizer.
        ValueError: an architecture that is not known here, or a file that does not fit it.
    """
    schedule, encoder, stage = training_schedule(config), NoConditions(), Pixels()
    with Checkpoint(path) as file:
        if not is_ddim(config):
            check_schedule(file, schedule)
            encoder = read_encoder(file, config, tokenizer)
            stage = read_decoder(file, at(config, "model.params"), decode_rows)
        network = load_unet(unet_architecture(config), file.read("" if is_ddim(config) else UNET, ema=ema))
    require_finite_weights(network, "the weights of unet")
    return DenoiserParts(network, sample_shape(config), schedule, encoder, stage)
