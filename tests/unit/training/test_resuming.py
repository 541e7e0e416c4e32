"""A training that was killed ends with the bits of one that was not, and with the whole of its curve."""

import multiprocessing
import os
import signal
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.conftest import quantizable
from tfmq_exp.denoisers.denoiser import NoConditions
from tfmq_exp.quant.encodings import Frequency
from tfmq_exp.quant.ranges import MinMax
from tfmq_exp.reconstruction.report import Learned, UnitReport
from tfmq_exp.reconstruction.run import Means, quiet_trainer
from tfmq_exp.surgery.quantized_unet import QuantizedUNet, build
from tfmq_exp.surgery.scales import GeneratedScale, ScalePlan
from tfmq_exp.training.examples import Examples
from tfmq_exp.training.module import TrainingProtocol
from tfmq_exp.training.run import TrainingTask, train

pytestmark = pytest.mark.filterwarnings("ignore::Warning:pytorch_lightning")

ALPHAS = torch.linspace(0.99, 0.02, 12)
GENERATED = GeneratedScale(Frequency(16), (8,), 0.2, "default")  # whose dropout draws random numbers
PROTOCOL = TrainingProtocol(
    iterations=5, batch=3, loss="l1", learning_rate=1e-3, range_rate=0.1, weight_decay=0.01, warmup=3, average=0.9,
    observed=2,
)  # fmt: skip


@dataclass
class Told:
    """Keeps reports and curves; kills its process when it hears of an iteration."""

    deadly: int | None = None
    curve: dict[int, float] = field(default_factory=dict)
    reports: list[UnitReport] = field(default_factory=list)

    def start(self, units: int) -> None:
        pass

    def progress(self, what: str, number: int, of: int) -> None:
        pass

    def iteration(self, unit: str, number: int, of: int, loss: float) -> None:
        self.curve[number] = loss
        if number == self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)

    def finished(self, unit: str, report: UnitReport | None) -> None:
        pass

    def get(self, unit: str) -> Learned | None:
        return None

    def put(self, unit: str, learned: Learned, report: UnitReport) -> None:
        self.reports.append(report)

    def part(self, name: str) -> "Told":
        return self


def trained(unet: nn.Module, folder: Path, told: Told) -> QuantizedUNet:
    torch.manual_seed(int.from_bytes(os.urandom(4), "big"))  # nothing may depend on what was drawn before
    plan = replace(quantizable(unet, scales=ScalePlan(GENERATED, GENERATED)).plan, timesteps=tuple(range(len(ALPHAS))))
    model = build(unet, plan, MinMax())
    values = np.random.default_rng(0).integers(0, 256, (10, 3, 8, 8), dtype=np.uint8)
    means = Means(64, 2**20, quiet_trainer(torch.device("cpu")), checkpoint_every=timedelta(0))
    train(TrainingTask(model, Examples(values), (), NoConditions(), ALPHAS, means, 3, folder, told, told), PROTOCOL)
    return model


@pytest.fixture(scope="module")
def uninterrupted(tiny_unet: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> tuple[QuantizedUNet, Told]:
    told = Told()
    return trained(tiny_unet, tmp_path_factory.mktemp("once"), told), told


def test_training_moves_everything_and_is_noted(
    uninterrupted: tuple[QuantizedUNet, Told], tiny_unet: nn.Module
) -> None:
    model, told = uninterrupted
    moved = [n for n, p in tiny_unet.named_parameters() if not torch.equal(p, model.unet.get_parameter(n))]
    assert len(moved) > 0.9 * len(list(tiny_unet.parameters()))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training
    assert sorted(told.curve) == [1, 2, 3, 4, 5]
    (report,) = told.reports
    assert report.error_after != report.error_before
    assert report.unit == "network"


@pytest.mark.parametrize("deadly", [2, 4])
def test_a_killed_training_ends_with_the_same_bits(
    uninterrupted: tuple[QuantizedUNet, Told], tiny_unet: nn.Module, tmp_path: Path, deadly: int
) -> None:
    child = multiprocessing.get_context("fork").Process(target=trained, args=(tiny_unet, tmp_path, Told(deadly)))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert [int(path.stem) for path in tmp_path.glob("*.ckpt")] == [deadly - 1]
    told = Told()
    model, (wanted, heard) = trained(tiny_unet, tmp_path, told), uninterrupted
    state, other = model.state_dict(), wanted.state_dict()
    assert state.keys() == other.keys()
    assert [name for name in state if not torch.equal(state[name], other[name])] == []
    assert told.curve == heard.curve
    assert (told.reports[0].error_before, told.reports[0].error_after) == (
        heard.reports[0].error_before,
        heard.reports[0].error_after,
    )
