"""A training that was killed ends with the bits of one that was not, and with the whole of its curve."""

import multiprocessing
import os
import signal
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.conftest import quantizable
from tests.helpers.learning import noise_with
from tfmq_exp.denoisers.denoiser import NoConditions
from tfmq_exp.qat.dataset import TrainingSet
from tfmq_exp.qat.model import trainable
from tfmq_exp.qat.module import QuantizationAwareTraining, TrainingProtocol
from tfmq_exp.qat.train import AtomicCheckpointIO, TrainingContext, last_checkpoint, train
from tfmq_exp.quant.observers import MinMax
from tfmq_exp.quant.scales.generator import Frequency
from tfmq_exp.quant.scales.tdq import TDQConfig
from tfmq_exp.reconstruction.context import ComputeConfig, UnitReport, UnitResult, quiet_trainer
from tfmq_exp.surgery.config import ScalePlan
from tfmq_exp.surgery.quantized_network import QuantizedNetwork, build_quantized_network

pytestmark = pytest.mark.filterwarnings("ignore::Warning:pytorch_lightning")

ALPHAS = torch.linspace(0.99, 0.02, 12)
GENERATED = TDQConfig(Frequency(16), (8,), 0.2, "default")  # whose dropout draws random numbers
PROTOCOL = TrainingProtocol(
    iterations=5, batch=3, loss="l1", learning_rate=1e-3, range_lr_scale=0.1, weight_decay=0.01, warmup=3, ema_decay=0.9,
    calibration_batches=2,
)  # fmt: skip


@dataclass
class Recorder:
    """Keeps reports and curves; kills its process at an iteration."""

    kill_at: int | None = None
    curve: dict[int, float] = field(default_factory=dict)
    reports: list[UnitReport] = field(default_factory=list)

    def on_start(self, units: int) -> None:
        pass

    def on_progress(self, name: str, done: int, total: int) -> None:
        pass

    def on_iteration_end(self, unit: str, iteration: int, iterations: int, loss: float) -> None:
        self.curve[iteration] = loss
        if iteration == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_unit_end(self, unit: str, report: UnitReport | None) -> None:
        pass

    def get(self, unit: str) -> UnitResult | None:
        return None

    def put(self, unit: str, learned: UnitResult, report: UnitReport) -> None:
        self.reports.append(report)

    def scoped(self, name: str) -> "Recorder":
        return self


def trained(network: nn.Module, folder: Path, recorder: Recorder) -> QuantizedNetwork:
    torch.manual_seed(int.from_bytes(os.urandom(4), "big"))  # nothing may depend on what was drawn before
    plan = replace(
        quantizable(network, scales=ScalePlan(GENERATED, GENERATED)).plan, timesteps=tuple(range(len(ALPHAS)))
    )
    model = build_quantized_network(network, plan, MinMax())
    values = np.random.default_rng(0).integers(0, 256, (10, 3, 8, 8), dtype=np.uint8)
    means = ComputeConfig(64, 2**20, quiet_trainer(torch.device("cpu")), checkpoint_every=timedelta(0))
    train(
        TrainingContext(
            model, TrainingSet(values), (), NoConditions(), noise_with(ALPHAS), means, 3, folder, recorder, recorder
        ),
        PROTOCOL,
    )
    return model


