"""A quantized network under quantization-aware training: what is trained in it, and how it begins and ends."""

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tfmq_exp.quant.quantizers.base import Mode, Quantizer
from tfmq_exp.quant.quantizers.trainable import TrainableQuantizer, TrainableWeightQuantizer
from tfmq_exp.quant.scales.base import EMARange
from tfmq_exp.quant.scales.batched_generators import BatchedGenerators
from tfmq_exp.quant.scales.tdq import Generated
from tfmq_exp.surgery.quantized_unet import QuantizedUNet

SPREAD = 64  # a network of the timestep is smooth


class TrainableParameters(NamedTuple):
    """What is trained, by the kind of settings that it is trained with; no parameter twice.

    weights: of all layers, with biases and norms; ranges: steps of activations and of weights, and the forms' own numbers;
    generators: networks that make steps of the timestep or of statistics.
    """

    weights: list[nn.Parameter]
    ranges: list[nn.Parameter]
    generators: list[nn.Parameter]


def observe(model: QuantizedUNet) -> None:
    """Place the weights' grids and let activation quantizers look at what comes; timesteps may be any."""
    model.context.nearest = True
    model.calibrate_weights()
    model.set_activations(Mode.OBSERVE)


def ready(model: QuantizedUNet) -> None:
    """Switch all quantizers on, to be trained at any timestep; networks of the timestep are evaluated together.

    A range for each of many steps may have met no observation; it starts as that of the nearest step that has.

    Raises:
        RuntimeError: a quantizer that has seen nothing at all.
    """
    model.context.nearest = True
    for quantizer in model.activation_quantizers().values():
        if isinstance(quantizer.source, EMARange):
            fill(quantizer.source)
    model.set_activations(Mode.QUANTIZE)
    for quantizer in model.weight_quantizers():
        quantizer.mode = Mode.QUANTIZE
    sources = [quantizer.source for quantizer in model.activation_quantizers().values()]
    generated = [source for source in sources if isinstance(source, Generated)]
    model.bank = BatchedGenerators(generated) if generated else None
    for parameters in trainable(model):
        for parameter in parameters:
            parameter.requires_grad_(True)


@torch.no_grad()
def fill(source: EMARange) -> None:
    """Give entries without data the scale and zero point of the nearest entry that has some; nothing if none has."""
    seen = torch.nonzero(~source.scale.isnan()).flatten()
    if len(seen):
        entries = torch.arange(len(source.scale), device=seen.device)
        nearest = seen[(entries[:, None] - seen).abs().argmin(dim=1)]
        for table in (source.scale, source.zero_point):
            table.copy_(table[nearest])


def trainable(model: QuantizedUNet) -> TrainableParameters:
    """What is trained in a network whose weights are not integers yet."""
    ranges: list[nn.Parameter] = []
    generators: list[nn.Parameter] = []
    for quantizer in model.activation_quantizers().values():
        (generators if quantizer.source.generates else ranges).extend(quantizer.source.trainable())
    for quantizer in trained_quantizers(model):
        ranges.extend(quantizer.trainable())
    quantizers = [module for module in model.unet.modules() if isinstance(module, Quantizer)]
    apart = {id(parameter) for quantizer in quantizers for parameter in quantizer.parameters()}
    apart |= {id(model.layer(site).weight) for site in model.integers}
    weights = [parameter for parameter in model.unet.parameters() if id(parameter) not in apart]
    return TrainableParameters(once(weights), once(ranges), once(generators))


def once(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """The same without those that came before: tied quantizers share theirs."""
    return list({id(parameter): parameter for parameter in parameters}.values())


def trained_quantizers(model: QuantizedUNet) -> Iterator[TrainableQuantizer | TrainableWeightQuantizer]:
    """Every quantizer with a form, of activations and of weights."""
    for module in model.unet.modules():
        if isinstance(module, TrainableQuantizer | TrainableWeightQuantizer):
            yield module


def clamp_parameters(model: QuantizedUNet) -> None:
    """Called after every step of an optimiser: steps stay positive, the forms' numbers in their intervals."""
    for quantizer in model.activation_quantizers().values():
        quantizer.source.clamp_parameters()
    for quantizer in trained_quantizers(model):
        quantizer.clamp_parameters()


def penalty(model: QuantizedUNet) -> Tensor:
    """Sum over all quantizers of decay * (s high)^2, the mean over a quantizer's steps; 0 where no form has a decay.

    Steps that a network makes of the timestep are taken at `SPREAD` timesteps all over the finite set.
    """
    # layers that are one in the original network share their steps, which count once
    owners = {id(next(q.parameters(), q)): q for q in trained_quantizers(model) if q.form.decay}
    decaying = list(owners.values())
    total = torch.zeros((), device=next(model.parameters()).device)
    times = torch.tensor(model.context.timesteps[:: -(-model.context.num_steps // SPREAD)], device=total.device)
    generated = dict(model.bank.scales(times)) if model.bank and decaying else {}
    for quantizer in decaying:
        scale = scale_parameters(quantizer, generated)
        if scale is not None:
            total = total + quantizer.form.decay * (scale * quantizer.high).square().mean()
    return total


def scale_parameters(
    quantizer: TrainableQuantizer | TrainableWeightQuantizer, generated: Mapping[Generated, Tensor]
) -> Tensor | None:
    """All steps of a quantizer, or those that its network of the timestep makes; None if they depend on activations."""
    if isinstance(quantizer, TrainableWeightQuantizer):
        return quantizer.scale
    source = quantizer.source
    if isinstance(source, Generated):
        return generated[source] if source in generated else source.table().scale
    return source.scale if isinstance(source, EMARange) and not source.generates else None


@torch.no_grad()
def finish(model: QuantizedUNet) -> QuantizedUNet:
    """End the training: integers in place of all weights, tables in place of networks of the timestep, no noise.

    The same model comes back, ready to sample at its finite set and to be saved.
    """
    model.eval().requires_grad_(False)
    model.context.nearest, model.bank = False, None
    for site in model.weight_layers():
        if site not in model.integers:
            model.freeze(site)
    model.tabulate_scales()
    model.set_activations(Mode.QUANTIZE)
    return model
