"""Unit checkpoints: a file for each unit that has been learned, with its report and loss curve."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from tfmq_exp.core.files import intact, write_checked, write_json
from tfmq_exp.core.tensor_file import read_tensor_file, write_tensor_file
from tfmq_exp.pipeline.store import Entry
from tfmq_exp.quant.layers import QuantizedWeight
from tfmq_exp.quant.spec import QParams, QuantSpec
from tfmq_exp.reconstruction.context import UnitReport, UnitResult

CURVE_POINTS = 100  # kept of a loss curve; the first iteration may add one
PARTS = ("codes", "scale", "zero_point")
Write = Callable[[Path, Callable[[Path], object]], None]


@dataclasses.dataclass
class LossCurve:
    """Loss of a unit over its iterations, thinned. `phase` has a number where the units are learned more than once."""

    phase: str
    unit: str
    points: list[tuple[int, float]] = dataclasses.field(default_factory=list)

    def add(self, number: int, of: int, loss: float) -> bool:
        """Keep the first point, and the first one in each hundredth of the iterations; returns whether it was kept."""
        keep = not self.points or number * CURVE_POINTS // of > self.points[-1][0] * CURVE_POINTS // of
        if keep:
            self.points.append((number, loss))
        return keep

    def rows(self) -> list[dict[str, Any]]:
        """A row for each point."""
        names = {"phase": self.phase, "unit": self.unit}
        return [{**names, "iteration": iteration, "loss": loss} for iteration, loss in self.points]


def save_result(path: Path, result: UnitResult, note: Mapping[str, Any], write: Write = write_checked) -> None:
    """Write the result of a unit as safetensors.

    Args:
        path: of the file.
        result: integer weights by layer, and activation state by name.
        note: plain data, written as JSON into the header.
        write: calls its second argument with a temporary path and moves the file to its first.
    """
    tensors = {f"activations/{name}": value.cpu().clone() for name, value in result.activations.items()}
    for layer, parts in result.integers.items():
        for i, (codes, (scale, zero_point), _) in enumerate(parts):
            for part, value in zip(PARTS, (codes, scale, zero_point), strict=True):
                tensors[f"weights/{layer}/{i}/{part}"] = value.cpu().contiguous()
    specs = {layer: [dataclasses.asdict(part.spec) for part in parts] for layer, parts in result.integers.items()}
    write(path, lambda target: write_tensor_file(target, tensors, {"specs": specs, "note": note}))


def load_result(path: Path) -> tuple[UnitResult, dict[str, Any]]:
    """Result and note from a file of `save_result`.

    Raises:
        ValueError: a damaged file.
    """
    try:
        header, tensors = read_tensor_file(path)
        integers: dict[str, tuple[QuantizedWeight, ...]] = {}
        for layer, specs in header["specs"].items():
            values = [[tensors[f"weights/{layer}/{i}/{part}"] for part in PARTS] for i in range(len(specs))]
            integers[layer] = tuple(
                QuantizedWeight(codes, QParams(scale, zero_point), QuantSpec(**spec))
                for (codes, scale, zero_point), spec in zip(values, specs, strict=True)
            )
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}; delete it to have it made again") from error
    prefix = "activations/"
    activations = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
    return UnitResult(integers, activations), header["note"]


class FileUnitCheckpointer:
    """Writes every learned unit to a file, so that a killed run goes on after the last one.

    Args:
        folder: of the files.
        curves: loss curves of this process, by unit; each is written with its unit.
        write: writes a file.
    """

    def __init__(self, folder: Path, curves: Mapping[str, LossCurve], write: Write = write_checked) -> None:
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
        curve = self.curves.get(unit)
        note = {**dataclasses.asdict(report), "curve": dataclasses.asdict(curve) if curve else None}
        save_result(self.path(unit), learned, note, self.write)

    def write_reports(self, folder: Path) -> None:
        """Write the reports of all units as `units.json` and their loss curves as `losses.json`, in the order of learning."""
        files = sorted(self.folder.rglob("*.safetensors"), key=lambda path: path.stat().st_mtime_ns)
        columns, notes = [field.name for field in dataclasses.fields(UnitReport)], [load_result(p)[1] for p in files]
        curves = [LossCurve(**note["curve"]) for note in notes if note.get("curve")]
        write_json(folder / "units.json", [{column: note[column] for column in columns} for note in notes])
        write_json(folder / "losses.json", [row for curve in curves for row in curve.rows()])


def unit_reports(entries: Iterable[Entry], name: str) -> list[dict[str, Any]]:
    """Rows of `units.json` or `losses.json` of some entries with the phase; none where nothing was learned."""
    rows: list[dict[str, Any]] = []
    for entry in entries:
        if entry.done and name in entry.manifest["files"]:
            entry.verify(name)
            found = json.loads((entry.path / name).read_text(encoding="utf-8"))
            rows += ({"phase": entry.stage, **row} for row in found)
    return rows
