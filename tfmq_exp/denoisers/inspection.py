"""What is computed of a network apart from its own forward pass, measured against that pass when the network is loaded.

Temporal features are computed from timesteps alone, blocks run alone on what they were given. Both lean on how diffusers
builds its networks; here they are compared with what one forward pass computes, whatever the settings are.
"""

from collections.abc import Mapping
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tfmq_exp.denoisers.denoiser import FirstStage
from tfmq_exp.denoisers.loading.autoencoder import LatentDecoder
from tfmq_exp.denoisers.loading.compvis_checkpoint import Parts
from tfmq_exp.denoisers.structure import Role
from tfmq_exp.denoisers.unet import block_modules, roles, time_embedding

SIDE = 32  # of its sample, at most about this: what is measured does not depend on it
TOLERANCE = 1e-4  # of the largest value: batches of other shapes round differently
# Settings that say how timesteps become features.
TEMPORAL = (
    *("act_fn", "time_embedding_type", "time_embedding_act_fn", "timestep_post_act", "time_embedding_dim"),
    *("resnet_time_scale_shift", "resnet_skip_time_act", "flip_sin_to_cos", "freq_shift"),
)

# Settings with which a network divides or takes roots and logarithms.
NUMERIC = ("act_fn", "time_embedding_type", "norm_eps", "mid_block_scale_factor", "resnet_out_scale_factor")


def said(unet: Any, keys: tuple[str, ...]) -> str:
    """Those of these settings that a network has not left at their default, as messages have them."""
    defaults = signature(type(unet).__init__).parameters
    chosen = {key: unet.config[key] for key in keys if key in unet.config and unet.config[key] != defaults[key].default}
    return ", ".join(f"{key}={value!r}" for key, value in chosen.items()) or "default settings"


