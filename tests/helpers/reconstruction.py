"""What reconstruction tests share: checkpoints in memory, a recording progress callback, and small configurations."""

from collections import Counter

import torch
from torch import nn

from tests.conftest import example_inputs
from tfmq_exp.calibration.dataset import CalibrationSet
from tfmq_exp.denoisers.read_structure import read_structure
from tfmq_exp.denoisers.structure import NetworkStructure
from tfmq_exp.reconstruction.context import ComputeConfig, ReconstructionContext, UnitReport, UnitResult, quiet_trainer
from tfmq_exp.reconstruction.module import LearnRounding, LearnScales, ReconstructionConfig
from tfmq_exp.reconstruction.objectives import Annealing, Lp, Objective
from tfmq_exp.reconstruction.units import FloatInputs, UnitInputs
from tfmq_exp.surgery.quantized_network import QuantizedNetwork

CPU = torch.device("cpu")
ROUNDING = LearnRounding(3e-2, 0.01, Annealing(0.2, 20.0, 2.0))


class MemoryCheckpointer:
    """Keeps finished units in memory; passes over the same units have their own."""

    def __init__(self, results: dict[str, UnitResult] | None = None) -> None:
        self.results: dict[str, UnitResult] = dict(results or {})
        self.reports: dict[str, UnitReport] = {}
        self.scopes: dict[str, MemoryCheckpointer] = {}

    def get(self, unit: str) -> UnitResult | None:
        return self.results.get(unit)

    def put(self, unit: str, learned: UnitResult, report: UnitReport) -> None:
        self.results[unit], self.reports[unit] = learned, report

    def scoped(self, name: str) -> "MemoryCheckpointer":
        return self.scopes.setdefault(name, MemoryCheckpointer())


class Interruption(Exception):  # noqa: N818 - nothing is wrong
    """Stands for a kill."""


class RecordedProgress:
    """Records its calls; interrupts after so many new units."""

    def __init__(self, interrupt_after: int | None = None) -> None:
        self.limit = interrupt_after
        self.expected: list[int] = []
        self.new: list[str] = []
        self.restored: list[str] = []
        self.iterations: Counter[str] = Counter()

    def on_start(self, units: int) -> None:
        self.expected.append(units)

    def on_progress(self, name: str, done: int, total: int) -> None:
        assert 1 <= done <= total

    def on_iteration_end(self, unit: str, iteration: int, iterations: int, loss: float) -> None:
        assert 1 <= iteration <= iterations
        self.iterations[unit] += 1

    def on_unit_end(self, unit: str, report: UnitReport | None) -> None:
        (self.restored if report is None else self.new).append(unit)
        if len(self.new) == self.limit:
            raise Interruption


def compute(cache_bytes: int = 2**30) -> ComputeConfig:
    return ComputeConfig(batch=16, cache_bytes=cache_bytes, trainer=quiet_trainer(CPU))


def structure(network: nn.Module) -> NetworkStructure:
    return read_structure(network, example_inputs(network))


def context(
    model: QuantizedNetwork,
    network: nn.Module,
    data: CalibrationSet,
    checkpointer: MemoryCheckpointer | None = None,
    progress: RecordedProgress | None = None,
    cache_bytes: int = 2**30,
) -> ReconstructionContext:
    """Everything that a phase takes."""
    checkpointer, progress = checkpointer or MemoryCheckpointer(), progress or RecordedProgress()
    return ReconstructionContext(
        model, network, structure(network), data, compute(cache_bytes), 0, checkpointer, progress
    )


def config(
    iterations: int,
    *,
    rate: float | None = 2e-2,
    rounding: LearnRounding | None = None,
    objective: Objective = Lp(2.4),  # noqa: B008
    inputs: UnitInputs = FloatInputs(),  # noqa: B008
) -> ReconstructionConfig:
    """Learns scales with this learning rate, rounding, or both."""
    return ReconstructionConfig(iterations, 8, objective, inputs, rounding, LearnScales(rate) if rate else None)
