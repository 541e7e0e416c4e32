"""Checks of a loaded network: what this program computes apart from a forward pass is what the pass computes.

Temporal features are computed from timesteps alone, and blocks run alone on their inputs. Both rely on how diffusers builds its
networks; here they are compared with one forward pass, whatever the settings are.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.utils import _pytree as pytree

from tfmq_exp.denoisers.denoiser import DenoiserParts, FirstStage
from tfmq_exp.denoisers.loading.autoencoder import LatentDecoder
from tfmq_exp.denoisers.loading.network_config import check_channels
from tfmq_exp.denoisers.loading.scheduler_config import default_settings
from tfmq_exp.denoisers.structure import Role
from tfmq_exp.denoisers.unet import block_modules, roles, time_embedding

SIDE = 32  # of the sample, at most about this: the result does not depend on it
TOLERANCE = 1e-4  # of the largest value: batches of other shapes round differently
# Settings that decide how timesteps become features.
TEMPORAL = (
    *("act_fn", "time_embedding_type", "time_embedding_act_fn", "timestep_post_act", "time_embedding_dim"),
    *("resnet_time_scale_shift", "resnet_skip_time_act", "flip_sin_to_cos", "freq_shift"),
)
# Settings with which a network divides or takes roots and logarithms.
NUMERIC = ("act_fn", "time_embedding_type", "norm_eps", "mid_block_scale_factor", "resnet_out_scale_factor")


def changed_settings(unet: Any, keys: tuple[str, ...]) -> str:
    """Text of the settings among `keys` that differ from their defaults, for messages."""
    defaults = default_settings(type(unet))
    chosen = {key: unet.config[key] for key in keys if key in unet.config and unet.config[key] != defaults[key]}
    return ", ".join(f"{key}={value!r}" for key, value in chosen.items()) or "default settings"


def halvings(unet: Any) -> int:
    """The factor by which the levels reduce a sample."""
    return 2 ** (len(unet.config["block_out_channels"]) - 1)


def check_shape(unet: Any, shape: tuple[int, int, int], conditions: Mapping[str, Tensor]) -> None:
    """ValueError unless a sample of this shape comes out as it went in; nothing is computed but shapes.

    UNet2DModel cannot join an odd size that it halves with what it doubles again.
    """
    outline = {name: value.to("meta") for name, value in (*unet.named_parameters(), *unet.named_buffers())}
    given = {name: torch.empty_like(value, device="meta") for name, value in conditions.items()}
    step, name = halvings(unet), type(unet).__name__

    def failure(height: int, width: int) -> str:
        sample = torch.empty(1, shape[0], height, width, device="meta")
        t = torch.ones(1, dtype=torch.long, device="meta")
        try:
            found = functional_call(unet, outline, (sample, t), given).sample.shape
        except Exception as error:  # settings and sizes that do not go together fail in any way
            return " ".join(f"{type(error).__name__}: {error}".split())[:200]
        return "" if found[2:] == sample.shape[2:] else f"it comes out as {found[2]}x{found[3]}"

    reason = failure(*shape[1:])
    if reason and not failure(*(-(-side // step) * step for side in shape[1:])):
        size = unet.config["sample_size"]
        raise ValueError(f"sample_size={size!r} is no multiple of {step}, as this {name} needs ({reason})")
    if reason:
        widths = "".join(f", conditions of width {value.shape[-1]}" for value in conditions.values())
        settings = changed_settings(unet, ("sample_size", "cross_attention_dim", "down_block_types"))
        raise ValueError(f"{name} fails on a sample of {shape[1]}x{shape[2]}{widths}: {reason} ({settings})")


def copied(tree: Any) -> Any:
    """Nested structures with tensors of their own memory."""
    return pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, tree)


def distance(found: Any, expected: Any) -> float:
    """The largest difference of two nested structures of tensors, over the largest value; infinite for other shapes."""
    pairs = list(zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True))
    if any(a.shape != b.shape for a, b in pairs):
        return float("inf")
    largest = max((float(b.abs().max()) for _, b in pairs), default=0.0)
    return max((float((a - b).abs().max()) for a, b in pairs), default=0.0) / max(largest, 1e-12)


def check_sample(unet: Any, channels: int, stage: FirstStage) -> None:
    """ValueError unless the network takes the sample and nothing else, returns noise, and its sample becomes images."""
    check_channels(unet)
    if (taken := unet.config["in_channels"]) != channels:
        raise ValueError(f"in_channels={taken} with samples of {channels} channels: expected in_channels={channels}")
    if isinstance(stage, LatentDecoder) and channels != stage.channels:
        raise ValueError(f"in_channels={channels}, and the first stage decodes latents of {stage.channels} channels")
    if not isinstance(stage, LatentDecoder) and channels not in (1, 3):
        raise ValueError(f"in_channels={channels} without a first stage (vae/ or vqvae/): images have 1 or 3 channels")


@torch.no_grad()
def check_forward(parts: DenoiserParts) -> None:
    """Compare a network's own forward pass with its temporal features and its blocks, computed apart.

    Args:
        parts: of a denoiser; the network is float, on the CPU and in evaluation mode.

    Raises:
        ValueError: the network has layers of an unknown kind, cannot take its sample or conditions, gives numbers that are not
            finite, or computes something otherwise in its pass than apart; by the settings that are behind it.
    """
    unet, shape, conditions = parts.unet, parts.sample_shape, parts.encoder.example().given
    check_sample(unet, shape[0], parts.first_stage)
    projections = {name for name, role in roles(unet).items() if role is Role.TIME_PROJ}
    check_shape(unet, shape, conditions)
    last, step, name = int(parts.schedule["num_train_timesteps"]) - 1, halvings(unet), type(unet).__name__
    t = torch.tensor([min(1, last), last])  # not 0, at which some networks are not defined
    height, width = (min(side, step * max(1, SIDE // step)) for side in shape[1:])
    sample = torch.randn(1, shape[0], height, width, generator=torch.Generator().manual_seed(0))
    given = {name: value.expand(len(t), *value.shape[1:]) for name, value in conditions.items()}
    blocks = {name for name, _ in block_modules(unet)}
    # copies, for networks may change tensors later
    inputs: dict[str, tuple[Any, Any]] = {}
    outputs: dict[str, Any] = {}

    def before(path: str, _module: Any, args: Any, kwargs: Any) -> None:
        inputs[path] = copied((args, kwargs))

    def after(path: str, _module: Any, _args: Any, output: Any) -> None:
        outputs[path] = copied(output)

    with ExitStack() as hooks:
        for path in blocks:
            hook = unet.get_submodule(path).register_forward_pre_hook(partial(before, path), with_kwargs=True)
            hooks.enter_context(hook)
        for path in blocks | projections:
            hooks.enter_context(unet.get_submodule(path).register_forward_hook(partial(after, path)))
        try:
            output = unet(sample.expand(len(t), -1, -1, -1), t, **given).sample
        except IndexError as error:
            settings = changed_settings(unet, ("time_embedding_type", "num_train_timesteps"))
            raise ValueError(
                f"{settings}: the network has no embedding of timestep {last}, its schedule's last"
            ) from error
    check_finite(unet, {"its conditions": given, **outputs, "its output": output})
    embedding = time_embedding(unet, t)
    features = {path: unet.get_submodule(path)(embedding) for path in outputs if path in projections}
    if wrong := [path for path, feature in features.items() if distance(feature, outputs[path]) > TOLERANCE]:
        found = (
            f"{len(wrong)} temporal features of {name} are not what they are in its own forward pass, first {wrong[0]}"
        )
        raise ValueError(f"{changed_settings(unet, TEMPORAL)}: {found}")
    for path, (args, kwargs) in inputs.items():
        if distance(unet.get_submodule(path)(*args, **kwargs), outputs[path]) > TOLERANCE:
            raise ValueError(f"the block {path} of {name}, run alone, is not what it is in the forward pass")


def check_finite(unet: Any, values: Mapping[str, Any]) -> None:
    """ValueError that names the first value of a forward pass that is not finite."""
    for name, value in values.items():
        if not all(bool(leaf.isfinite().all()) for leaf in pytree.tree_leaves(value)):
            raise ValueError(
                f"{type(unet).__name__} gives numbers that are not finite in one forward pass, first at {name}: its weights "
                f"are damaged, or too large for float32 ({changed_settings(unet, NUMERIC)})"
            )


@torch.no_grad()
def check_timesteps(unet: Any, timesteps: tuple[int, ...]) -> None:
    """ValueError for a timestep at which the time embedding is not finite: log 0 of a Fourier embedding."""
    device = next(unet.parameters()).device
    finite = time_embedding(unet, torch.tensor(timesteps, device=device)).isfinite().all(dim=1).tolist()
    if wrong := [t for t, fine in zip(timesteps, finite, strict=True) if not fine]:
        raise ValueError(
            f"{changed_settings(unet, ('time_embedding_type',))}: the time embedding at timestep {wrong[0]} is not finite; choose "
            "a sampler that does not visit it (sampler.steps_offset=1; of sampler=folder +sampler.settings.steps_offset=1)"
        )
