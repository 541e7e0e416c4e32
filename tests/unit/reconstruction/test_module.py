"""One unit's loss, penalty and gradients, and the configuration of its learning."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.reconstruction import ROUNDING, config
from tfmq_exp.quant.layers import QuantLinear
from tfmq_exp.quant.observers import MinMax
from tfmq_exp.quant.quantizers import Mode, WeightQuantizer
from tfmq_exp.quant.rounding import AdaRound
from tfmq_exp.quant.spec import QuantSpec
from tfmq_exp.quant.timestep_context import TimestepContext
from tfmq_exp.reconstruction.activation_cache import TensorTree
from tfmq_exp.reconstruction.context import quiet_trainer
from tfmq_exp.reconstruction.module import Adam, BlockReconstruction, LearnRounding, ReconstructionConfig
from tfmq_exp.reconstruction.objectives import Annealing, Lp
from tfmq_exp.reconstruction.random_batches import RandomRows
from tfmq_exp.reconstruction.units import QuantizedInputs


@pytest.mark.parametrize(("iterations", "batch"), [(0, 8), (10, 0)])
def test_empty_recipes_are_refused(iterations: int, batch: int) -> None:
    with pytest.raises(
        ValueError, match=r"ReconstructionConfig\.(iterations|batch) must be a whole number, at least 1 .*, got -?\d+$"
    ):
        ReconstructionConfig(
            iterations, batch, Lp(), QuantizedInputs(), LearnRounding(1e-3, 0.01, Annealing(0.2, 20.0, 2.0))
        )


def test_recipe_that_learns_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="this one neither"):
        ReconstructionConfig(10, 8, Lp(), QuantizedInputs())


def one_layer(penalty: float, iterations: int = 50) -> tuple[BlockReconstruction, list[Tensor], AdaRound]:
    """A linear layer whose rounding is learned, with a batch of (t, x, wanted)."""
    generator = torch.Generator().manual_seed(0)
    layer = QuantLinear.from_float(nn.Linear(6, 4, bias=False).requires_grad_(False))
    layer.weight.copy_(torch.randn(4, 6, generator=generator))
    layer.weight_quantizer = quantizer = WeightQuantizer(layer.weight, QuantSpec(3, axis=0), MinMax())
    quantizer.observe(layer.weight)
    quantizer.mode = Mode.QUANTIZE
    rounding = quantizer.learn_rounding(layer.weight)
    with torch.no_grad():
        rounding.v.add_(0.5)

    learned = config(
        iterations, rate=None, rounding=LearnRounding(1e-3, penalty, Annealing(0.2, 20.0, 2.0)), objective=Lp()
    )
    t, x, wanted = batch = [
        torch.ones(5, dtype=torch.long),
        torch.randn(5, 6, generator=generator),
        torch.randn(5, 4, generator=generator),
    ]
    samples = TensorTree({"inputs": {"float": (t, (x,), {})}, "targets": wanted, "importance": None})
    task = BlockReconstruction(layer, TimestepContext((1,)), [rounding], [], samples, learned)
    return task, batch, rounding


def test_penalty_is_off_in_warm_up_and_its_exponent_falls_from_20_to_2() -> None:
    task, batch, rounding = one_layer(0.01)
    plain = float(one_layer(0.0)[0].losses(batch)[1][0])
    for count in range(1, 51):
        task.iteration = count
        beta = 20 - 18 * (count - 10) / 40
        h = rounding.h.detach().flatten().double().requires_grad_()
        (0.01 * (1 - (2 * h - 1).abs() ** beta).sum()).backward()
        found = task.penalty_gradient()
        assert (found is None) == (count < 10)
        if found is not None:
            torch.testing.assert_close(found.double(), h.grad, rtol=1e-4, atol=1e-8)
        assert float(task.losses(batch)[1][0]) == pytest.approx(plain, rel=1e-6)


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_gradients_are_those_of_the_error_and_the_penalty_however_many_parts(parts: int) -> None:
    task, batch, rounding = one_layer(0.01)
    task.config, task.iteration = replace(task.config, parts=parts), 30
    v = rounding.v.detach().clone().requires_grad_()
    h = (torch.sigmoid(v) * 1.2 - 0.1).clamp(0, 1)
    error = (batch[1] @ (rounding.below + rounding.gap * h).T - batch[2]).square().mean() * 4
    (error + 0.01 * (1 - (2 * h - 1).abs() ** (20 - 18 * 20 / 40)).sum()).backward()
    (found,) = task.gradients(batch)
    torch.testing.assert_close(found.view_as(v), v.grad, rtol=1e-5, atol=1e-7)
    assert float(task.error) == pytest.approx(float(error), rel=1e-6)


def test_steps_are_those_of_torchs_adam() -> None:
    generator = torch.Generator().manual_seed(0)
    ours = [torch.randn(5, 3, generator=generator), torch.randn(7, generator=generator)]
    theirs = [torch.nn.Parameter(x.clone()) for x in ours]
    optimizer, adam = torch.optim.Adam(theirs), Adam()
    for rate in (0.1, 0.01, 0.3):
        for x in theirs:
            x.grad = torch.randn(x.shape, generator=generator)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        adam.step(ours, [x.grad for x in theirs if x.grad is not None], rate)
        torch.testing.assert_close(ours, [x.detach() for x in theirs])


def test_more_parts_than_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="8 can have 1 to 8 parts, got 9"):
        replace(config(10), parts=9)


def test_learning_in_bfloat16_is_near_and_uses_the_weights_of_each_iteration() -> None:
    """A chunk of iterations in one call: autocast would keep its copies of the first one's weights."""
    moved = {}
    for precision in ("float32", "tf32", "bfloat16"):
        task, batch, rounding = one_layer(0.01)
        task.config = replace(task.config, precision=precision, rounding=replace(ROUNDING, learning_rate=0.1))
        start, rows = rounding.v.detach().clone(), torch.arange(len(batch[0]))
        task.training_step([rows] * 6, 0)
        errors = float(task.error), float(sum(task.losses(batch)[1]))
        assert errors[0] != errors[1]
        moved[precision] = rounding.v.detach() - start
    assert torch.equal(moved["tf32"], moved["float32"])  # a CPU has none
    assert not torch.equal(moved["bfloat16"], moved["float32"])
    assert float((moved["bfloat16"] - moved["float32"]).norm() / moved["float32"].norm()) < 0.1


@pytest.mark.parametrize("precision", ["float16", "double", None])
def test_other_precisions_of_learning_are_refused(precision: str | None) -> None:
    with pytest.raises(
        ValueError, match=r"ReconstructionConfig\.precision must be one of float32, tf32, bfloat16, got"
    ):
        ReconstructionConfig(10, 8, Lp(), QuantizedInputs(), ROUNDING, precision=precision)  # type: ignore[arg-type]


def test_samples_are_let_go_when_learning_ends() -> None:
    task, _, _ = one_layer(0.01, iterations=2)
    with torch.enable_grad():
        quiet_trainer(torch.device("cpu"))(max_epochs=1).fit(
            task, RandomRows(torch.arange(len(task.samples)), 4, 2, seed=0)
        )
    assert task.iteration == 2
    assert task.samples.tensors == []
