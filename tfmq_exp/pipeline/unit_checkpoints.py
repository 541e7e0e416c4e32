"""A learning phase: a file for each unit that has been learned, with its report and loss curve, and the progress shown."""

import dataclasses
import json
from collections import ChainMap
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from tfmq_exp.core.files import intact, write_checked, write_json
from tfmq_exp.core.finite import naming_rates
from tfmq_exp.core.tensor_file import TensorFile, read_header, read_tensor_file, write_tensor_file
from tfmq_exp.loggers.base import Logger
from tfmq_exp.pipeline.pipeline import Advance, Pipeline
from tfmq_exp.pipeline.store import Entry
from tfmq_exp.quant.layers import QuantizedWeight
from tfmq_exp.quant.spec import QParams, QuantSpec
from tfmq_exp.reconstruction.context import UnitReport, UnitResult

CURVE_POINTS = 100  # kept of a loss curve; the first iteration may add one
LOSSES = ("phase", "unit", "iteration", "loss")  # columns
PARTS = ("codes", "scale", "zero_point")
Row = dict[str, Any]
Write = Callable[[Path, Callable[[Path], object]], None]


def add_point(curve: list[Row], point: Row, of: int) -> bool:
    """Add the loss of one of so many iterations to a curve: the first, and the first in each hundredth; was it added?"""
    part = point["iteration"] * CURVE_POINTS // of
    kept = not curve or part > curve[-1]["iteration"] * CURVE_POINTS // of
    if kept:
        curve.append(point)
    return kept


def save_result(path: Path, result: UnitResult, note: Mapping[str, Any], write: Write = write_checked) -> None:
    """Write the result of a unit as safetensors, with plain data as a note in the header.

    `write` calls its second argument with a temporary path and moves the file to its first.
    """
    tensors = {f"activations/{name}": value.cpu().clone() for name, value in result.activations.items()}
    for layer, parts in result.integers.items():
        for i, (codes, qparams, _) in enumerate(parts):
            for part, value in zip(PARTS, (codes, *qparams), strict=True):
                tensors[f"weights/{layer}/{i}/{part}"] = value.cpu().contiguous()
    specs = {layer: [dataclasses.asdict(part.spec) for part in parts] for layer, parts in result.integers.items()}
    write(path, lambda target: write_tensor_file(target, tensors, {"specs": specs, "note": note}))


def stored_integers(
    specs: Mapping[str, Sequence[Mapping[str, Any]]], tensors: Mapping[str, Tensor]
) -> dict[str, tuple[QuantizedWeight, ...]]:
    """Integer weights by layer, from their specs and the tensors of a file."""

    def weight(name: str, spec: Mapping[str, Any]) -> QuantizedWeight:
        codes, scale, zero_point = (tensors[f"weights/{name}/{part}"] for part in PARTS)
        return QuantizedWeight(codes, QParams(scale, zero_point), QuantSpec(**spec))

    return {
        layer: tuple(weight(f"{layer}/{i}", spec) for i, spec in enumerate(parts)) for layer, parts in specs.items()
    }


def load_result(path: Path) -> tuple[UnitResult, dict[str, Any]]:
    """Result and note from a file of `save_result`; ValueError for a damaged one."""
    header, tensors = read_tensor_file(path)

    integers = stored_integers(header["specs"], tensors)
    prefix = "activations/"
    activations = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
    return UnitResult(integers, activations), header["note"]


def join_results(files: Iterable[Path], path: Path) -> None:
    """Write the integers of several results as one file, tensor by tensor."""
    opened = [TensorFile(file) for file in files]
    specs = {layer: spec for file in opened for layer, spec in file.header["specs"].items()}
    write_tensor_file(path, ChainMap(*opened), {"specs": specs, "note": {}})  # type: ignore[arg-type]


@dataclasses.dataclass(frozen=True)
class CheckpointedIntegers:
    """Integer weights in the unit checkpoints of a folder, of which only the layers that are asked for are read."""

    folder: Path

    def layers(self) -> frozenset[str]:
        """Names of the layers that have integers there."""
        return frozenset(layer for path in self.files() for layer in read_header(path)["specs"])

    def read(self, layers: Collection[str]) -> dict[str, tuple[QuantizedWeight, ...]]:
        """Integers of those of some layers that have any; ValueError for a damaged file."""
        found: dict[str, tuple[QuantizedWeight, ...]] = {}
        for path in self.files():
            specs = {layer: spec for layer, spec in read_header(path)["specs"].items() if layer in layers}
            prefixes = tuple(f"weights/{layer}/" for layer in specs)
            if specs:
                _, tensors = read_tensor_file(path, lambda name, prefixes=prefixes: name.startswith(prefixes))
                found |= stored_integers(specs, tensors)
        return found

    def files(self) -> list[Path]:
        """Files of finished units."""
        return sorted(self.folder.glob("*.safetensors"))


