"""Training against a loop that is written down plainly, part by part, and on several processes."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from pytorch_lightning.plugins.precision import MixedPrecision
from torch import Tensor, nn

from tests.conftest import quantizable
from tests.helpers.learning import noise_with
from tfmq_exp.core.distributed import ALONE, ProcessGroup, ordered_sum
from tfmq_exp.denoisers.denoiser import NoConditions
from tfmq_exp.qat.conditioning import ConditionDropout
from tfmq_exp.qat.dataset import BatchRange, NoisyBatches, TrainingSet
from tfmq_exp.qat.model import TrainableParameters
from tfmq_exp.qat.module import Norm, QuantizationAwareTraining, TrainingProtocol, loss, update_average
from tfmq_exp.quant.observers import MinMax
from tfmq_exp.quant.quantizers import Mode
from tfmq_exp.reconstruction.context import quiet_trainer
from tfmq_exp.surgery.quantized_network import QuantizedNetwork, build_quantized_network

pytestmark = pytest.mark.filterwarnings("ignore::Warning:pytorch_lightning")

ALPHAS = torch.linspace(0.99, 0.02, 12)
PROTOCOL = TrainingProtocol(
    iterations=5, batch=4, loss="l2", learning_rate=1e-3, range_lr_scale=0.1, weight_decay=5.0, warmup=3, ema_decay=0.3,
    calibration_batches=1, warmup_start_factor=0.1,
)  # fmt: skip
NOISE = noise_with(ALPHAS)
CONDITIONS = ConditionDropout(NoConditions(), ())


def examples(rows: int = 10) -> TrainingSet:
    generator = np.random.default_rng(0)
    return TrainingSet(generator.integers(0, 256, (rows, 3, 8, 8), dtype=np.uint8))


def batches(protocol: TrainingProtocol = PROTOCOL) -> NoisyBatches:
    return NoisyBatches(examples(), protocol.batch, len(ALPHAS), protocol.condition_dropout, seed=7)


def learner(network: nn.Module, mode: Mode = Mode.QUANTIZE) -> tuple[QuantizedNetwork, TrainableParameters]:
    """A network all of which learns, in groups that only settings tell apart; rounding is left out where `mode` is OFF."""
    plan = replace(quantizable(network, scales="none").plan, timesteps=tuple(range(len(ALPHAS))))
    model = build_quantized_network(network, plan, MinMax())
    model.calibrate_weights()
    model.set_activations(Mode.OBSERVE)
    batch = batches().batch(0)
    with torch.no_grad():
        model(batch.clean, batch.t)
    for quantizer in (*model.weight_quantizers(), *model.activation_quantizers().values()):
        quantizer.mode = mode
    scales: list[Any] = [quantizer.scale_provider.scale for quantizer in model.activation_quantizers().values()]
    others = [p for name, p in model.network.named_parameters() if not name.endswith("scale_provider.scale")]
    for parameter in (*scales, *others):
        parameter.requires_grad_(True)
    norms = [p for p in others if p.dim() == 1]
    kernels = [p for p in others if p.dim() > 1]
    return model, TrainableParameters(kernels[2:], [*norms, *scales], kernels[:2])


def train(network: nn.Module, protocol: TrainingProtocol, mode: Mode) -> QuantizationAwareTraining:
    model, learned = learner(network, mode)
    module = QuantizationAwareTraining(model, learned, lambda: 0.0, CONDITIONS, NOISE, protocol, seed=7)
    trainer = quiet_trainer(torch.device("cpu"))(max_steps=protocol.iterations, precision=protocol.precision)
    trainer.fit(module.train(), BatchRange(batches(protocol), 0, protocol.iterations))
    return module


@pytest.fixture(scope="module")
def module(tiny_unet: nn.Module) -> QuantizationAwareTraining:
    return train(tiny_unet, PROTOCOL, Mode.OFF)


@dataclass
class Written:
    """What a hand-written training leaves: parameters and averages, group by group."""

    groups: list[list[nn.Parameter]]
    averages: list[list[Tensor]] = field(default_factory=list)


@pytest.fixture(scope="module")
def written(tiny_unet: nn.Module) -> Written:
    model, groups = learner(tiny_unet, Mode.OFF)
    found = Written([list(group) for group in groups])
    found.averages = [[p.detach().clone() for p in group] for group in found.groups]
    first, second = ([[torch.zeros_like(p) for p in group] for group in found.groups] for _ in range(2))
    model.train()
    for n in range(PROTOCOL.iterations):
        batch = batches().batch(n)
        rows = []
        for clean, noise, t in zip(batch.clean, batch.noise, batch.t.tolist(), strict=True):
            rows.append(float(ALPHAS[t]) ** 0.5 * clean + (1 - float(ALPHAS[t])) ** 0.5 * noise)
        loss = (model(torch.stack(rows), batch.t).sample - batch.noise).pow(2).mean()
        parameters = [p for group in found.groups for p in group]
        gradients = iter(torch.autograd.grad(loss, parameters, allow_unused=True))
        rate = 1e-3 * (0.1 + 0.9 * min(n / 3, 1.0))
        decay = min(0.3, (1 + n + 1) / (10 + n + 1))
        settings = ((rate, 5.0), (rate * 0.1, 0.0), (rate, 5.0))
        for g, (lr, weight_decay) in enumerate(settings):
            for i, p in enumerate(found.groups[g]):
                gradient = next(gradients)
                gradient = torch.zeros_like(p) if gradient is None else gradient
                with torch.no_grad():
                    p.mul_(1 - lr * weight_decay)
                    first[g][i] = 0.9 * first[g][i] + 0.1 * gradient
                    second[g][i] = 0.999 * second[g][i] + 0.001 * gradient**2
                    mean, square = first[g][i] / (1 - 0.9 ** (n + 1)), second[g][i] / (1 - 0.999 ** (n + 1))
                    p.sub_(lr * mean / (square.sqrt() + 1e-8))
                    found.averages[g][i] = decay * found.averages[g][i] + (1 - decay) * p
    return found


@pytest.mark.parametrize(("group", "name"), [(0, "weights"), (1, "ranges"), (2, "generators")])
def test_every_group_learns_as_in_the_loop_that_is_written_down(
    module: QuantizationAwareTraining, written: Written, group: int, name: str
) -> None:
    for ours, theirs in zip(getattr(module.groups, name), written.groups[group], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_the_average_counts_the_start_and_every_later_state(
    module: QuantizationAwareTraining, written: Written
) -> None:
    kept = list(module.ema)
    for ours, theirs in zip(kept, [a for group in written.averages for a in group], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert any(not torch.equal(mean, last) for mean, last in zip(kept, module.trained, strict=True))


def test_groups_have_their_own_settings(module: QuantizationAwareTraining) -> None:
    optimizer = module.configure_optimizers()["optimizer"]
    found = [(g["initial_lr"], g["weight_decay"], len(g["params"])) for g in optimizer.param_groups]
    sizes = [len(group) for group in (module.groups.weights, module.groups.ranges, module.groups.generators)]
    assert found == [(1e-3, 5.0, sizes[0]), (1e-4, 0.0, sizes[1]), (1e-3, 5.0, sizes[2])]


@pytest.mark.parametrize(("warmup", "rates"), [(0, [1.0, 1.0, 1.0]), (2, [0.1, 0.55, 1.0])])
def test_the_rate_rises_and_then_stays(tiny_unet: nn.Module, warmup: int, rates: list[float]) -> None:
    model, learned = learner(tiny_unet)
    protocol = replace(PROTOCOL, warmup=warmup)
    module = QuantizationAwareTraining(model, learned, lambda: 0.0, CONDITIONS, NOISE, protocol, seed=7)
    made = module.configure_optimizers()
    optimizer, schedule, found = made["optimizer"], made["lr_scheduler"]["scheduler"], []
    for _ in rates:
        found.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    assert found == [pytest.approx([1e-3 * rate, 1e-4 * rate, 1e-3 * rate]) for rate in rates]


class FakeGroup(ProcessGroup):
    """One of several ranks, of which there are no others: it records the vectors that it would add."""

    vectors: list[list[Tensor]] = []

    def ordered_all_reduce(self, own: Sequence[Tensor], count: int) -> Tensor:
        self.vectors.append([x.clone() for x in own])
        return own[0]


class Optimizer:
    """Stands for Lightning's, of which gradients need this alone."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters

    def zero_grad(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None


def gradients(network: nn.Module, parts: int, processes: ProcessGroup) -> Tensor:
    model, learned = learner(network)
    protocol = replace(PROTOCOL, parts=parts)
    module = QuantizationAwareTraining(
        model.train(),
        learned,
        lambda: sum(p.square().sum() for p in learned.ranges),
        CONDITIONS,
        NOISE,
        protocol,
        7,
        processes,
    )
    module.manual_backward = lambda loss: loss.backward()  # type: ignore[method-assign]
    module.set_gradients(Optimizer(module.trained), batches().batch(3))
    found: list[Any] = [p.grad for p in module.trained]
    return torch.cat([*(g.flatten() for g in found), module.error.reshape(1)])


def test_parts_of_a_batch_add_up_to_it_whoever_computes_them(tiny_unet: nn.Module) -> None:
    whole, in_parts = (gradients(tiny_unet, parts, ALONE) for parts in (1, 3))
    torch.testing.assert_close(in_parts, whole, rtol=1e-3, atol=1e-5)
    assert not torch.equal(in_parts, whole)  # the order of additions differs, so the comparison below can fail
    FakeGroup.vectors.clear()
    for rank in range(2):
        gradients(tiny_unet, 3, FakeGroup(rank, 2))
    (first, third), (second,) = FakeGroup.vectors
    assert torch.equal(ordered_sum([first, second, third]), in_parts)


def test_half_precision_and_a_bounded_gradient(tiny_unet: nn.Module) -> None:
    protocol = replace(PROTOCOL, iterations=1, precision="bf16-mixed", gradient_clip_val=1e-3)
    module = train(tiny_unet, protocol, Mode.QUANTIZE)
    found: list[Any] = [p.grad for p in module.trained]
    assert torch.cat([g.flatten() for g in found]).norm() == pytest.approx(1e-3, rel=1e-3)


def test_float16_takes_its_scale_off_before_the_gradient_is_bounded(tiny_unet: nn.Module) -> None:
    """With the scaler that Lightning takes on a GPU: norms are those of float32, and a step that overflows is left out."""
    protocol = replace(PROTOCOL, iterations=3, precision="16-mixed", parts=3)
    free, bounded = [norm_of(tiny_unet, replace(protocol, gradient_clip_val=clip), 1024.0)[1] for clip in (None, 1e-2)]
    _, exact = norm_of(tiny_unet, replace(protocol, precision="32-true"), None)
    assert free == pytest.approx(exact, rel=0.05)
    assert bounded == pytest.approx([1e-2] * 3, rel=1e-3)
    module, _ = norm_of(tiny_unet, protocol, 2.0**40)
    assert all(bool(p.isfinite().all()) for p in module.trained)


def norm_of(
    network: nn.Module, protocol: TrainingProtocol, scale: float | None
) -> tuple[QuantizationAwareTraining, list[float]]:
    """A training, and the gradient's norm at every step of its optimiser; with a scaler where there is a scale."""
    model, learned = learner(network)
    module = QuantizationAwareTraining(model, learned, lambda: 0.0, CONDITIONS, NOISE, protocol, seed=7)
    norms: list[float] = []
    bound = module.on_before_optimizer_step

    def noted(optimizer: torch.optim.Optimizer) -> None:
        bound(optimizer)
        found: list[Any] = [p.grad for p in module.trained]
        norms.append(float(torch.cat([g.flatten() for g in found]).norm()))

    module.on_before_optimizer_step = noted  # type: ignore[method-assign]
    scaler = torch.amp.GradScaler("cpu", init_scale=scale) if scale else None
    means = {"plugins": [MixedPrecision("16-mixed", "cpu", scaler)]} if scaler else {"precision": protocol.precision}
    trainer = quiet_trainer(torch.device("cpu"))(max_steps=protocol.iterations, **means)
    trainer.fit(module.train(), BatchRange(batches(protocol), 0, protocol.iterations))
    return module, norms


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"loss": "l3"}, "loss must be one of l1, l2, got 'l3'"),
        ({"parts": 5}, "a batch of 4 can have 1 to 4 parts, got 5"),
        ({"precision": "8"}, "precision must be one of 32-true"),
        ({"iterations": 0}, "iterations must be a whole number, at least 1 .*, got 0"),
        ({"condition_dropout": 2.0}, "condition_dropout must be a number from 0 to 1, got 2.0"),
        ({"gradient_clip_val": -1.0}, "gradient_clip_val must be a number above 0, or null, got -1.0"),
        ({"gradient_clip_val": 0.0}, "gradient_clip_val must be a number above 0"),
        ({"weight_decay": -0.1}, "weight_decay must be a number, at least 0, got -0.1"),
        ({"learning_rate": 0.0}, "learning_rate must be a number above 0, .*, got 0.0"),
        ({"warmup_start_factor": 1.5}, "warmup_start_factor must be a number above 0, at most 1, got 1.5"),
        ({"ema_decay": 1.0}, "ema_decay must be a number, at least 0 and below 1, got 1.0"),
    ],
)
def test_a_protocol_names_what_is_wrong(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        replace(PROTOCOL, **wrong)


@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        (0.9999, [1 * 2 / 11 + 2 * 9 / 11, (1 * 2 / 11 + 2 * 9 / 11) * 3 / 12 + 5 * 9 / 12]),
        (0.2, [1 * 2 / 11 + 2 * 9 / 11, (1 * 2 / 11 + 2 * 9 / 11) * 0.2 + 5 * 0.8]),
        (0.0, [2.0, 5.0]),
    ],
)
def test_the_past_weighs_little_at_first_and_then_what_was_asked_for(decay: float, expected: list[float]) -> None:
    parameter = nn.Parameter(torch.tensor([1.0, 1.0], dtype=torch.float64))
    mean = parameter.detach().clone()
    found = []
    for number, value in enumerate((2.0, 5.0), 1):
        with torch.no_grad():
            parameter.fill_(value)
        update_average([mean], [parameter], number, decay)
        found.append(float(mean[0]))
    assert found == pytest.approx(expected)


def values(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(2, 3, 4, 4, generator=generator).to(dtype) for _ in range(2))
    return first, second


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_is_the_mean_over_values_in_float32(norm: Norm, dtype: torch.dtype) -> None:
    predicted, noise = values(dtype)
    pairs = zip(predicted.flatten().tolist(), noise.flatten().tolist(), strict=True)
    errors = [abs(a - b) if norm == "l1" else (a - b) ** 2 for a, b in pairs]
    found = loss(predicted, noise, norm)
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(sum(errors) / len(errors), rel=1e-5)
