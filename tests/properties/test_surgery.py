"""From the float network to the quantized one: what surgery changes, and what it leaves alone."""

import copy

import pytest
import torch
from torch import nn

from tests.conftest import TIMESTEPS, calibrated, example_inputs, quantizable
from tests.helpers.sampling import output
from tfmq_exp.denoisers.families.unet import attentions
from tfmq_exp.denoisers.read_structure import read_structure
from tfmq_exp.quant.quantizers import Mode
from tfmq_exp.surgery.config import (
    AttentionBits,
    LayerBits,
)

ALL_STEPS = 2 * TIMESTEPS
OPERANDS = AttentionBits(operands=8, probabilities=16)


def mixed_bits(network: nn.Module) -> dict[str, LayerBits]:
    """Weights of 2 to 8 bits and float ones, activations of 4 to 8 bits and float ones, all in one network."""
    weights, inputs, outputs = [2, 3, 4, 5, 6, 7, 8, None], [4, 5, 6, 7, 8, None], [None, None, 8, None, 4]
    layers = read_structure(network, example_inputs(network)).layers
    return {name: LayerBits(weights[i % 8], inputs[i % 6], outputs[i % 5]) for i, name in enumerate(layers)}


# everything off


def test_switched_off_is_the_float_network(network: nn.Module) -> None:
    inputs = example_inputs(network, ALL_STEPS)
    assert torch.equal(output(quantizable(network), inputs), output(network, inputs))


def test_switched_off_attention_operands_change_rounding_only(network: nn.Module) -> None:
    inputs = example_inputs(network, ALL_STEPS)
    model = quantizable(network, attention=OPERANDS)
    torch.testing.assert_close(output(model, inputs), output(network, inputs), atol=2e-6, rtol=0)


def test_switched_on_is_not_the_float_network(network: nn.Module) -> None:
    inputs = example_inputs(network, ALL_STEPS)
    weights_only = output(calibrated(quantizable(network, activation=None)), inputs)
    both = output(calibrated(quantizable(network)), inputs)
    operands_too = output(calibrated(quantizable(network, attention=OPERANDS)), inputs)
    outputs = [output(network, inputs), weights_only, both, operands_too]
    assert all(not torch.allclose(a, b, atol=1e-4) for i, a in enumerate(outputs) for b in outputs[:i])


def test_surgery_leaves_the_float_network_alone(network: nn.Module) -> None:
    inputs, state = example_inputs(network), copy.deepcopy(network.state_dict())
    types = [type(module) for module in network.modules()]
    processors = {name: module.processor for name, module in attentions(network).items()}
    before = output(network, inputs)
    calibrated(quantizable(network, weight=2, activation=4, scales="all", attention=OPERANDS))
    assert [type(module) for module in network.modules()] == types
    assert all(module.processor is processors[name] for name, module in attentions(network).items())
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
    assert torch.equal(output(network, inputs), before)


# running it


def test_timestep_outside_the_finite_set_is_named(network: nn.Module) -> None:
    model = calibrated(quantizable(network, scales="all"))
    for t in (2, 999, -1):
        with pytest.raises(ValueError, match=rf"timestep {t} is outside"):
            model(**example_inputs(network, (1, t)))


def test_uncalibrated_quantizer_is_named(network: nn.Module) -> None:
    model = quantizable(network, scales="all")
    with pytest.raises(
        RuntimeError, match=r"conv_in\.input_quantizer has seen no calibration data \(4 of its ranges, 4"
    ):
        model.set_activations(Mode.QUANTIZE)
    model.set_activations(Mode.OBSERVE)
    model(**example_inputs(network, TIMESTEPS[:3]))
    with pytest.raises(RuntimeError, match=r"_quantizer has seen no calibration data \(1 of its ranges, 4"):
        model.set_activations(Mode.QUANTIZE)


def test_integer_weights_are_signed_bytes_that_stand_for_the_weight(network: nn.Module) -> None:
    wanted = mixed_bits(network)
    model = calibrated(quantizable(network, sites=wanted))
    assert set(model.integers) == {name for name, plan in wanted.items() if plan.weight}
    for layer, ((codes, (scale, zero_point), spec),) in model.integers.items():
        assert int(codes.max()) < 2 ** wanted[layer].weight
        signed = codes.double() + spec.qmin - zero_point.double()
        assert torch.equal(signed, signed.round())
        assert signed.min() >= -128
        assert signed.max() <= 127
        weight = network.get_submodule(layer).weight
        # the grid of the whole range reaches every weight, up to the rounding of its zero point
        assert ((signed * scale - weight).abs() <= 1.001 * scale).all()
        assert torch.equal(model.layer(layer).weight, signed.float() * scale)


@pytest.mark.parametrize("per_step", ["temporal", "all"])
def test_mixed_steps_in_a_batch_equal_each_alone(network: nn.Module, per_step: str) -> None:
    # in double precision, where the batch size moves no activation across the middle between two integers
    model = calibrated(quantizable(network, scales=per_step, attention=OPERANDS)).double()
    inputs = example_inputs(network, (501, 1, 751, 501, 251))
    inputs = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    together = output(model, inputs)
    for row in range(5):
        alone = output(model, {key: value[row : row + 1] for key, value in inputs.items()})
        torch.testing.assert_close(together[row : row + 1], alone, atol=1e-12, rtol=0)
