"""A quantized network under quantization-aware training: its initialization, trained parameters, and end."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from tfmq_exp.quant.qat_quantizers import TrainableQuantizer, TrainableWeightQuantizer
from tfmq_exp.quant.quantizers import Mode, Quantizer
from tfmq_exp.quant.scales.observed_ranges import EMARange
from tfmq_exp.quant.scales.tdq import BatchedGenerators, TDQScale
from tfmq_exp.surgery.quantized_network import QuantizedNetwork

PENALTY_TIMESTEPS = 64  # at which the penalty takes a network's scales; they are smooth in t


class TrainableParameters(NamedTuple):
    """Trained parameters by kind of their optimiser settings; none twice.

    Weights have biases and norms with them, ranges the QAT functions' own parameters; generators are networks of scales.
    """

    weights: list[nn.Parameter]
    ranges: list[nn.Parameter]
    generators: list[nn.Parameter]


def observe(model: QuantizedNetwork) -> None:
    """Calibrate the weights and let activation quantizers observe."""
    model.calibrate_weights()
    model.set_activations(Mode.OBSERVE)


def ready(model: QuantizedNetwork) -> None:
    """Switch all quantizers on, to be trained at any timestep; networks of the timestep are evaluated together.

    A range for each of many steps may have had no data; it starts as that of the nearest step that has.

    Raises:
        RuntimeError: a quantizer without any data.
    """
    sources = [quantizer.scale_provider for quantizer in model.activation_quantizers().values()]
    for source in (source for source in sources if isinstance(source, EMARange)):
        calibrated = torch.nonzero(~source.scale.isnan()).flatten()
        if len(calibrated):
            entries = torch.arange(len(source.scale), device=calibrated.device)
            nearest = calibrated[(entries[:, None] - calibrated).abs().argmin(dim=1)]
            with torch.no_grad():
                for table in (source.scale, source.zero_point):
                    table.copy_(table[nearest])
    model.set_activations(Mode.QUANTIZE)
    for quantizer in model.weight_quantizers():
        quantizer.mode = Mode.QUANTIZE
    generated = [source for source in sources if isinstance(source, TDQScale)]
    model.generators = BatchedGenerators(generated) if generated else None
    for parameters in trainable(model):
        for parameter in parameters:
            parameter.requires_grad_(True)


def trainable(model: QuantizedNetwork) -> TrainableParameters:
    """Trained parameters of a network whose weights are not integers yet."""
    ranges: list[nn.Parameter] = []
    generators: list[nn.Parameter] = []
    for quantizer in model.activation_quantizers().values():
        (generators if quantizer.scale_provider.generates else ranges).extend(quantizer.scale_provider.trainable())
    ranges.extend(parameter for quantizer in qat_quantizers(model) for parameter in quantizer.trainable())
    quantizers = [module for module in model.network.modules() if isinstance(module, Quantizer)]
    others = {id(parameter) for quantizer in quantizers for parameter in quantizer.parameters()}
    others |= {id(model.layer(name).weight) for name in model.integers}
    weights = [parameter for parameter in model.network.parameters() if id(parameter) not in others]
    # tied quantizers share theirs
    return TrainableParameters(*(list(dict.fromkeys(group)) for group in (weights, ranges, generators)))


def qat_quantizers(model: QuantizedNetwork) -> list[TrainableQuantizer | TrainableWeightQuantizer]:
    """Every QAT quantizer, of activations and of weights."""
    return [m for m in model.network.modules() if isinstance(m, TrainableQuantizer | TrainableWeightQuantizer)]


def clamp_parameters(model: QuantizedNetwork) -> None:
    """Keep scales positive and the QAT functions' parameters in their intervals, after every step of an optimiser."""
    for quantizer in model.activation_quantizers().values():
        quantizer.scale_provider.clamp_parameters()
    for quantizer in qat_quantizers(model):
        quantizer.clamp_parameters()


def penalty(model: QuantizedNetwork) -> Tensor:
    """Sum over all quantizers of decay * (s qmax)^2, the mean over a quantizer's scales; 0 where no function has a decay."""
    # layers that are one in the original network share their scales, which count once
    owners = {id(next(q.parameters(), q)): q for q in qat_quantizers(model) if q.fn.decay}
    total = torch.zeros((), device=next(model.parameters()).device)
    stride = -(-model.context.num_steps // PENALTY_TIMESTEPS)
    times = torch.tensor(model.context.timesteps[::stride], device=total.device)
    generated = model.generators.scales(times) if model.generators and owners else {}
    for quantizer in owners.values():
        owner = quantizer if isinstance(quantizer, TrainableWeightQuantizer) else quantizer.scale_provider
        if isinstance(owner, TDQScale):
            scale = generated[owner] if owner in generated else owner.table().scale
        elif isinstance(owner, TrainableWeightQuantizer) or (isinstance(owner, EMARange) and not owner.generates):
            scale = owner.scale
        else:  # it depends on activations
            continue
        total = total + quantizer.fn.decay * (scale * quantizer.ints.qmax).square().mean()
    return total


@torch.no_grad()
def finish(model: QuantizedNetwork) -> QuantizedNetwork:
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
