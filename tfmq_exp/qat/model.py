"""A quantized network under quantization-aware training: its initialization, trained parameters, and end."""

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from tfmq_exp.quant.qat_quantizers import TrainableQuantizer, TrainableWeightQuantizer
from tfmq_exp.quant.quantizers import Mode, Quantizer
from tfmq_exp.quant.scales.running_range import EMARange
from tfmq_exp.quant.scales.tdq import BatchedGenerators, TDQScale
from tfmq_exp.surgery.quantized_unet import QuantizedUNet

PENALTY_TIMESTEPS = 64  # at which the penalty takes a network's scales; they are smooth in t


class TrainableParameters(NamedTuple):
    """Trained parameters by kind of their optimiser settings; none twice.

    weights: of all layers, with biases and norms; ranges: scales of activations and of weights, and the QAT functions' own
    parameters; generators: networks that generate scales.
    """

    weights: list[nn.Parameter]
    ranges: list[nn.Parameter]
    generators: list[nn.Parameter]


def observe(model: QuantizedUNet) -> None:
    """Calibrate the weights and let activation quantizers observe."""
    model.calibrate_weights()
    model.set_activations(Mode.OBSERVE)


def ready(model: QuantizedUNet) -> None:
    """Switch all quantizers on, to be trained at any timestep; networks of the timestep are evaluated together.

    A range for each of many steps may have had no data; it starts as that of the nearest step that has.

    Raises:
        RuntimeError: a quantizer without any data.
    """
    sources = [quantizer.scale_provider for quantizer in model.activation_quantizers().values()]
    for source in sources:
        if isinstance(source, EMARange):
            fill_missing(source)
    model.set_activations(Mode.QUANTIZE)
    for quantizer in model.weight_quantizers():
        quantizer.mode = Mode.QUANTIZE
    generated = [source for source in sources if isinstance(source, TDQScale)]
    model.generators = BatchedGenerators(generated) if generated else None
    for parameters in trainable(model):
        for parameter in parameters:
            parameter.requires_grad_(True)


@torch.no_grad()
def fill_missing(source: EMARange) -> None:
    """Give entries without data the scale and zero point of the nearest entry that has some, if any."""
    calibrated = torch.nonzero(~source.scale.isnan()).flatten()
    if len(calibrated):
        entries = torch.arange(len(source.scale), device=calibrated.device)
        nearest = calibrated[(entries[:, None] - calibrated).abs().argmin(dim=1)]
        for table in (source.scale, source.zero_point):
            table.copy_(table[nearest])


def trainable(model: QuantizedUNet) -> TrainableParameters:
    """Trained parameters of a network whose weights are not integers yet."""
    ranges: list[nn.Parameter] = []
    generators: list[nn.Parameter] = []
    for quantizer in model.activation_quantizers().values():
        (generators if quantizer.scale_provider.generates else ranges).extend(quantizer.scale_provider.trainable())
    for quantizer in qat_quantizers(model):
        ranges.extend(quantizer.trainable())
    quantizers = [module for module in model.unet.modules() if isinstance(module, Quantizer)]
    others = {id(parameter) for quantizer in quantizers for parameter in quantizer.parameters()}
    others |= {id(model.layer(name).weight) for name in model.integers}
    weights = [parameter for parameter in model.unet.parameters() if id(parameter) not in others]
    return TrainableParameters(unique(weights), unique(ranges), unique(generators))


def unique(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    """Each once: tied quantizers share theirs."""
    return list({id(parameter): parameter for parameter in parameters}.values())


def qat_quantizers(model: QuantizedUNet) -> Iterator[TrainableQuantizer | TrainableWeightQuantizer]:
    """Every QAT quantizer, of activations and of weights."""
    for module in model.unet.modules():
        if isinstance(module, TrainableQuantizer | TrainableWeightQuantizer):
            yield module


def clamp_parameters(model: QuantizedUNet) -> None:
    """Keep scales positive and the QAT functions' parameters in their intervals, after every step of an optimiser."""
    for quantizer in model.activation_quantizers().values():
        quantizer.scale_provider.clamp_parameters()
    for quantizer in qat_quantizers(model):
        quantizer.clamp_parameters()


def penalty(model: QuantizedUNet) -> Tensor:
    """Sum over all quantizers of decay * (s qmax)^2, the mean over a quantizer's scales; 0 where no function has a decay."""
    # layers that are one in the original network share their scales, which count once
    owners = {id(next(q.parameters(), q)): q for q in qat_quantizers(model) if q.fn.decay}
    total = torch.zeros((), device=next(model.parameters()).device)
    stride = -(-model.context.num_steps // PENALTY_TIMESTEPS)
    times = torch.tensor(model.context.timesteps[::stride], device=total.device)
    generated = model.generators.scales(times) if model.generators and owners else {}
    for quantizer in owners.values():
        scale = scale_parameters(quantizer, generated)
        if scale is not None:
            total = total + quantizer.fn.decay * (scale * quantizer.ints.qmax).square().mean()
    return total


def scale_parameters(
    quantizer: TrainableQuantizer | TrainableWeightQuantizer, generated: Mapping[TDQScale, Tensor]
) -> Tensor | None:
    """All scales of a quantizer, or those that its network of the timestep generates; None if they depend on activations."""
    if isinstance(quantizer, TrainableWeightQuantizer):
        return quantizer.scale
    source = quantizer.scale_provider
    if isinstance(source, TDQScale):
        return generated[source] if source in generated else source.table().scale
    return source.scale if isinstance(source, EMARange) and not source.generates else None


@torch.no_grad()
def finish(model: QuantizedUNet) -> QuantizedUNet:
    """End the training: integers in place of all weights, tables in place of networks of the timestep, no noise.

    Returns the same model, ready to sample at its finite set and to be saved.
    """
    model.eval().requires_grad_(False)
    model.generators = None
    frozen = model.integers
    for name in model.weight_layers():
        if name not in frozen:
            model.freeze(name)
    model.tabulate_scales()
    model.set_activations(Mode.QUANTIZE)
    return model