def measured_shape(unet: Any, shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """The shape of a small sample that a network takes like its own: whole multiples of what its levels halve."""
    step = 2 ** (len(unet.config["block_out_channels"]) - 1)
    height, width = (min(side, step * max(1, SIDE // step)) for side in shape[1:])
    return shape[0], height, width


def check_shape(unet: Any, shape: tuple[int, int, int], conditions: Mapping[str, Tensor]) -> None:
    """ValueError unless a sample of this shape comes out as it went in; nothing is computed but shapes.

    UNet2DModel cannot join an odd size that it halves with what it doubles again.
    """
    with torch.device("meta"):
        outline: Any = type(unet).from_config(dict(unet.config))
    given = {name: torch.empty_like(value, device="meta") for name, value in conditions.items()}
    step, size = 2 ** (len(unet.config["block_out_channels"]) - 1), unet.config["sample_size"]

    def failure(height: int, width: int) -> str:
        sample, t = (
            torch.empty(1, shape[0], height, width, device="meta"),
            torch.ones(1, dtype=torch.long, device="meta"),
        )
        try:
            found = outline(sample, t, **given).sample.shape
        except Exception as error:  # settings and sizes that do not go together fail in whatever way they lead to
            return " ".join(f"{type(error).__name__}: {error}".split())[:200]
        return "" if found[2:] == sample.shape[2:] else f"it comes out as {found[2]}x{found[3]}"

    reason = failure(*shape[1:])
    if reason and not failure(*(-(-side // step) * step for side in shape[1:])):
        raise ValueError(
            f"sample_size={size!r} is no multiple of {step}, as this {type(unet).__name__} needs ({reason})"
        )
    if reason:
        widths = "".join(f", conditions of width {value.shape[-1]}" for value in conditions.values())
        raise ValueError(
            f"{type(unet).__name__} fails on a sample of {shape[1]}x{shape[2]}{widths}: {reason} "
            f"({said(unet, ('sample_size', 'cross_attention_dim', 'down_block_types'))})"
        )


class Record:
    """What one forward pass gave to some modules of a network, and what they made of it."""

    def __init__(self) -> None:
        self.given: dict[str, tuple[Any, Any]] = {}
        self.made: dict[str, Any] = {}

    def hooks(self, unet: nn.Module, blocks: set[str], layers: set[str]) -> list[Any]:
        """Hooks that record: of blocks both, of layers what they made; copies, for networks may change tensors later."""

        def before(name: str, args: Any, kwargs: Any) -> None:
            self.given[name] = pytree.tree_map(copied, (args, kwargs))

        def after(name: str, output: Any) -> None:
            self.made[name] = pytree.tree_map(copied, output)

        handles: list[Any] = []
        for name, module in unet.named_modules():
            if name in blocks:
                handles.append(
                    module.register_forward_pre_hook(
                        lambda _m, args, kwargs, name=name: before(name, args, kwargs), with_kwargs=True
                    )
                )
            if name in blocks | layers:
                handles.append(module.register_forward_hook(lambda _m, _a, out, name=name: after(name, out)))
        return handles


def copied(leaf: Any) -> Any:
    """A tensor of its own memory; anything else as it is."""
    return leaf.clone() if isinstance(leaf, Tensor) else leaf


def distance(found: Any, wanted: Any) -> float:
    """The largest difference of two nested structures of tensors, over the largest value; infinite where they do not match."""
    pairs = list(zip(pytree.tree_leaves(found), pytree.tree_leaves(wanted), strict=True))
    if any(a.shape != b.shape for a, b in pairs):
        return float("inf")
    largest = max((float(b.abs().max()) for _, b in pairs), default=0.0)
    return max((float((a - b).abs().max()) for a, b in pairs), default=0.0) / max(largest, 1e-12)


def check_channels(unet: Any, channels: int, stage: FirstStage) -> None:
    """ValueError unless the network takes the sample and nothing else, returns noise, and its sample becomes images."""
    taken, returned = unet.config["in_channels"], unet.config["out_channels"]
    if taken != channels or returned not in (taken, 2 * taken):
        raise ValueError(
            f"in_channels={taken}, out_channels={returned} with samples of {channels} channels: expected in_channels={channels}, "
            "and as many out, or twice as many with a learned variance; inpainting and other networks that take more than the "
            "noisy sample are not supported"
        )
    if isinstance(stage, LatentDecoder) and channels != stage.channels:
        raise ValueError(f"in_channels={channels}, and the first stage decodes latents of {stage.channels} channels")
    if not isinstance(stage, LatentDecoder) and channels not in (1, 3):
        raise ValueError(f"in_channels={channels} without a first stage (vae/ or vqvae/): images have 1 or 3 channels")


@torch.no_grad()
def inspect(parts: Parts) -> None:
    """Measure a network's own forward pass, and compare with it what is computed apart.

    Args:
        parts: of a denoiser; the network is float, on the CPU and in evaluation mode.

    Raises:
        ValueError: the network has layers of an unknown kind, cannot take its sample or conditions, gives numbers that are not
            finite, or computes something otherwise in its pass than apart; by the settings that are behind it.
    """
    unet, shape, conditions = parts.unet, parts.sample_shape, parts.encoder.example().given
    check_channels(unet, shape[0], parts.first_stage)
    projections = {name for name, role in roles(unet).items() if role is Role.TIME_PROJ}
    check_shape(unet, shape, conditions)
    record = Record()
    handles = record.hooks(unet, {name for name, _ in block_modules(unet)}, projections)
    last = int(parts.schedule["num_train_timesteps"]) - 1
    t = torch.tensor([min(1, last), last])  # not 0, at which some networks are not defined
    sample = torch.randn(1, *measured_shape(unet, shape), generator=torch.Generator().manual_seed(0))
    given = {name: value.expand(len(t), *value.shape[1:]) for name, value in conditions.items()}
    try:
        output = unet(sample.expand(len(t), -1, -1, -1), t, **given).sample
    except IndexError as error:
        settings = said(unet, ("time_embedding_type", "num_train_timesteps"))
        raise ValueError(f"{settings}: the network has no embedding of timestep {last}, its schedule's last") from error
    finally:
        for handle in handles:
            handle.remove()
    check_finite(unet, record, output, given)
    embedding = time_embedding(unet, t)
    apart = {name: unet.get_submodule(name)(embedding) for name in record.made if name in projections}
    if wrong := [name for name, feature in apart.items() if distance(feature, record.made[name]) > TOLERANCE]:
        raise ValueError(
            f"{said(unet, TEMPORAL)}: {len(wrong)} temporal features of {type(unet).__name__} are not what they are in its "
            f"own forward pass, first {wrong[0]}"
        )
    for name, (args, kwargs) in record.given.items():
        if distance(unet.get_submodule(name)(*args, **kwargs), record.made[name]) > TOLERANCE:
            raise ValueError(
                f"the block {name} of {type(unet).__name__}, run alone, is not what it is in the forward pass"
            )


def check_finite(unet: Any, record: Record, output: Tensor, conditions: Mapping[str, Tensor]) -> None:
    """ValueError that says where the first number that is not finite came from."""
    parts = {"its conditions": conditions, **record.made, "its output": output}
    for name, value in parts.items():
        if not all(bool(leaf.isfinite().all()) for leaf in pytree.tree_leaves(value)):
            raise ValueError(
                f"{type(unet).__name__} gives numbers that are not finite in one forward pass, first at {name}: its weights "
                f"are damaged, or too large for float32 ({said(unet, NUMERIC)})"
            )


@torch.no_grad()
def check_timesteps(unet: Any, timesteps: tuple[int, ...]) -> None:
    """ValueError for a timestep at which the time embedding is not finite: log 0 of a Fourier embedding."""
    device = next(unet.parameters()).device
    finite = time_embedding(unet, torch.tensor(timesteps, device=device)).isfinite().all(dim=1).tolist()
    if wrong := [t for t, fine in zip(timesteps, finite, strict=True) if not fine]:
        raise ValueError(
            f"{said(unet, ('time_embedding_type',))}: the time embedding at timestep {wrong[0]} is not finite; choose a sampler "
            "that does not visit it (sampler.offset=1; of sampler=folder +sampler.settings.steps_offset=1)"
        )
