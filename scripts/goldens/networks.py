"""Converted networks against the originals': noise predictions, temporal features, contexts, images and latents."""

import copy
import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from jaxtyping import Float64
from torch import Tensor, nn

from goldens.comparing import EXACT, ROUNDING, DamagedError, Group
from goldens.families import SCHEDULE, Family
from tfmq_exp.denoisers.denoiser import Conditions, DenoiserParts
from tfmq_exp.denoisers.loading.autoencoder import LatentDecoder
from tfmq_exp.denoisers.loading.checkpoint import Checkpoint
from tfmq_exp.denoisers.loading.condition_encoders import ClassEmbedder
from tfmq_exp.denoisers.originals import compvis_unet
from tfmq_exp.denoisers.read_structure import read_structure
from tfmq_exp.denoisers.temporal import TemporalInformationBlock
from tfmq_exp.sampling.trajectory import alphas_cumprod

SINGLE, DOUBLE = 3e-5, 1e-9  # rounding in another order of operations
SINUSOID = 2e-5  # DDIM rounds its sinusoid in single precision, whatever the network's
SCHEDULES = 5e-7  # DDIM's own program multiplies a thousand factors in float32

STATES = "encoder_hidden_states"
ALWAYS = ("eps", "eps_x_small", "eps_f64", "eps_x_small_f64")
PREDICTION = re.compile(r"eps(?P<ema>_ema)?(?P<small>_x_small)?(?P<double>_f64)?")
TIME_EMBEDDING = "time_embed"  # what the recordings call it; DDIM's module is `temb`


def predictions(family: Family, network: nn.Module) -> Iterator[Group]:
    """Compare the network's outputs at x and x_small, in single and double precision, with last and averaged weights."""
    recorded = family.recorded
    context = {STATES: recorded["context"]} if "context" in recorded else {}
    networks: dict[tuple[bool, bool], nn.Module] = {(False, False): network}
    others = [name for name in recorded if PREDICTION.fullmatch(name) and name not in ALWAYS]
    for name in (*ALWAYS, *sorted(others)):
        place = PREDICTION.fullmatch(name)
        assert place is not None
        ema, double = bool(place["ema"]), bool(place["double"])
        if (ema, False) not in networks:
            networks[ema, False] = family.load(ema=True).network
        if (ema, double) not in networks:
            networks[ema, double] = copy.deepcopy(networks[ema, False]).double()
        dtype = torch.float64 if double else torch.float32
        x, given = recorded["x_small" if place["small"] else "x"], {k: v.to(dtype) for k, v in context.items()}
        tolerance = (SINUSOID if family.ddim else DOUBLE) if double else SINGLE
        group = Group(f"{family.name}: {name}", tolerance, absolute=True)
        with torch.no_grad():
            group.compare(networks[ema, double](x.to(dtype), recorded["t"], **given).sample, recorded[name])
        yield group


def our_module(module: str, keys: frozenset[str], network: Any, *, ddim: bool) -> str:
    """The place of an original module in the converted network: of its layer, or of what holds its layers.

    Raises:
        DamagedError: no weights of such a module.
    """
    layers, levels = network.config["layers_per_block"], len(network.config["block_out_channels"])
    openai_key = partial(compvis_unet.openai_key, layers_per_block=layers, keys=keys)
    rename = partial(compvis_unet.ddim_key, levels=levels) if ddim else openai_key
    places = {rename(key).rpartition(".")[0] for key in keys if key.startswith(f"{module}.")}
    if not places:
        raise DamagedError(f"there are no weights of {module!r} in the goldens")
    return places.pop() if len(places) == 1 else places.pop().rpartition(".")[0]


def temporal_features(family: Family, network: nn.Module) -> Iterator[Group]:
    """The time embedding, and the temporal feature of every block by the place that the key map gives it."""
    recorded = family.recorded
    modules = [name.removeprefix("tib.") for name in recorded if name.startswith("tib.")]
    if not modules:
        return
    keys = frozenset(name.removeprefix(family.prefix) for name in family.names if name.startswith(family.prefix))
    example = {"sample": recorded["x"][:1], "timestep": recorded["t"][:1]}
    if "context" in recorded:
        example[STATES] = recorded["context"][:1]
    block = TemporalInformationBlock(network, read_structure(network, example))
    embedding: list[Any] = []
    origin = "temb" if family.ddim else TIME_EMBEDDING
    place = our_module(origin, keys, network, ddim=family.ddim)
    handle = network.get_submodule(place).register_forward_hook(lambda _module, _given, out: embedding.append(out))
    with torch.no_grad():
        features = block.features(recorded["t"])
    handle.remove()
    group = Group(f"{family.name}: temporal features", SINGLE, absolute=True)
    for module in modules:
        if module == TIME_EMBEDDING:
            ours = embedding[0]
        else:
            ours = features.pop(our_module(module, keys, network, ddim=family.ddim), torch.empty(0))
        group.compare(ours, recorded[f"tib.{module}"])
    group.compare(len(features), 0)
    group.note = f"not in the original: {', '.join(features)}" if features else ""
    yield group


