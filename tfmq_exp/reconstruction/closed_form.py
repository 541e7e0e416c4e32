"""GPTQ inside a unit: layer by layer, on the inputs that the layers before it give once they are rounded."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from tfmq_exp.core.devices import device_of
from tfmq_exp.core.finite import require_finite, within
from tfmq_exp.core.seeds import derive_seed
from tfmq_exp.core.validate import COUNT, POSITIVE_SHARE, Checked
from tfmq_exp.quant.gptq import Moments, gptq
from tfmq_exp.quant.layers import QuantLayer
from tfmq_exp.quant.quantizers import Mode, modes
from tfmq_exp.quant.spec import QParams
from tfmq_exp.quant.timestep_context import TimestepContext
from tfmq_exp.reconstruction.activation_cache import TensorTree
from tfmq_exp.reconstruction.capture import call_unit


@dataclass(frozen=True)
class GPTQConfig(Checked):
    """Rounding of a unit's weights by GPTQ (arXiv 2210.17323), before anything learns."""

    damping: Annotated[float, POSITIVE_SHARE] = 0.01  # of the second moments, as a share of their diagonal's mean
    activation_order: bool = True  # round columns of the largest inputs first
    block: Annotated[int, COUNT] = 128  # columns whose errors are repaid together
    rows: Annotated[int, COUNT] = 20_000  # input vectors of a layer that the moments are taken of, drawn evenly


class _ReachedError(Exception):
    """Ends a forward pass at the layer whose input was wanted."""


def round_layers(
    module: nn.Module,
    layers: dict[str, QuantLayer],
    context: TimestepContext,
    inputs: TensorTree,
    config: GPTQConfig,
    *,
    batch: int,
    seed: int,
) -> None:
    """Round the weights of a unit's layers in execution order; the unit's other weights count as they are.

    Args:
        module: the unit, in the quantized network.
        layers: with weights to round, by name.
        context: of the network's timesteps.
        inputs: of the unit, see `call_unit`.
        config: how.
        batch: samples of a forward pass.
        seed: of the input vectors that are drawn.

    Raises:
        ValueError: an input that is not finite, or moments that GPTQ cannot use.
    """
    order = shared_inputs(module, layers, context, inputs)
    quantizers = [quantizer for layer in layers.values() for quantizer, _ in layer.weight_parts()]
    with modes(quantizers, Mode.OFF):
        for names in order:
            first = layers[names[0]]
            with within(f"the inputs of {names[0]}"):
                moments = second_moments(
                    module, first, context, inputs, config.rows, batch, derive_seed(seed, names[0])
                )
            for name in names:
                with within(f"the weight of {name}"):
                    round_weight(layers[name], moments, config)


def shared_inputs(
    module: nn.Module, layers: dict[str, QuantLayer], context: TimestepContext, inputs: TensorTree
) -> list[list[str]]:
    """Names of the layers in execution order; those that read one tensor, as q, k and v do, together."""
    groups: list[tuple[Tensor, tuple[Any, ...], list[str]]] = []

    def record(name: str) -> Callable[..., None]:
        def hook(layer: nn.Module, args: tuple[Tensor]) -> None:
            for x, form, names in groups:
                if x is args[0] and form == patch_form(layer):
                    names.append(name)
                    return
            groups.append((args[0], patch_form(layer), [name]))

        return hook

    device = device_of(module)
    with ExitStack() as hooks, torch.no_grad():
        for name, layer in layers.items():
            hooks.enter_context(layer.register_forward_pre_hook(record(name)))
        call_unit(module, context, next(inputs.batches(1, device)))
    found = [names for _, _, names in groups]
    return found + [[name] for name in layers if not any(name in names for names in found)]


def patch_form(layer: nn.Module) -> tuple[Any, ...]:
    """Form of the input vectors that a layer multiplies."""
    if isinstance(layer, nn.Conv2d):
        return layer.kernel_size, layer.stride, layer.padding, layer.dilation, layer.groups
    return ()


