"""Shortcut splitting: equal parts are no split at all, other parts work each on its own channels."""

import pytest
import torch
from torch import Tensor, nn

from tfmq_exp.quant.layers import QuantConv2d
from tfmq_exp.quant.observers import MinMax
from tfmq_exp.quant.quantizers import AffineQuantizer, Mode, Quantizer, SplitQuantizer, WeightQuantizer, modes
from tfmq_exp.quant.scales.observed_ranges import EMARange, StaticConfig
from tfmq_exp.quant.spec import QuantSpec

SIZES = (3, 5)
SPECS = [QuantSpec(bits, scheme) for bits in (4, 8) for scheme in ("affine", "symmetric")]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def activation_quantizer(spec: QuantSpec, shown: Tensor) -> AffineQuantizer:
    quantizer = AffineQuantizer(EMARange(StaticConfig(), spec))
    quantizer.observe(shown)
    quantizer.mode = Mode.QUANTIZE
    return quantizer


def weight_quantizer(weight: Tensor, like: WeightQuantizer | None = None) -> WeightQuantizer:
    """Placed on the weight, or where another one is."""
    quantizer = WeightQuantizer(weight, QuantSpec(3, axis=0), MinMax())
    quantizer.observe(weight)
    if like is not None:
        quantizer.load_state_dict(like.state_dict())
    quantizer.mode = Mode.QUANTIZE
    return quantizer


@pytest.mark.parametrize("spec", SPECS, ids=repr)
@pytest.mark.parametrize("shape", [(2, 8), (2, 8, 4), (2, 8, 3, 3)])
def test_equal_parts_quantize_activations_like_one(spec: QuantSpec, shape: tuple[int, ...]) -> None:
    x = random(*shape)
    whole = activation_quantizer(spec, x)
    split = SplitQuantizer([activation_quantizer(spec, x) for _ in SIZES], SIZES)
    assert not torch.equal(whole(x), x)
    assert torch.equal(split(x), whole(x))


@pytest.mark.parametrize("sizes", [(3, 5), (7, 1), (2, 2, 4)])
def test_every_part_observes_and_quantizes_its_own_channels(sizes: tuple[int, ...]) -> None:
    x = random(4, 8, 3, 3) * torch.logspace(-2, 2, 8)[:, None, None]
    split = SplitQuantizer([AffineQuantizer(EMARange(StaticConfig(), QuantSpec(8))) for _ in sizes], sizes)
    with modes(list(split.parts), Mode.OBSERVE):  # type: ignore[arg-type]
        assert torch.equal(split(x), x)
    with modes(list(split.parts), Mode.QUANTIZE):  # type: ignore[arg-type]
        quantized = split(x)
    start = 0
    for size in sizes:
        own = x[:, start : start + size]
        assert torch.equal(quantized[:, start : start + size], activation_quantizer(QuantSpec(8), own)(own))
        start += size
    assert not torch.equal(quantized, activation_quantizer(QuantSpec(8), x)(x))


def layers(kernel: int) -> tuple[QuantConv2d, QuantConv2d]:
    """A quantized convolution, and its split twin with the same grids in both parts."""
    x, conv = random(2, 8, 5, 5), nn.Conv2d(8, 6, kernel, padding=kernel // 2).requires_grad_(False)
    conv.weight.copy_(random(6, 8, kernel, kernel, seed=1))
    whole, split = QuantConv2d.from_float(conv), QuantConv2d.from_float(conv)
    whole.input_quantizer = activation_quantizer(QuantSpec(8), x)
    split.input_quantizer = SplitQuantizer([activation_quantizer(QuantSpec(8), x) for _ in SIZES], SIZES)
    whole.weight_quantizer = quantizer = weight_quantizer(conv.weight)
    pieces = conv.weight.split(SIZES, dim=1)
    split.weight_quantizer = SplitQuantizer([weight_quantizer(piece, quantizer) for piece in pieces], SIZES)
    return whole, split


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("rounding", ["nearest", "soft", "hard"])
@torch.no_grad()
def test_split_layer_with_equal_halves_is_the_unsplit_layer(kernel: int, rounding: str) -> None:
    x, (whole, split) = random(2, 8, 5, 5), layers(kernel)
    if rounding != "nearest":
        moved = random(6, 8, kernel, kernel, seed=2)
        for layer, pieces in ((whole, [moved]), (split, moved.split(SIZES, dim=1))):
            for (quantizer, weight), piece in zip(layer.weight_parts(), pieces, strict=True):
                adaround = quantizer.learn_rounding(weight)
                adaround.v.add_(piece)
                if rounding == "hard":
                    adaround.harden()
    assert torch.equal(split.weight_quantizer(split.weight), whole.weight_quantizer(whole.weight))
    assert torch.equal(split(x), whole(x))


@pytest.mark.parametrize("kernel", [1, 3])
@torch.no_grad()
def test_integers_of_both_halves_are_the_integers_of_the_whole(kernel: int) -> None:
    x, (whole, split) = random(2, 8, 5, 5), layers(kernel)
    before = split(x)
    (integers,), halves = whole.quantized_weight(), split.quantized_weight()
    assert [half.codes.shape[1] for half in halves] == list(SIZES)
    assert torch.equal(torch.cat([half.codes for half in halves], dim=1), integers.codes)
    split.freeze_weight(halves)
    assert torch.equal(split.weight, integers.dequantize())
    assert torch.equal(split(x), before)


@torch.no_grad()
def test_own_grids_fit_a_quiet_skip_better_than_a_shared_one() -> None:
    conv = nn.Conv2d(8, 6, 1).requires_grad_(False)
    conv.weight.copy_(random(6, 8, 1, 1))
    conv.weight[:, SIZES[0] :] *= 0.01
    shared = weight_quantizer(conv.weight)
    own = SplitQuantizer([weight_quantizer(piece) for piece in conv.weight.split(SIZES, dim=1)], SIZES)
    errors = [(quantizer(conv.weight) - conv.weight)[:, SIZES[0] :].square().mean() for quantizer in (shared, own)]
    assert errors[1] < 0.01 * errors[0]


@pytest.mark.parametrize("sizes", [(8,), (3, 3, 2), (0, 8), (-1, 9)])
def test_sizes_that_do_not_fit_the_parts_are_refused(sizes: tuple[int, ...]) -> None:
    parts: list[Quantizer] = [AffineQuantizer(EMARange(StaticConfig(), QuantSpec(8))) for _ in range(2)]
    with pytest.raises(ValueError, match="2 quantizers cannot share channels"):
        SplitQuantizer(parts, sizes)


@pytest.mark.parametrize("channels", [7, 9])
def test_other_numbers_of_channels_are_refused(channels: int) -> None:
    split = SplitQuantizer([AffineQuantizer(EMARange(StaticConfig(), QuantSpec(8))) for _ in SIZES], SIZES)
    with pytest.raises(RuntimeError, match="split"):
        split(random(2, channels, 3, 3))
