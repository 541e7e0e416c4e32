"""Learned rounding against autograd of the textbook formulas (arXiv 2004.10568, eq. 22 to 24)."""

import pytest
import torch

from tfmq_exp.quant.functional import dequantize, fake_quantize, qparams_from_range, quantize
from tfmq_exp.quant.observers import LpObserver, MinMax
from tfmq_exp.quant.quantizers import Mode, WeightQuantizer
from tfmq_exp.quant.rounding import (
    AdaRound,
    JointRounding,
    inverse_rectified_sigmoid,
    penalty_gradient,
    rectified_sigmoid,
)
from tfmq_exp.quant.spec import QParams, QuantSpec

SPECS = [QuantSpec(bits, scheme, axis=0) for bits in (2, 4, 8) for scheme in ("affine", "symmetric")]


def setting(spec: QuantSpec, estimator=LpObserver(), dtype=torch.float64):  # noqa: B008
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(4, 5, 3, generator=generator, dtype=dtype) * torch.logspace(-1, 1, 4, dtype=dtype)[:, None, None]
    q = qparams_from_range(*estimator(w, spec), spec)
    return w, type(q)(*(part.to(dtype) for part in q)), torch.randn(w.shape, generator=generator, dtype=dtype)


def textbook(w, q, spec, v):
    h = (torch.sigmoid(v) * 1.2 - 0.1).clamp(0, 1)
    return q.scale * (((w / q.scale).floor() + h + q.zero_point).clamp(spec.qmin, spec.qmax) - q.zero_point), h


def pair(spec):
    """Two weights of different shapes, moved away from their start, with a direction for each."""
    first, second = setting(spec), setting(spec, MinMax())
    weights = first[0], second[0][:, :2, :1].contiguous()
    roundings = [AdaRound(w, q, spec) for w, q in zip(weights, (first[1], second[1]), strict=True)]
    noises = [first[2][:, : w.shape[1], : w.shape[2]] for w in weights]
    with torch.no_grad():
        for rounding, noise in zip(roundings, noises, strict=True):
            rounding.v.add_(3 * noise)
    return weights, (first[1], second[1]), roundings, noises


@pytest.mark.parametrize("spec", SPECS, ids=repr)
@pytest.mark.parametrize("beta", [None, 20.0, 7.3, 2.0])
def test_values_and_gradient_are_those_of_the_textbook(spec, beta):
    weights, qs, roundings, noises = pair(spec)
    vs = [rounding.v.detach().clone().requires_grad_() for rounding in roundings]
    total, expected = 0.0, []
    for w, q, v, noise in zip(weights, qs, vs, noises, strict=True):
        soft, h = textbook(w, q, spec, v)
        expected.append(soft)
        total = total + soft.mul(noise).sum() + (0.3 * (1 - (2 * h - 1).abs().pow(beta)).sum() if beta else 0.0)
    total.backward()
    joint = JointRounding(roundings)
    for ours, soft in zip(joint.weights, expected, strict=True):
        torch.testing.assert_close(ours, soft, rtol=1e-12, atol=1e-12)
    error = sum((ours * noise).sum() for ours, noise in zip(joint.weights, noises, strict=True))
    to_weights = torch.cat([g.flatten() for g in torch.autograd.grad(error, joint.weights)])
    gradient = joint.gradient(to_weights, 0.3 * penalty_gradient(joint.h, beta) if beta else None)
    torch.testing.assert_close(gradient, torch.cat([v.grad.flatten() for v in vs]), rtol=1e-9, atol=1e-12)


def test_a_step_of_the_vector_moves_every_weight() -> None:
    spec = QuantSpec(4, axis=0)
    weights, qs, roundings, noises = pair(spec)
    joint = JointRounding(roundings)
    with torch.no_grad():
        joint.v.copy_(torch.cat([noise.flatten() for noise in noises]))
    joint.update()
    for rounding, w, q, noise in zip(roundings, weights, qs, noises, strict=True):
        torch.testing.assert_close(rounding.weight().detach(), textbook(w, q, spec, noise)[0], rtol=1e-12, atol=1e-12)
        rounding.harden()
        assert torch.equal(rounding(w / q.scale), (w / q.scale).floor() + (noise >= 0))


