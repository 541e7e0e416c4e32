"""Quantizers with a form: their modes, their parameters, and sources that are networks, alone and together."""

import pytest
import torch
from torch import Tensor

from tfmq_exp.quant.observers import AbsMax
from tfmq_exp.quant.qat_functions import Duq, Lsq, Nipq, Pact, QATQuantizeFn, Qil
from tfmq_exp.quant.qat_quantizers import Offset, TrainableQuantizer, TrainableWeightQuantizer
from tfmq_exp.quant.quantizers import Mode
from tfmq_exp.quant.scales.base import ScaleProvider
from tfmq_exp.quant.scales.dynamic import DynamicGeneratorConfig, DynamicGeneratorScale
from tfmq_exp.quant.scales.observed_ranges import EMARange, StaticConfig
from tfmq_exp.quant.spec import QuantSpec, Scheme
from tfmq_exp.quant.timestep_context import TimestepContext

FORMS: list[QATQuantizeFn] = [Lsq(), Pact(), Nipq(), Duq(), Qil()]
SIGNED = QuantSpec(4, "symmetric")
TIMESTEPS = (901, 601, 301, 1)


def activations(rows: int = 5) -> Tensor:
    return torch.randn(rows, 3, 8, generator=torch.Generator().manual_seed(0)) + 0.3


def ready(source: ScaleProvider, form: QATQuantizeFn, centre: Offset = "zero") -> TrainableQuantizer:
    """Observed and on."""
    quantizer = TrainableQuantizer(source, form, centre).eval()
    quantizer.observe(activations())
    quantizer.mode = Mode.QUANTIZE
    return quantizer


# activations


@pytest.mark.parametrize("form", FORMS, ids=repr)
def test_noise_acts_while_training_alone(form: QATQuantizeFn) -> None:
    quantizer, x = ready(EMARange(StaticConfig(), SIGNED), form), activations()
    for_inference = quantizer(x)
    assert torch.equal(quantizer.train()(x), for_inference) is not isinstance(form, Nipq)
    assert torch.equal(quantizer.eval()(x), for_inference)
    quantizer.tabulate()
    assert torch.equal(quantizer.train()(x), for_inference)


@pytest.mark.parametrize("centre", ["silu", "learned"])
def test_a_centre_is_subtracted_before_and_added_after(centre: Offset) -> None:
    spec: Scheme = "unsigned" if centre == "silu" else "symmetric"
    quantizer = ready(EMARange(StaticConfig(observer=AbsMax()), QuantSpec(4, spec)), Lsq("narrow"), centre)
    x = activations()
    middle = -0.2785 if centre == "silu" else float(x.mean())
    largest = float((x - middle).abs().max())
    high, low = (15, 0) if centre == "silu" else (7, -7)
    step = largest / high
    expected = [step * min(max(round((v - middle) / step), low), high) + middle for v in x.flatten().tolist()]
    assert quantizer(x).flatten().tolist() == pytest.approx(expected, abs=1e-5)
    assert (quantizer.offset in list(quantizer.trainable())) is (centre == "learned")


def test_a_learned_centre_keeps_the_first_mean_and_learns() -> None:
    quantizer = ready(EMARange(StaticConfig(), SIGNED), Lsq(), "learned")
    first = float(quantizer.offset)  # type: ignore[arg-type]
    quantizer.observe(activations() + 100)
    assert float(quantizer.offset) == first  # type: ignore[arg-type]
    quantizer.offset.requires_grad_(True)  # type: ignore[union-attr]
    x = torch.tensor([[1e6, first, -1e6, -2e6]])
    quantizer(x).sum().backward()
    assert float(quantizer.offset.grad) == 3  # type: ignore[union-attr, arg-type]  # of what is clipped; inside it cancels


def test_unfit_choices_are_named() -> None:
    with pytest.raises(ValueError, match="got affine"):
        TrainableQuantizer(EMARange(StaticConfig(), QuantSpec(4)), Lsq())
    with pytest.raises(ValueError, match="zero, silu or learned, got 'mean'"):
        TrainableQuantizer(EMARange(StaticConfig(), SIGNED), Lsq(), "mean")  # type: ignore[arg-type]
    weight = torch.ones(2, 2)
    with pytest.raises(TypeError, match="Lsq is trained"):
        TrainableWeightQuantizer(weight, SIGNED, AbsMax(), Lsq()).learn_rounding(weight)
    with pytest.raises(ValueError, match="got affine"):
        DynamicGeneratorScale(DynamicGeneratorConfig(None, (4,)), QuantSpec(4), TimestepContext(TIMESTEPS))


def test_numbers_are_kept_in_their_intervals() -> None:
    for form, name in ((Duq(), "gain"), (Qil(), "pruned")):
        weight = activations()
        quantizers = [
            ready(EMARange(StaticConfig(), SIGNED), form),
            TrainableWeightQuantizer(weight, SIGNED, AbsMax(), form),
        ]
        for quantizer in quantizers:
            for wrong in (-5.0, 1e9):
                for parameter in quantizer.parameters():
                    parameter.fill_(wrong)
                quantizer.clamp_parameters()  # type: ignore[union-attr]
                bounds = form.extra_params()[name]
                assert bounds.min <= float(quantizer.extra[name]) <= bounds.max + 1e-6  # type: ignore[union-attr, arg-type]
            quantizer.get_parameter("scale" if quantizer is quantizers[1] else "scale_provider.scale").fill_(-1.0)
            quantizer.clamp_parameters()  # type: ignore[union-attr]
            assert all(float(parameter.min()) >= 0 for parameter in quantizer.parameters())


# weights


@pytest.mark.parametrize("axis", [0, None])
@pytest.mark.parametrize("bits", [2, 3, 8])
@pytest.mark.parametrize("form", FORMS, ids=repr)
def test_integers_of_a_weight_stand_for_what_was_trained(form: QATQuantizeFn, bits: int, axis: int | None) -> None:
    weight = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    spec = QuantSpec(bits, "symmetric", axis=axis)
    quantizer = TrainableWeightQuantizer(weight, spec, AbsMax(0.7), form).eval()
    quantizer.observe(weight)
    for number in quantizer.extra.values():
        number.add_(0.2)
    quantizer.mode = Mode.QUANTIZE
    codes = quantizer.codes(weight)
    assert torch.equal(codes, codes.round())
    assert spec.qmin <= int(codes.min()) < int(codes.max()) <= spec.qmax
    assert torch.equal(quantizer.qparams.scale * codes, quantizer(weight))


@pytest.mark.parametrize("form", FORMS, ids=repr)
def test_weight_and_its_numbers_are_trained_together(form: QATQuantizeFn) -> None:
    weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(0)).requires_grad_(True)
    quantizer = TrainableWeightQuantizer(weight, QuantSpec(3, "symmetric", axis=0), AbsMax(0.5), form).train()
    quantizer.observe(weight)
    quantizer.mode = Mode.QUANTIZE
    parameters = [weight, *quantizer.trainable()]
    for parameter in parameters:
        parameter.requires_grad_(True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        (quantizer(weight) - 1).square().sum().backward()
    assert all(bool((parameter.grad != 0).any()) for parameter in parameters)  # type: ignore[union-attr]


# networks of the timestep, together


# networks of statistics
