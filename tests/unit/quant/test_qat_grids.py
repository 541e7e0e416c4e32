"""Codes, integer ranges, noise, and files of QAT quantizer functions."""

import pytest
import torch
from torch import Tensor

from tests.unit.quant.test_qat_functions import SIGNED, extra
from tfmq_exp.core.records import decode, encode
from tfmq_exp.quant.qat_functions import Duq, Lsq, Nipq, Pact, QATQuantizeFn, Qil, error_noise
from tfmq_exp.quant.spec import IntRangeKind, QuantSpec, Scheme, int_range

STORED = (Lsq, Duq, Qil)

FORMS: list[QATQuantizeFn] = [
    Lsq(),
    Lsq("tdq_release", scaled=False),
    Pact(),
    Nipq(),
    Duq(),
    Qil(),
    Qil(learn_gamma=True),
]

FOR_INFERENCE: list[QATQuantizeFn] = [Lsq(), Lsq("narrow"), Duq(), Qil(), Qil("tdq_release")]


@pytest.mark.parametrize("scheme", ["symmetric", "unsigned"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("form", FORMS, ids=repr)
def test_codes_are_integers_that_stand_for_the_values_bit_by_bit(
    form: QATQuantizeFn, bits: int, scheme: Scheme
) -> None:
    if form.int_range == "tdq_release" and (bits, scheme) == (2, "symmetric"):
        return
    ints = int_range(QuantSpec(bits, scheme), form.int_range)
    x = 3 * torch.randn(4, 3, 40, generator=torch.Generator().manual_seed(0))
    scale = torch.tensor([0.11, 0.4, 1.7]).reshape(1, 3, 1)
    own, for_inference = extra(form), form.for_inference()
    codes = for_inference.codes(x, scale, ints, own)
    assert torch.equal(codes, codes.round())
    assert ints.qmin <= codes.min() < codes.max() <= ints.qmax
    dequantized = codes * for_inference.output_scale(scale, own)
    assert torch.equal(for_inference(x, scale, ints, own), dequantized)
    assert torch.equal(for_inference(x.requires_grad_(True), scale, ints, own), dequantized)


@pytest.mark.parametrize("form", FORMS, ids=repr)
def test_at_the_start_every_settled_form_rounds_to_the_nearest_code(form: QATQuantizeFn) -> None:
    x = 3 * torch.randn(500, generator=torch.Generator().manual_seed(0))
    starts = {name: torch.tensor(f.init) for name, f in form.extra_params().items()}
    assert all(f.min <= f.init <= f.max for f in form.extra_params().values())
    out = form.for_inference()(x, torch.tensor([0.25]), SIGNED, starts)
    nearest = [0.25 * min(max(round(float(value) / 0.25), -7), 7) for value in x]
    assert out.tolist() == pytest.approx(nearest)


@pytest.mark.parametrize("form", FORMS, ids=repr)
def test_gradient_of_a_step_is_the_sum_over_the_values_that_share_it(form: QATQuantizeFn) -> None:
    x, own = torch.randn(6, 5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64), extra(form)
    scale = torch.linspace(0.05, 0.4, 6, dtype=torch.float64).reshape(6, 1, 1).requires_grad_(True)
    torch.manual_seed(0)
    if isinstance(form, Nipq):
        form = form.for_inference()
    form(x, scale, SIGNED, own).square().sum().backward()
    for row in range(6):
        alone = scale.detach()[row : row + 1].requires_grad_(True)
        form(x[row : row + 1], alone, SIGNED, own).square().sum().backward()
        torch.testing.assert_close(scale.grad[row : row + 1], alone.grad)  # type: ignore[index]


def test_gradients_fit_half_precision_activations() -> None:
    for form in FORMS:
        x = torch.randn(4, 8).bfloat16().requires_grad_(True)
        scale = torch.tensor([0.2], requires_grad=True)
        form(x, scale, SIGNED, extra(form)).sum().backward()
        assert x.grad is not None
        assert x.grad.dtype == torch.bfloat16
        assert scale.grad is not None
        assert scale.grad.dtype == torch.float32


@pytest.mark.parametrize(
    ("bits", "scheme", "kind", "expected"),
    [
        (8, "symmetric", "full", (-128, 127)),
        (8, "symmetric", "narrow", (-127, 127)),
        (8, "symmetric", "tdq_release", (-126, 126)),
        (4, "symmetric", "tdq_release", (-6, 6)),
        (3, "symmetric", "full", (-4, 3)),
        (3, "symmetric", "tdq_release", (-2, 2)),
        (3, "unsigned", "full", (0, 7)),
        (3, "unsigned", "narrow", (0, 7)),
        (4, "unsigned", "tdq_release", (0, 14)),
    ],
)
def test_integer_ranges(bits: int, scheme: Scheme, kind: IntRangeKind, expected: tuple[int, int]) -> None:
    assert int_range(QuantSpec(bits, scheme), kind)[:2] == expected


def test_impossible_grids_are_named() -> None:
    with pytest.raises(ValueError, match="got affine"):
        int_range(QuantSpec(4), "full")
    with pytest.raises(ValueError, match="2 bits with the integer range tdq_release leave no integer"):
        int_range(QuantSpec(2, "symmetric"), "tdq_release")
    with pytest.raises(ValueError, match="one of full, narrow, tdq_release, got 'most'"):
        Lsq("most")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="narrow or tdq_release, got 'full'"):
        Qil("full")
    with pytest.raises(ValueError, match=r"decay must be a number, at least 0, got -0\.1"):
        Pact(decay=-0.1)


def shares(x: Tensor) -> Tensor:
    return torch.histc(x.double(), 16, -0.5, 0.5) / x.numel()


@pytest.mark.parametrize("shape", ["normal", "two points", "uniform"])
def test_noise_has_the_distribution_of_the_rounding_errors(shape: str) -> None:
    torch.manual_seed(0)
    errors = {
        "normal": (0.15 * torch.randn(40_000)).clamp(-0.5, 0.5),
        "two points": torch.tensor([-0.41, 0.22, 0.22]).repeat(13_000),
        "uniform": torch.rand(40_000) - 0.5,
    }[shape]
    noise = error_noise(errors)
    assert noise.shape == errors.shape
    assert noise.abs().max() <= 0.5
    torch.testing.assert_close(shares(noise), shares(errors), rtol=0, atol=0.01)
    assert float(torch.corrcoef(torch.stack([noise, errors]))[0, 1]) == pytest.approx(0, abs=0.03)


def test_errors_that_lie_at_equal_steps_are_counted_as_often_as_others() -> None:
    """A kernel whose first tap rounds otherwise than the rest, in a weight with more values than are counted."""
    torch.manual_seed(0)
    errors = torch.full((128, 128, 3, 3), 0.3)
    errors[:, :, 0, 0] = -0.4
    noise = error_noise(errors)
    assert float((noise < 0).double().mean()) == pytest.approx(1 / 9, abs=0.01)


def test_noise_without_errors_is_uniform() -> None:
    torch.manual_seed(0)
    torch.testing.assert_close(
        shares(error_noise(torch.ones(20_000))), torch.full((16,), 1 / 16).double(), rtol=0, atol=0.01
    )


def test_noise_becomes_rounding() -> None:
    x, scale = torch.linspace(-3, 3, 200), torch.tensor([0.3])
    rounded = Nipq().for_inference()(x, scale, SIGNED, {})
    assert torch.equal(rounded, Lsq("narrow")(x, scale, SIGNED, {}))
    assert not torch.equal(Nipq()(x, scale, SIGNED, {}), rounded)


@pytest.mark.parametrize("form", FOR_INFERENCE, ids=repr)
def test_settled_forms_survive_json(form: QATQuantizeFn) -> None:
    assert decode(encode(form, STORED), QATQuantizeFn, STORED) == form
    assert form.for_inference() == form


@pytest.mark.parametrize("form", [Pact(), Nipq()], ids=repr)
def test_forms_that_still_train_are_not_stored(form: QATQuantizeFn) -> None:
    with pytest.raises(TypeError, match="cannot be stored"):
        encode(form, STORED)


def test_unknown_kind_of_form_is_named() -> None:
    with pytest.raises(ValueError, match="'pact'; known: lsq, duq, qil"):
        decode({"kind": "pact"}, QATQuantizeFn, STORED)