def test_penalty_pushes_away_from_a_tie():
    gradient = penalty_gradient(torch.tensor([0.5, 0.0, 1.0]), 2.0)
    torch.testing.assert_close(gradient, torch.tensor([0.0, 4.0, -4.0]), rtol=0, atol=1e-20)


def test_inverse_of_the_rectified_sigmoid():
    h = torch.linspace(0, 1, 101, dtype=torch.float64)
    torch.testing.assert_close(rectified_sigmoid(inverse_rectified_sigmoid(h)), h, rtol=0, atol=1e-12)
    assert rectified_sigmoid(torch.tensor([-9.0, 9.0])).tolist() == [0, 1]


@pytest.mark.parametrize("spec", SPECS, ids=repr)
def test_starts_at_the_weight_wherever_the_grid_reaches_it(spec):
    w, q, _ = setting(spec)
    lowest, highest = (q.scale * (end - q.zero_point) for end in (spec.qmin, spec.qmax))
    soft = AdaRound(w, q, spec).weight()
    torch.testing.assert_close(soft, w.clamp(lowest, highest), rtol=0, atol=1e-9)


@pytest.mark.parametrize("spec", SPECS, ids=repr)
def test_at_its_start_it_decides_for_the_nearest_point(spec):
    w, q, _ = setting(spec, MinMax())
    rounding = AdaRound(w, q, spec)
    rounding.harden()
    assert torch.equal(fake_quantize(w, q, spec, rounding), fake_quantize(w, q, spec))


@pytest.mark.parametrize("spec", SPECS, ids=repr)
def test_hardened_weights_are_the_decided_codes(spec):
    w, _, noise = setting(spec, dtype=torch.float32)
    quantizer = WeightQuantizer(w, spec, LpObserver())
    quantizer.observe(w)
    quantizer.mode = Mode.QUANTIZE
    rounding = quantizer.learn_rounding(w)
    with torch.no_grad():
        rounding.v.add_(2 * noise)
    soft = quantizer(w)
    rounding.harden()
    codes = quantizer.codes(w)
    up = (rounding.v >= 0).float()
    expected = ((w / quantizer.scale).floor() + up + quantizer.zero_point).clamp(spec.qmin, spec.qmax)
    assert torch.equal(codes, expected)
    assert torch.equal(quantizer(w), dequantize(codes, quantizer.qparams))
    assert torch.equal(codes, quantize(w, quantizer.qparams, spec, rounding))
    assert not torch.equal(soft, quantizer(w))
    assert bool(((quantizer(w) - soft).abs() <= quantizer.scale * (1 + 1e-5)).all())


def test_saturated_decisions_have_no_gradient():
    w, q, _ = setting(QuantSpec(4, axis=0))
    rounding = AdaRound(w, q, QuantSpec(4, axis=0))
    with torch.no_grad():
        rounding.v.fill_(9)
    assert bool((JointRounding([rounding]).gradient(torch.ones(w.numel(), dtype=w.dtype)) == 0).all())


def test_adaround_starts_at_the_fractional_part_and_takes_ties_up() -> None:
    q, spec = QParams(torch.tensor([[0.25]]), torch.tensor([[8.0]])), QuantSpec(4, axis=0)
    codes = torch.tensor([[-3.0, -2.5, -1.75, -0.5, 0.0, 0.25, 0.5, 0.75, 1.5, 2.5, 3.5]])
    weight = 0.25 * codes
    rounding = AdaRound(weight, q, spec)
    torch.testing.assert_close(rectified_sigmoid(rounding.v), codes - codes.floor(), atol=1e-6, rtol=0)
    rounding.harden()
    up = rounding(weight / q.scale)
    ties = (codes - codes.floor()) == 0.5
    assert torch.equal(up[~ties], codes[~ties].round())
    assert torch.equal(up[ties], codes[ties].floor() + 1)
