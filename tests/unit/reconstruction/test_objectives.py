"""Output errors, Fisher importance, and the annealing of the penalty, against formulas."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tests.helpers.calibration import calibration
from tests.helpers.reconstruction import structure
from tfmq_exp.calibration.dataset import CalibrationSet
from tfmq_exp.reconstruction.activation_cache import SpillAllocator
from tfmq_exp.reconstruction.capture import Capture
from tfmq_exp.reconstruction.objectives import Annealing, Fisher, Lp
from tfmq_exp.reconstruction.units import TemporalAware


def test_annealing_is_off_during_warmup_then_falls_linearly() -> None:
    annealing = Annealing(warmup=0.2, start=20.0, end=2.0)
    active = [annealing.active(count, 100) for count in range(1, 101)]
    betas = [annealing.beta(count, 100) for count in range(20, 101)]
    assert active == [False] * 19 + [True] * 81
    assert betas[0] == pytest.approx(20.0)
    assert betas[-1] == pytest.approx(2.0)
    steps = [b - a for a, b in itertools.pairwise(betas)]
    assert steps == pytest.approx([-18 / 80] * 80)


def test_loss_sums_over_channels_and_averages_over_the_rest() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape, channels in (((3, 4), 4), ((3, 5, 4), 4), ((3, 4, 2, 2), 4)):
        prediction, target, importance = torch.rand(3, *shape, generator=generator, dtype=torch.float64)
        count = prediction.numel() / channels
        pairs = list(
            zip(prediction.flatten().tolist(), target.flatten().tolist(), importance.flatten().tolist(), strict=True)
        )
        for objective, weights in ((Lp(2.0), None), (Lp(2.4), None), (Fisher(), importance), (Fisher(), None)):
            given = prediction.clone().requires_grad_()
            weighted = [abs(a - b) ** objective.p * (1 if weights is None else w) for a, b, w in pairs]
            loss, gradient = objective.loss(given, target, weights)
            assert float(loss) == pytest.approx(sum(weighted) / count)
            formula = (given - target).abs().pow(objective.p) * (1 if weights is None else weights)
            (expected,) = torch.autograd.grad(formula.sum() / count, given)
            torch.testing.assert_close(gradient, expected)


def drawn(network: nn.Module, data: CalibrationSet, batch: int, seed: int) -> Tensor:
    """V of every sample."""
    generator = torch.Generator().manual_seed(seed)
    channels = network.config["out_channels"]
    sizes = [len(data[slice(start, start + batch)]) for start in range(0, len(data), batch)]
    return torch.cat([torch.randn(size, channels, 8, 8, generator=generator) for size in sizes])


def importance(network: nn.Module, data: CalibrationSet, seed: int = 0) -> dict[str, list[Tensor]]:
    units = TemporalAware()(structure(network), frozenset(structure(network).layers))
    found = Fisher(seed).importance(network, units, Capture(data, 5, SpillAllocator(2**30)))
    assert set(found) == {unit.name for unit in units if unit.driver == "denoiser"}
    return {name: leaves.tensors for name, leaves in found.items()}


def test_importance_of_the_output_is_the_square_of_the_draw(network: nn.Module) -> None:
    data = calibration(network, each=3)
    squared = drawn(network, data, 5, seed=4).square()
    (found,) = importance(network, data, seed=4)["conv_out"]
    torch.testing.assert_close(found, squared / squared.mean())


def test_importance_has_mean_1_and_the_shape_of_the_output_everywhere(network: nn.Module) -> None:
    data, shapes = calibration(network, each=3), dict[str, list[torch.Size]]()
    found = importance(network, data)

    def note(name: str, out: Any) -> None:
        shapes[name] = [leaf.shape for leaf in pytree.tree_leaves(out) if isinstance(leaf, Tensor)]

    handles = [
        network.get_submodule(name).register_forward_hook(lambda _m, _a, out, name=name: note(name, out))
        for name in found
    ]
    with torch.no_grad():
        network(**data.inputs(torch.device("cpu")))
    for handle in handles:
        handle.remove()
    for name, tensors in found.items():
        assert [tensor.shape for tensor in tensors] == shapes[name]
        assert all(float(tensor.mean()) == pytest.approx(1, rel=1e-4) for tensor in tensors)
        assert all(bool((tensor >= 0).all()) for tensor in tensors)
    assert not any(parameter.requires_grad for parameter in network.parameters())
    assert not any(module._forward_hooks for module in network.modules())


@pytest.mark.parametrize("kind", ["resnets", "attentions"])
def test_importance_is_the_squared_gradient_of_an_added_disturbance(network: nn.Module, kind: str) -> None:
    data, v = calibration(network, each=3), drawn(network, calibration(network, each=3), 5, seed=0)
    found = importance(network, data)
    name = next(name for name in found if name.startswith("mid_block") and kind in name)
    disturbance = torch.zeros_like(found[name][0]).requires_grad_()
    handle = network.get_submodule(name).register_forward_hook(lambda _m, _a, out: out + disturbance)
    (network(**data.inputs(torch.device("cpu"))).sample * v).sum().backward()
    handle.remove()
    squared = disturbance.grad.square()  # type: ignore[union-attr]
    torch.testing.assert_close(found[name][0], squared / squared.mean(), rtol=1e-3, atol=1e-5)


def test_draws_of_importance_depend_on_the_seed(tiny_unet: nn.Module) -> None:
    data = calibration(tiny_unet, each=1)
    same, again, other = (importance(tiny_unet, data, seed)["conv_in"][0] for seed in (1, 1, 2))
    assert torch.equal(same, again)
    assert not torch.equal(same, other)


def test_temporal_units_have_no_importance(tiny_unet: nn.Module) -> None:
    temporal = TemporalAware()(structure(tiny_unet), frozenset(structure(tiny_unet).layers))[:1]
    assert Fisher().importance(tiny_unet, temporal, Capture(calibration(tiny_unet), 8, SpillAllocator(2**30))) == {}