class FileUnitCheckpointer:
    """Writes every learned unit to a file in a folder, so that a killed run goes on after the last one.

    Each is written with its loss curve, of those of this process by unit.
    """

    def __init__(self, folder: Path, curves: Mapping[str, list[Row]], write: Write = write_checked) -> None:
        self.folder, self.curves, self.write = folder, curves, write
        folder.mkdir(exist_ok=True)

    def scoped(self, name: str) -> "FileUnitCheckpointer":
        """Checkpoints of another pass over the same units, in a subfolder."""
        return FileUnitCheckpointer(self.folder / name, self.curves, self.write)

    def path(self, unit: str) -> Path:
        """File of a unit."""
        return self.folder / f"{unit}.safetensors"

    def get(self, unit: str) -> UnitResult | None:
        """Result of a learned unit; None where its file is missing or not what was written."""
        return load_result(self.path(unit))[0] if intact(self.path(unit)) else None

    def put(self, unit: str, learned: UnitResult, report: UnitReport) -> None:
        """Write a unit with its report and its loss curve."""
        note = {**dataclasses.asdict(report), "curve": self.curves.get(unit, [])}
        save_result(self.path(unit), learned, note, self.write)

    def write_reports(self, folder: Path) -> None:
        """Write the reports of all units as `units.json` and their loss curves as `losses.json`, in the order of learning."""
        files = sorted(self.folder.rglob("*.safetensors"), key=lambda path: path.stat().st_mtime_ns)
        notes = [load_result(path)[1] for path in files]
        losses = [{column: row[column] for column in LOSSES} for note in notes for row in note.pop("curve")]
        write_json(folder / "units.json", [dataclasses.asdict(UnitReport(**note)) for note in notes])
        write_json(folder / "losses.json", losses)


def finished_units(folder: Path) -> int:
    """Number of units in the folder of a stage."""
    return len(list(folder.glob("units/*.safetensors")))


def unit_reports(entries: Iterable[Entry], name: str) -> list[Row]:
    """Rows of `units.json` or `losses.json` of some entries with the phase; none where nothing was learned."""
    rows: list[Row] = []
    for entry in entries:
        if entry.done and name in entry.manifest["files"]:
            entry.verify(name)
            found = json.loads((entry.path / name).read_text(encoding="utf-8"))
            rows += ({"phase": entry.stage, **row} for row in found)
    return rows


class LoggingCallback:
    """Shows a phase on a progress bar and its loss curves, one for each unit and pass over the units, in a logger.

    `shown` names the curves that the logger has got; `curves` are those of the present pass, by unit.
    """

    def __init__(self, advance: Advance, logger: Logger, phase: str) -> None:
        self.advance, self.logger, self.phase = advance, logger, phase
        self.finished_units, self.total, self.passes = 0, 0, 0
        self.curves: dict[str, list[Row]] = {}
        self.shown: set[str] = set()

    def on_start(self, units: int) -> None:
        """Begin a pass over so many units."""
        self.finished_units, self.total = 0, units
        self.passes += 1
        self.curves.clear()

    def on_progress(self, name: str, done: int, total: int) -> None:
        """Show work that has no units and no loss."""
        self.advance(done / total, name)

    def on_iteration_end(self, unit: str, iteration: int, iterations: int, loss: float) -> None:
        """Show the loss of iteration `iteration` of `iterations`, from 1, without the rounding penalty."""
        self.advance((self.finished_units + iteration / iterations) / self.total, f"{unit}  loss {loss:.2e}")
        phase = f"{self.phase} {self.passes}" if self.passes > 1 else self.phase
        point = {"phase": phase, "unit": unit, "iteration": iteration, "loss": loss}
        if add_point(self.curves.setdefault(unit, []), point, iterations):
            self.shown.add(f"{phase}/{unit}")
            self.logger.log_loss(f"{phase}/{unit}", iteration, loss)

    def on_unit_end(self, unit: str, report: UnitReport | None) -> None:
        """Show the errors of a unit; no report: it was learned by an earlier attempt."""
        self.finished_units += 1
        note = "kept from before" if report is None else f"{report.error_before:.2e} → {report.error_after:.2e}"
        self.advance(self.finished_units / self.total, f"{unit}  {note}")


@contextmanager
def learning(
    pipeline: Pipeline, phase: str, folder: Path, title: str = ""
) -> Iterator[tuple[FileUnitCheckpointer, LoggingCallback]]:
    """Unit checkpoints and progress callback of a phase; `units.json` and `losses.json` are written afterwards.

    `phase` is `weights` or `activations`, the part of the method that errors name; `title` that of the bar, if another.
    """
    with pipeline.progress(title or phase, 1) as advance:
        callback = LoggingCallback(advance, pipeline.logger, phase)
        units = FileUnitCheckpointer(folder / "units", callback.curves, pipeline.store.write)
        with naming_rates(f"method.{phase}"):
            yield units, callback
    pipeline.shown_losses |= callback.shown
    if pipeline.group.is_main:
        units.write_reports(folder)