@pytest.fixture(scope="module")
def uninterrupted(tiny_unet: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> tuple[QuantizedNetwork, Recorder]:
    recorder = Recorder()
    return trained(tiny_unet, tmp_path_factory.mktemp("once"), recorder), recorder


def test_training_moves_everything_and_is_noted(
    uninterrupted: tuple[QuantizedNetwork, Recorder], tiny_unet: nn.Module
) -> None:
    model, recorder = uninterrupted
    moved = [n for n, p in tiny_unet.named_parameters() if not torch.equal(p, model.network.get_parameter(n))]
    assert len(moved) > 0.9 * len(list(tiny_unet.parameters()))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.training
    assert sorted(recorder.curve) == [1, 2, 3, 4, 5]
    (report,) = recorder.reports
    assert report.error_after != report.error_before
    assert report.unit == "network"


@pytest.mark.parametrize("kill_at", [2, 4])
def test_a_killed_training_ends_with_the_same_bits(
    uninterrupted: tuple[QuantizedNetwork, Recorder], tiny_unet: nn.Module, tmp_path: Path, kill_at: int
) -> None:
    child = multiprocessing.get_context("fork").Process(target=trained, args=(tiny_unet, tmp_path, Recorder(kill_at)))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    assert [int(path.stem) for path in tmp_path.glob("*.ckpt")] == [kill_at - 1]
    recorder = Recorder()
    model, (expected, other_recorder) = trained(tiny_unet, tmp_path, recorder), uninterrupted
    state, other = model.state_dict(), expected.state_dict()
    assert state.keys() == other.keys()
    assert [name for name in state if not torch.equal(state[name], other[name])] == []
    assert recorder.curve == other_recorder.curve
    assert (recorder.reports[0].error_before, recorder.reports[0].error_after) == (
        other_recorder.reports[0].error_before,
        other_recorder.reports[0].error_after,
    )


def test_a_damaged_checkpoint_is_named_and_left_out(
    uninterrupted: tuple[QuantizedNetwork, Recorder],
    tiny_unet: nn.Module,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    child = multiprocessing.get_context("fork").Process(target=trained, args=(tiny_unet, tmp_path, Recorder(4)))
    child.start()
    child.join()
    (good,) = tmp_path.glob("*.ckpt")
    content = bytearray(good.read_bytes())
    (tmp_path / "000000004.ckpt").write_bytes(content[: len(content) // 2])  # a full disk
    content[len(content) // 2] ^= 1
    (tmp_path / "000000005.ckpt").write_bytes(content)  # a bit that has turned
    (tmp_path / "000000006.ckpt").write_bytes(b"")
    assert last_checkpoint(tmp_path) == good
    assert [record.args[0].name for record in caplog.records] == [f"00000000{n}.ckpt" for n in (6, 5, 4)]  # type: ignore
    model, _ = trained(tiny_unet, tmp_path, Recorder()), uninterrupted
    state, other = model.state_dict(), uninterrupted[0].state_dict()
    assert [name for name in state if not torch.equal(state[name], other[name])] == []


def test_a_checkpoint_that_cannot_be_written_whole_leaves_the_older_one(tmp_path: Path) -> None:
    (tmp_path / "000000001.ckpt").write_bytes(b"older")
    unwritable = {"tensor": torch.zeros(10), "function": lambda: None}  # which pickle refuses half-way
    with pytest.raises(Exception, match="pickle"):
        AtomicCheckpointIO().save_checkpoint(unwritable, tmp_path / "000000002.ckpt")
    assert [path.name for path in tmp_path.iterdir()] == ["000000001.ckpt"]


def test_what_is_kept_is_the_average_of_what_was_trained_and_nothing_is_left_elsewhere(
    tiny_unet: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    means: list[torch.Tensor] = []
    modes: set[bool] = set()
    iterate, loss = QuantizationAwareTraining.iterate, QuantizationAwareTraining.loss

    def noted(module: QuantizationAwareTraining, *args: Any) -> None:
        means[:] = means or [p.detach().clone() for p in module.trained]
        iterate(module, *args)
        past = min(0.9, (1 + module.iteration) / (10 + module.iteration))
        pairs = zip(means, module.trained, strict=True)
        means[:] = [past * mean + (1 - past) * p.detach() for mean, p in pairs]
        lasts[:] = [p.detach().clone() for p in module.trained]

    def watched_loss(module: QuantizationAwareTraining, *args: Any) -> torch.Tensor:
        modes.add(module.model.training)
        return loss(module, *args)

    lasts: list[torch.Tensor] = []
    monkeypatch.setattr(QuantizationAwareTraining, "iterate", noted)
    monkeypatch.setattr(QuantizationAwareTraining, "loss", watched_loss)
    model = trained(tiny_unet, tmp_path / "checkpoints", Recorder())
    kept = {id(p): p for group in trainable(model) for p in group}.values()
    assert len(kept) == len(means)
    for ours, mean in zip(kept, means, strict=True):
        torch.testing.assert_close(ours, mean, rtol=1e-5, atol=1e-7)
    assert any(not torch.allclose(ours, last, rtol=1e-4, atol=1e-6) for ours, last in zip(kept, lasts, strict=True))
    assert modes == {True}  # dropout and noise act
    assert list((tmp_path / "here").iterdir()) == []