def conditions(family: Family, parts: DenoiserParts) -> tuple[Conditions, list[Group]]:
    """Contexts from class labels or token ids, and how they compare; neither, of a network without conditions."""
    recorded = family.recorded
    if "context" not in recorded:
        return Conditions(), []
    labels = Group(f"{family.name}: label of no class", EXACT)
    if family.captions:
        model = family.text_model()
        with torch.no_grad():
            given, null = (model(recorded[name]).last_hidden_state for name in ("input_ids", "uncond_input_ids"))
    else:
        encoder, found = parts.encoder, parts.encoder([int(label) for label in recorded["class_ids"]])
        given, null = found.given[STATES], found.null[STATES]
        assert isinstance(encoder, ClassEmbedder)
        for label in recorded["uncond_class_id"].tolist():
            labels.compare(len(encoder.embedding) - 1, label)
    group = Group(f"{family.name}: contexts", SINGLE, absolute=True)
    group.compare(given, recorded["context"])
    group.compare(null.expand_as(recorded["uncond_context"]), recorded["uncond_context"])
    groups = [group, labels] if labels.comparisons else [group]
    return Conditions({STATES: given}, {STATES: null[:1]}), groups


def images(family: Family, stage: LatentDecoder) -> Iterator[Group]:
    """Latents to images through the first stage, and back."""
    recorded, network = family.recorded, stage.autoencoder
    scale = Group(f"{family.name}: scale of latents", ROUNDING)
    scale.compare(stage.scale, recorded["scale_factor"])
    decoded = Group(f"{family.name}: decoded", SINGLE, absolute=True)
    decoded.compare(stage.decode(recorded["z"]), recorded["decoded"])
    encoded = Group(f"{family.name}: encoded", SINGLE, absolute=True)
    latents = stage.encode(recorded["image_in"]) / stage.scale
    if "encoded_moments" in recorded:
        moments = recorded["encoded_moments"]
        with torch.no_grad():
            encoded.compare(network.encode(recorded["image_in"]).latent_dist.parameters, moments)
        encoded.compare(latents, moments.chunk(2, dim=1)[0])
    else:
        encoded.compare(latents, recorded["encoded_prequant"])
    yield from (scale, decoded, encoded)
    if "vq_indices" in recorded:
        indices = Group(f"{family.name}: entries of the codebook", EXACT)
        with torch.no_grad():
            _, _, (_, _, ours) = network.quantize(recorded["z"] / stage.scale)
        indices.compare(ours, recorded["vq_indices"])
        yield indices


def kept_schedule(family: Family) -> Iterator[Group]:
    """The noise schedule that the file of weights holds."""
    names = [name for name in SCHEDULE if name in family.names]
    if names:
        with Checkpoint(family.weights) as file:
            yield schedule_group(f"{family.name}: schedule", family, file.tensors(names))


def noise_tables(alphas: Float64[Tensor, "timesteps"]) -> dict[str, Float64[Tensor, "timesteps"]]:
    """Buffers of LDM's schedule (`register_schedule`), from the products of alphas."""
    before = torch.cat([alphas.new_ones(1), alphas[:-1]])
    betas = 1 - alphas / before
    variance = betas * (1 - before) / (1 - alphas)
    return {
        "betas": betas,
        "alphas_cumprod": alphas,
        "alphas_cumprod_prev": before,
        "sqrt_alphas_cumprod": alphas.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - alphas).sqrt(),
        "log_one_minus_alphas_cumprod": (1 - alphas).log(),
        "sqrt_recip_alphas_cumprod": (1 / alphas).sqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / alphas - 1).sqrt(),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": variance.clamp(min=1e-20).log(),
        "posterior_mean_coef1": betas * before.sqrt() / (1 - alphas),
        "posterior_mean_coef2": (1 - before) * (alphas / before).sqrt() / (1 - alphas),
    }


def schedule_group(name: str, family: Family, recorded: dict[str, Tensor]) -> Group:
    """A schedule's numbers, each relative to itself: they span orders of magnitude."""
    tables, group = noise_tables(alphas_cumprod(family.schedule)), Group(name, SCHEDULES)
    for kind, golden in recorded.items():
        ours = tables[kind]
        if ours.shape == golden.shape:  # some begin with zero
            ours = torch.where(ours == golden, 1.0, ours / golden)
        group.compare(ours, torch.ones_like(golden))
    return group