@torch.no_grad()
def second_moments(
    module: nn.Module,
    layer: QuantLayer,
    context: TimestepContext,
    inputs: TensorTree,
    rows: int,
    batch: int,
    seed: int,
) -> Moments:
    """H = X^T X over about so many input vectors of a layer, for each group of a convolution, in one pass of the unit to it.

    Args:
        module: the unit.
        layer: of the unit.
        context: of the network's timesteps.
        inputs: of the unit.
        rows: vectors that are drawn, the same number from each sample.
        batch: samples of a forward pass.
        seed: of the draw.
    """
    device, generator = layer.weight.device, torch.Generator().manual_seed(seed)
    columns = layer.weight[0].numel()
    moments = torch.zeros(getattr(layer, "groups", 1), columns, columns, device=device)
    share = -(-rows // len(inputs))  # of every sample

    def add(_: nn.Module, args: tuple[Tensor]) -> None:
        for vectors in drawn_vectors(layer, args[0].float(), share, generator):
            require_finite(vectors, "a layer's input")
            moments.baddbmm_(vectors.transpose(1, 2), vectors)
        raise _ReachedError

    handle = layer.register_forward_pre_hook(add)
    try:
        for part in inputs.batches(batch, device):
            try:
                call_unit(module, context, part)
            except _ReachedError:
                continue
    finally:
        handle.remove()
    return moments


def drawn_vectors(
    layer: Any, x: Tensor, share: int, generator: torch.Generator
) -> Iterator[Float[Tensor, "groups rows columns"]]:
    """Input vectors of a layer, at most `share` for each row of the batch, drawn without regard to their place.

    Only those that are drawn are ever unfolded; a part holds at most 2**24 numbers.
    """
    if isinstance(layer, nn.Conv2d):
        mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        patches = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
        for dim, (kernel, stride, dilation) in enumerate(
            zip(layer.kernel_size, layer.stride, layer.dilation, strict=True)
        ):
            patches = patches.unfold(2 + dim, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
        places, groups, width = patches, layer.groups, patches.shape[3]
        count = patches.shape[2] * width
    else:
        places, groups, width = x.reshape(len(x), -1, x.shape[-1]), 1, 1
        count = places.shape[1]
    drawn = torch.rand(len(x), count, generator=generator).argsort(dim=1)[:, : min(share, count)]
    row = torch.arange(len(x))[:, None].expand_as(drawn).flatten().to(x.device)
    place = drawn.flatten().to(x.device)
    size = layer.weight[0].numel() * groups
    for chosen in torch.arange(len(place), device=x.device).split(max(1, 2**24 // size)):
        if isinstance(layer, nn.Conv2d):
            vectors = places[row[chosen], :, place[chosen] // width, place[chosen] % width]
        else:
            vectors = places[row[chosen], place[chosen]]
        yield vectors.reshape(len(chosen), groups, -1).transpose(0, 1)


def round_weight(layer: QuantLayer, moments: Moments, config: GPTQConfig) -> None:
    """Set the rounding of a layer's weight quantizers to GPTQ's integers."""
    parts, groups = layer.weight_parts(), len(moments)

    def matrix(x: Tensor) -> Tensor:
        return x.reshape(groups, len(layer.weight) // groups, -1)

    def whole(tensors: Sequence[Tensor]) -> Tensor:
        shaped = [x.expand(part.shape) for x, (_, part) in zip(tensors, parts, strict=True)]
        return matrix(torch.cat(shaped, dim=1) if len(shaped) > 1 else shaped[0])

    qparams = QParams(*(whole(column) for column in zip(*(quantizer.qparams for quantizer, _ in parts), strict=True)))
    settings = {"damping": config.damping, "activation_order": config.activation_order, "block": config.block}
    codes = gptq(matrix(layer.weight.detach().float()), moments, qparams, parts[0][0].spec, **settings)
    columns = codes.reshape(layer.weight.shape).split([part.shape[1] for _, part in parts], dim=1)
    for (quantizer, part), own in zip(parts, columns, strict=True):
        quantizer.round_to(part, own)
        quantizer.mode = Mode.QUANTIZE
