"""Checks of a loaded network: what this program computes apart from a forward pass is what the pass computes.

Temporal features are computed from timesteps alone, and blocks run alone on their inputs. Both rely on how diffusers builds its
networks; here they are compared with one forward pass, whatever the settings are.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.utils import _pytree as pytree

from tfmq_exp.denoisers.denoiser import DenoiserParts
from tfmq_exp.denoisers.families.find import family_of
from tfmq_exp.denoisers.families.unet import CONDITIONAL_UNET, UNET, blocks, roles, time_embedding
from tfmq_exp.denoisers.loading.autoencoder import LatentDecoder
from tfmq_exp.denoisers.loading.network_config import check_channels
from tfmq_exp.denoisers.loading.scheduler_config import default_settings
from tfmq_exp.denoisers.read_structure import after_each
from tfmq_exp.denoisers.structure import Role

SIDE = 32  # of the sample, at most about this: the result does not depend on it
TOLERANCE = 1e-4  # of the largest value: batches of other shapes round differently
# Settings that decide how timesteps become features.
TEMPORAL = (
    *("act_fn", "time_embedding_type", "time_embedding_act_fn", "timestep_post_act", "time_embedding_dim"),
    *("resnet_time_scale_shift", "resnet_skip_time_act", "flip_sin_to_cos", "freq_shift"),
)
# Settings with which a network divides or takes roots and logarithms.
NUMERIC = ("act_fn", "time_embedding_type", "norm_eps", "mid_block_scale_factor", "resnet_out_scale_factor")


def changed_settings(network: Any, keys: tuple[str, ...]) -> str:
    """Text of the settings among `keys` that differ from their defaults, for messages."""
    defaults = default_settings(type(network))
    chosen = {
        key: network.config[key] for key in keys if key in network.config and network.config[key] != defaults[key]
    }
    return ", ".join(f"{key}={value!r}" for key, value in chosen.items()) or "default settings"


def check_sample(parts: DenoiserParts) -> None:
    """ValueError unless the network takes the sample and nothing else, returns noise, and its sample becomes images."""
    network, channels = parts.network, parts.sample_shape[0]
    check_channels(network)
    if (taken := network.config["in_channels"]) != channels:
        raise ValueError(f"in_channels={taken} with samples of {channels} channels: expected in_channels={channels}")
    if isinstance(parts.first_stage, LatentDecoder):
        if channels != (latent := parts.first_stage.channels):
            raise ValueError(f"in_channels={channels}, and the first stage decodes latents of {latent} channels")
    elif channels not in (1, 3):
        raise ValueError(f"in_channels={channels} without a first stage (vae/ or vqvae/): images have 1 or 3 channels")


def check_shape(network: Any, shape: tuple[int, ...], conditions: Mapping[str, Tensor], step: int) -> None:
    """ValueError unless a sample of this shape comes out as it went in, by a pass of shapes alone; sides should be n * step."""
    outline = {name: value.to("meta") for name, value in (*network.named_parameters(), *network.named_buffers())}
    given = {name: torch.empty_like(value, device="meta") for name, value in conditions.items()}
    sample, t = torch.empty(1, *shape, device="meta"), torch.ones(1, dtype=torch.long, device="meta")
    try:
        height, width = functional_call(network, outline, (sample, t), given).sample.shape[2:]
        if (height, width) == shape[1:]:
            return
        reason = f"it comes out as {height}x{width}"
    except Exception as error:  # settings and sizes that do not go together fail in any way
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    name, size = type(network).__name__, network.config["sample_size"]
    if any(side % step for side in shape[1:]):
        raise ValueError(f"sample_size={size!r} is no multiple of {step}, as this {name} needs ({reason})")
    widths = "".join(f", conditions of width {value.shape[-1]}" for value in conditions.values())
    settings = changed_settings(network, ("sample_size", "cross_attention_dim", "down_block_types"))
    raise ValueError(f"{name} fails on a sample of {shape[1]}x{shape[2]}{widths}: {reason} ({settings})")


def differ(found: Any, expected: Any) -> bool:
    """Whether nested structures of tensors differ in shape, or by more than `TOLERANCE` times the largest value."""
    pairs = list(zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True))
    if any(a.shape != b.shape for a, b in pairs):
        return True
    largest = max((float(b.abs().max()) for _, b in pairs), default=0.0)
    return any(float((a - b).abs().max()) > TOLERANCE * max(largest, 1e-12) for a, b in pairs)


@torch.no_grad()
def check_forward(parts: DenoiserParts) -> None:
    """Compare the own forward pass of a float network on the CPU with its temporal features and its blocks, computed apart.

    Raises:
        ValueError: the network has layers of an unknown kind, cannot take its sample or conditions, gives numbers that are not
            finite, or computes something otherwise in its pass than apart; by the settings that are behind it.
    """
    network, shape, conditions = parts.network, parts.sample_shape, parts.encoder.example().given
    check_sample(parts)
    projections = {name for name, role in roles(network).items() if role is Role.TIME_PROJ}
    step, name = 2 ** (len(network.config["block_out_channels"]) - 1), type(network).__name__
    check_shape(network, shape, conditions, step)
    last = int(parts.schedule["num_train_timesteps"]) - 1
    t = torch.tensor([min(1, last), last])  # not 0, at which some networks are not defined
    height, width = (min(side, step * max(1, SIDE // step)) for side in shape[1:])
    sample = torch.randn(1, shape[0], height, width, generator=torch.Generator().manual_seed(0))
    given = {name: value.expand(len(t), *value.shape[1:]) for name, value in conditions.items()}
    inputs, outputs = dict[str, Any](), dict[str, Any]()

    # copies, for networks may change tensors later
    def before(path: str, _module: Any, args: Any, kwargs: Any) -> None:
        inputs[path] = pytree.tree_map_only(Tensor, Tensor.clone, (args, kwargs))

    def after(path: str, _module: Any, _args: Any, output: Any) -> None:
        outputs[path] = pytree.tree_map_only(Tensor, Tensor.clone, output)

    modules = {path for path, _ in blocks(network)}
    with after_each(network, modules | projections, after), ExitStack() as hooks:
        for path in modules:
            hook = network.get_submodule(path).register_forward_pre_hook(partial(before, path), with_kwargs=True)
            hooks.enter_context(hook)
        try:
            output = network(sample.expand(len(t), -1, -1, -1), t, **given).sample
        except IndexError as error:
            settings = changed_settings(network, ("time_embedding_type", "num_train_timesteps"))
            lacking = f"the network has no embedding of timestep {last}, its schedule's last"
            raise ValueError(f"{settings}: {lacking}") from error
    for place, values in {"its conditions": given, **outputs, "its output": output}.items():
        if not all(bool(leaf.isfinite().all()) for leaf in pytree.tree_leaves(values)):
            cause = f"its weights are damaged, or too large for float32 ({changed_settings(network, NUMERIC)})"
            raise ValueError(f"{name} gives numbers that are not finite in one forward pass, first at {place}: {cause}")
    embedding = time_embedding(network, t, given)
    features = [path for path in outputs if path in projections]
    if wrong := [path for path in features if differ(network.get_submodule(path)(embedding), outputs[path])]:
        found = (
            f"{len(wrong)} temporal features of {name} are not what they are in its own forward pass, first {wrong[0]}"
        )
        raise ValueError(f"{changed_settings(network, TEMPORAL)}: {found}")
    for path, (args, kwargs) in inputs.items():
        if differ(network.get_submodule(path)(*args, **kwargs), outputs[path]):
            raise ValueError(f"the block {path} of {name}, run alone, is not what it is in the forward pass")


@torch.no_grad()
def check_timesteps(network: Any, timesteps: Sequence[float]) -> None:
    """ValueError for a timestep at which a UNet's time embedding is not finite (log 0 of a Fourier embedding), or that has none."""
    if family_of(network) not in (UNET, CONDITIONAL_UNET):
        return
    device = next(network.parameters()).device
    fractions = [t for t in timesteps if isinstance(t, float)]
    if fractions and isinstance(getattr(network, "time_proj", None), torch.nn.Embedding):
        found = f"time_embedding_type=learned has embeddings of whole timesteps alone, and the sampler's are as {fractions[0]}"
        raise ValueError(f"{found}: choose a sampler of whole timesteps")
    finite = time_embedding(network, torch.tensor(timesteps, device=device), {}).isfinite().all(dim=1).tolist()
    if wrong := [t for t, fine in zip(timesteps, finite, strict=True) if not fine]:
        found = f"{changed_settings(network, ('time_embedding_type',))}: the time embedding at timestep {wrong[0]} is not finite"
        advice = "(sampler.steps_offset=1; of sampler=folder +sampler.settings.steps_offset=1)"
        raise ValueError(f"{found}; choose a sampler that does not visit it {advice}")
