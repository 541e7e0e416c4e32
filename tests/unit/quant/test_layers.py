import copy

import pytest
import torch
from torch import nn

from tfmq_exp.quant.functional import fake_quantize
from tfmq_exp.quant.layers import QUANT_LAYERS
from tfmq_exp.quant.observers import LpObserver
from tfmq_exp.quant.quantizers import AffineQuantizer, Mode, WeightQuantizer
from tfmq_exp.quant.scales.observed_ranges import EMARange, StaticConfig
from tfmq_exp.quant.spec import QuantSpec

LAYERS = {
    "linear": (nn.Linear(6, 5), (3, 6)),
    "linear without bias": (nn.Linear(6, 5, bias=False), (3, 4, 6)),
    "conv": (nn.Conv2d(4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 7, 7)),
    "reflecting conv": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (2, 4, 7, 7)),
}


@pytest.fixture(params=LAYERS)
def layer_and_input(request) -> tuple[nn.Module, torch.Tensor]:
    layer, shape = LAYERS[request.param]
    return copy.deepcopy(layer), torch.randn(shape, generator=torch.Generator().manual_seed(0))


def quantized(layer, bits=4, scheme="affine"):
    """A own with its weight quantizer calibrated and switched on."""
    own = QUANT_LAYERS[type(layer)].from_float(layer)
    own.weight_quantizer = WeightQuantizer(own.weight, QuantSpec(bits, scheme, axis=0), LpObserver())
    own.weight_quantizer.observe(own.weight)
    own.weight_quantizer.mode = Mode.QUANTIZE
    return own


def switched_on(x):
    """A quantizer of activations calibrated on `x`."""
    quantizer = AffineQuantizer(EMARange(StaticConfig(), QuantSpec(4)))
    quantizer.observe(x)
    quantizer.mode = Mode.QUANTIZE
    return quantizer


def test_a_bare_quantized_layer_is_the_float_layer(layer_and_input):
    layer, x = layer_and_input
    before, keys = layer(x), list(layer.state_dict())
    own = QUANT_LAYERS[type(layer)].from_float(layer)
    assert own.weight is layer.weight
    assert own.bias is layer.bias
    assert isinstance(own, type(layer))
    assert list(own.state_dict()) == keys
    assert torch.equal(own(x), before)


def test_quantizing_a_layer_leaves_the_float_layer_alone(layer_and_input):
    layer, x = layer_and_input
    before, weight = layer(x), layer.weight.detach().clone()
    own = quantized(layer, bits=2)
    assert not torch.equal(own(x), before)
    own.freeze_weight(own.quantized_weight())
    assert torch.equal(layer(x), before)
    assert torch.equal(layer.weight, weight)
    assert not list(layer.children())


def test_both_operands_are_quantized(layer_and_input):
    layer, x = layer_and_input
    own = quantized(layer)
    own.input_quantizer = switched_on(x)
    expected = copy.deepcopy(layer)
    expected.weight = nn.Parameter(own.weight_quantizer(layer.weight))
    x_on_grid = fake_quantize(x, own.input_quantizer.scale_provider(x), QuantSpec(4))
    assert torch.equal(own(x), expected(x_on_grid))


def test_the_output_is_quantized_with_its_bias(layer_and_input):
    layer, x = layer_and_input
    own, before = QUANT_LAYERS[type(layer)].from_float(layer), layer(x)
    own.output_quantizer = switched_on(before)
    assert torch.equal(own(x), fake_quantize(before, own.output_quantizer.scale_provider(before), QuantSpec(4)))
    assert not torch.equal(own(x), before)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("scheme", ["affine", "symmetric"])
@pytest.mark.parametrize("learned", [False, True])
def test_freezing_changes_no_bit(layer_and_input, bits, scheme, learned):
    layer, x = layer_and_input
    own = quantized(layer, bits, scheme)
    if learned:
        rounding = own.weight_quantizer.learn_rounding(own.weight)
        with torch.no_grad():
            rounding.v.neg_()
        rounding.harden()
    before, weight = own(x), own.weight_quantizer(own.weight)
    (integers,) = own.quantized_weight()
    assert integers.codes.dtype is torch.uint8
    assert int(integers.codes.max()) < 2**bits
    own.freeze_weight((integers,))
    assert torch.equal(own.weight, weight)
    assert torch.equal(own(x), before)
    assert not own.weight.requires_grad
    assert not isinstance(own.weight_quantizer, WeightQuantizer)


def test_a_float_weight_has_no_integers():
    with pytest.raises(TypeError, match="not quantized"):
        QUANT_LAYERS[nn.Linear].from_float(nn.Linear(2, 2)).quantized_weight()


def test_codes_follow_their_layer(layer_and_input):
    layer, _ = layer_and_input
    own = quantized(layer)
    own.freeze_weight(own.quantized_weight())
    (codes,) = (value for name, value in own.state_dict().items() if name.endswith("codes"))
    assert codes.dtype is torch.uint8
    copied = copy.deepcopy(own)
    for one, other in zip(own.quantized_weight(), copied.quantized_weight(), strict=True):
        assert torch.equal(one.codes, other.codes)
        assert torch.equal(one.qparams.scale, other.qparams.scale)
        assert one.spec == other.spec
    assert copied.to("meta").quantized_weight()[0].codes.is_meta
