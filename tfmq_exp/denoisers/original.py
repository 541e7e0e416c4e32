"""A denoiser from one file of an original program: CompVis' latent diffusion and Stable Diffusion, or DDIM."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tfmq_exp.denoisers import compvis, first_stage
from tfmq_exp.denoisers.denoiser import ConditionEncoder, FirstStage, NoConditions, Pixels
from tfmq_exp.denoisers.loading.autoencoder import LatentDecoder
from tfmq_exp.denoisers.loading.checkpoint import read_tensors, read_weights, tensor_names
from tfmq_exp.denoisers.loading.class_embedder import ClassEmbedder
from tfmq_exp.denoisers.loading.text_encoder import VIT_L_14, TextEncoder, load_text_model, read_tokenizer

UNCONDITIONAL = "__is_unconditional__"
CONDITIONS = ("ClassEmbedder", "FrozenCLIPEmbedder")


class Parts(NamedTuple):
    """What a `Denoiser` is made of, but for its name and where it came from."""

    unet: Any
    sample_shape: tuple[int, int, int]
    schedule: Mapping[str, Any]
    encoder: ConditionEncoder
    first_stage: FirstStage


def at(config: Mapping[str, Any], place: str) -> Any:
    """What stands at a dotted place of an architecture; ValueError if nothing does."""
    value: Any = config
    for key in place.split("."):
        if not isinstance(value, Mapping) or key not in value:
            raise ValueError(
                f"the architecture has no {place!r}: expected the original program's layout, `model.params.unet_config` "
                "and so on for latent diffusion, sections `model`, `data` and `diffusion` for DDIM"
            )
        value = value[key]
    return value


def is_ddim(config: Mapping[str, Any]) -> bool:
    """Whether the architecture is in the layout of the DDIM program; LDM's otherwise."""
    return "diffusion" in config


def unet_architecture(config: Mapping[str, Any]) -> dict[str, Any]:
    """The record that `compvis.load` takes."""
    if is_ddim(config):
        return {"config": {section: at(config, section) for section in ("model", "data")}}
    return {"kwargs": at(config, "model.params.unet_config.params")}


def schedule(config: Mapping[str, Any]) -> dict[str, Any]:
    """The noise that the network was trained on, as arguments of diffusers' schedulers.

    Raises:
        ValueError: a kind of schedule, or a prediction, that is not supported.
    """
    if is_ddim(config):
        kind = at(config, "diffusion.beta_schedule")
        count, start, end = (
            at(config, f"diffusion.{key}") for key in ("num_diffusion_timesteps", "beta_start", "beta_end")
        )
        ours = "linear"
    else:
        params = at(config, "model.params")
        kind, count = params.get("beta_schedule", "linear"), params.get("timesteps", 1000)
        start, end = params.get("linear_start", 1e-4), params.get("linear_end", 2e-2)
        ours = "scaled_linear"  # what LDM calls linear is linear in the square root
        if params.get("parameterization", "eps") != "eps":
            raise ValueError(f"parameterization must be eps, got {params['parameterization']!r}")
    if kind != "linear":
        raise ValueError(f"beta_schedule must be linear, got {kind!r}")
    return {
        "num_train_timesteps": int(count),
        "beta_start": float(start),
        "beta_end": float(end),
        "beta_schedule": ours,
    }


def check_schedule(path: Path, names: set[str], expected: Mapping[str, Any]) -> None:
    """ValueError if the file holds the betas of another schedule: the architecture is another model's."""
    if "betas" not in names:
        return
    betas = read_tensors(path, ["betas"])["betas"].double()
    found = (len(betas), float(f"{betas[0]:.3g}"), float(f"{betas[-1]:.3g}"))
    wanted = (expected["num_train_timesteps"], expected["beta_start"], expected["beta_end"])
    # a file of half precision has them rounded
    if any(abs(a - b) > 1e-2 * b for a, b in zip(found, wanted, strict=True)):
        raise ValueError(
            f"it was trained with (steps, first beta, last beta) = {found}, the architecture says {wanted}"
        )


