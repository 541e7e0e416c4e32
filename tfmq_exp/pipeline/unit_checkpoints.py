"""What is kept of unfinished work: learned units, and the weights of a whole model as integers."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from tfmq_exp.core.files import intact, write_checked, write_json
from tfmq_exp.loggers.base import Logger
from tfmq_exp.pipeline.progress import Advance
from tfmq_exp.pipeline.store import Entry
from tfmq_exp.quant.layers import QuantizedWeight
from tfmq_exp.quant.spec import QParams, QuantSpec
from tfmq_exp.reconstruction.callbacks import UnitReport, UnitResult

POINTS = 100  # of a loss curve that is kept; one more where its first stands before the first hundredth


@dataclasses.dataclass
class LossCurve:
    """A unit's loss over its iterations, thinned; `phase` also says which time around where units are gone over again."""

    phase: str
    unit: str
    points: list[tuple[int, float]] = dataclasses.field(default_factory=list)

    def add(self, number: int, of: int, loss: float) -> bool:
        """Whether this point is kept: the first one, and the first in each hundredth of the iterations."""
        keep = not self.points or number * POINTS // of > self.points[-1][0] * POINTS // of
        if keep:
            self.points.append((number, loss))
        return keep

    def rows(self) -> list[dict[str, Any]]:
        """One row for each point."""
        names = {"phase": self.phase, "unit": self.unit}
        return [{**names, "iteration": iteration, "loss": loss} for iteration, loss in self.points]


Write = Callable[[Path, Callable[[Path], object]], None]


def save_learned(path: Path, learned: UnitResult, note: Mapping[str, Any], write: Write = write_checked) -> None:
    """Integers by site and activation state by name, with a note; the file appears whole or not at all."""
    tensors = {f"activations/{name}": value.cpu().clone() for name, value in learned.activations.items()}
    for site, parts in learned.integers.items():
        for i, (codes, (scale, zero_point), _) in enumerate(parts):
            for what, value in (("codes", codes), ("scale", scale), ("zero_point", zero_point)):
                tensors[f"weights/{site}/{i}/{what}"] = value.cpu().contiguous()
    specs = {site: [dataclasses.asdict(part.spec) for part in parts] for site, parts in learned.integers.items()}
    metadata = {"header": json.dumps({"specs": specs, "note": note}, sort_keys=True)}
    write(path, lambda p: save_file(tensors, p, metadata))


def load_learned(path: Path) -> tuple[UnitResult, dict[str, Any]]:
    """What `save_learned` wrote.

    Raises:
        ValueError: a damaged file.
    """
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads(file.metadata()["header"])
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118

        def part(name: str, spec: Mapping[str, Any]) -> QuantizedWeight:
            codes, scale, zero_point = (tensors[f"{name}/{what}"] for what in ("codes", "scale", "zero_point"))
            return QuantizedWeight(codes, QParams(scale, zero_point), QuantSpec(**spec))

        integers = {
            site: tuple(part(f"weights/{site}/{i}", spec) for i, spec in enumerate(specs))
            for site, specs in header["specs"].items()
        }
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged: {error}; delete it to have it made again") from error
    prefix = "activations/"
    activations = {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}
    return UnitResult(integers, activations), header["note"]


class FileUnitCheckpointer:
    """Keeps every finished unit as a file of a folder, so that a killed run goes on after the last one.

    `curves` are the loss curves of this process, by unit; a unit's is kept with it.
    """

    def __init__(self, folder: Path, curves: Mapping[str, LossCurve], write: Write = write_checked) -> None:
        self.folder, self.curves, self.write = folder, curves, write
        folder.mkdir(exist_ok=True)

    def part(self, name: str) -> "FileUnitCheckpointer":
        """A folder of its own for work that goes over the same units again."""
        return FileUnitCheckpointer(self.folder / name, self.curves, self.write)

    def path(self, unit: str) -> Path:
        """Where a unit is."""
        return self.folder / f"{unit}.safetensors"

    def get(self, unit: str) -> UnitResult | None:
        """What a finished unit has learned; None where its file is not what was written, too."""
        return load_learned(self.path(unit))[0] if intact(self.path(unit)) else None

    def put(self, unit: str, learned: UnitResult, report: UnitReport) -> None:
        """Keep a unit, with what was measured while it was learned."""
        curve = self.curves.get(unit)
        note = {**dataclasses.asdict(report), "curve": dataclasses.asdict(curve) if curve else None}
        save_learned(self.path(unit), learned, note, self.write)

    def notes(self) -> list[dict[str, Any]]:
        """What was measured, unit by unit, in the order in which they were learned."""
        files = sorted(self.folder.rglob("*.safetensors"), key=lambda path: path.stat().st_mtime_ns)
        return [load_learned(path)[1] for path in files]

    def write_notes(self, folder: Path) -> None:
        """The reports of all units as `units.json`, their loss curves as `losses.json`."""
        columns, notes = [field.name for field in dataclasses.fields(UnitReport)], self.notes()
        curves = [LossCurve(**note["curve"]) for note in notes if note.get("curve")]
        write_json(folder / "units.json", [{column: note[column] for column in columns} for note in notes])
        write_json(folder / "losses.json", [row for curve in curves for row in curve.rows()])


def noted(entries: Iterable[Entry], name: str) -> list[dict[str, Any]]:
    """Rows of a file that learning leaves beside what was learned, phase by phase; none where nothing was learned."""
    rows: list[dict[str, Any]] = []
    for entry in entries:
        if entry.done and name in entry.noted["files"]:
            entry.verify(name)
            rows += (
                {"phase": entry.stage, **row} for row in json.loads((entry.path / name).read_text(encoding="utf-8"))
            )
    return rows


class LoggingCallback:
    """Shows a phase of a method on a progress bar, and its loss curves, one for each unit and time around, in a mirror.

    `shown` names the curves that the mirror has got; `curves` are those of the present time around, by unit.
    """

    def __init__(self, advance: Advance, mirror: Logger, phase: str) -> None:
        self.advance, self.mirror, self.phase = advance, mirror, phase
        self.finished_units, self.total, self.rounds = 0, 0, 0
        self.curves: dict[str, LossCurve] = {}
        self.shown: set[str] = set()

    def start(self, units: int) -> None:
        """The bar counts units; it is given as a share of one. A second start goes over them again."""
        self.finished_units, self.total = 0, units
        self.rounds += 1
        self.curves.clear()

    def progress(self, what: str, number: int, of: int) -> None:
        """During work that has no units and no loss."""
        self.advance(number / of, what)

    def iteration(self, unit: str, number: int, of: int, loss: float) -> None:
        """Within a unit."""
        self.advance((self.finished_units + number / of) / self.total, f"{unit}  loss {loss:.2e}")
        again = f" {self.rounds}" if self.rounds > 1 else ""
        curve = self.curves.setdefault(unit, LossCurve(f"{self.phase}{again}", unit))
        if curve.add(number, of, loss):
            self.shown.add(f"{curve.phase}/{unit}")
            self.mirror.loss(f"{curve.phase}/{unit}", number, loss)

    def finished(self, unit: str, report: UnitReport | None) -> None:
        """After a unit."""
        self.finished_units += 1
        note = "kept from before" if report is None else f"{report.error_before:.2e} → {report.error_after:.2e}"
        self.advance(self.finished_units / self.total, f"{unit}  {note}")