def latent_scale(path: Path, names: set[str], params: Mapping[str, Any]) -> float:
    """What LDM multiplied latents by: a number of the configuration, or one measured in training and kept in the file."""
    if not params.get("scale_by_std"):
        return float(params.get("scale_factor", 1.0))
    if "scale_factor" not in names:
        raise ValueError("it holds no scale_factor, which scale_by_std asks for")
    return float(read_tensors(path, ["scale_factor"])["scale_factor"])


def read_encoder(path: Path, config: Mapping[str, Any], tokenizer: Path | None) -> ConditionEncoder:
    """What encodes the conditions; its weights are in the same file."""
    stage = at(config, "model.params").get("cond_stage_config", UNCONDITIONAL)
    if stage == UNCONDITIONAL:
        return NoConditions()
    kind = str(stage.get("target") if isinstance(stage, Mapping) else stage).rpartition(".")[2]
    if kind not in CONDITIONS:
        raise ValueError(f"cond_stage_config must be {UNCONDITIONAL} or one of {', '.join(CONDITIONS)}, got {kind!r}")
    if kind == "FrozenCLIPEmbedder":
        words = read_tokenizer(tokenizer)  # first, for it is what tends to be missing
        state = read_weights(path, "cond_stage_model.transformer.", ema=False)
        return TextEncoder(load_text_model(config.get("clip_text_config", VIT_L_14), state), words)
    embedding = read_weights(path, "cond_stage_model.", ema=False).get("embedding.weight")
    wanted = tuple(at(stage, f"params.{key}") for key in ("n_classes", "embed_dim"))
    if embedding is None or tuple(embedding.shape) != wanted:
        found = None if embedding is None else tuple(embedding.shape)
        raise ValueError(f"cond_stage_model.embedding.weight must have shape {wanted}, got {found}")
    return ClassEmbedder(embedding.float())


def square(channels: Any, size: Any) -> tuple[int, int, int]:
    """The shape of one sample."""
    return int(channels), int(size), int(size)


def load_ddim(path: Path, config: Mapping[str, Any], *, ema: bool) -> Parts:
    """A network that works on pixels, without conditions: all that is in a file of the DDIM program."""
    unet = compvis.load(unet_architecture(config), read_weights(path, "", ema))
    shape = square(at(config, "data.channels"), at(config, "data.image_size"))
    return Parts(unet, shape, schedule(config), NoConditions(), Pixels())


def load_ldm(path: Path, config: Mapping[str, Any], *, ema: bool, tokenizer: Path | None, decode_rows: int) -> Parts:
    """The networks of a latent diffusion model, read one after the other; everything else in the file stays there."""
    params, noise, names = at(config, "model.params"), schedule(config), set(tensor_names(path))
    check_schedule(path, names, noise)
    encoder = read_encoder(path, config, tokenizer)
    scale, state = latent_scale(path, names, params), read_weights(path, "first_stage_model.", ema=False)
    stage = LatentDecoder(first_stage.load(at(params, "first_stage_config"), state, scale), scale, decode_rows)
    unet = compvis.load(unet_architecture(config), read_weights(path, "model.diffusion_model.", ema))
    return Parts(unet, square(at(params, "channels"), at(params, "image_size")), noise, encoder, stage)


def load(path: Path, config: Mapping[str, Any], *, ema: bool, tokenizer: Path | None, decode_rows: int) -> Parts:
    """Read a checkpoint.

    Args:
        path: the file.
        config: its architecture in the layout of the original program; `clip_text_config` beside `model` describes a text
            model other than ViT-L/14.
        ema: the average of the UNet's weights instead of the last ones.
        tokenizer: folder of CLIP's vocabulary, for text.
        decode_rows: how many images the first stage decodes together.

    Raises:
        FileNotFoundError: no tokenizer.
        ValueError: an architecture that is not known here, or a file that does not fit it.
    """
    if is_ddim(config):
        return load_ddim(path, config, ema=ema)
    return load_ldm(path, config, ema=ema, tokenizer=tokenizer, decode_rows=decode_rows)
