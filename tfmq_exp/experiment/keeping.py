"""What is kept of unfinished work: learned units, and the weights of a whole model as integers."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from tfmq_exp.experiment.progress import Advance
from tfmq_exp.experiment.store import write_atomically
from tfmq_exp.experiment.tracking import Mirror
from tfmq_exp.quant.layers import QuantizedWeight
from tfmq_exp.quant.spec import QParams, QuantSpec
from tfmq_exp.reconstruction.report import Learned, UnitReport


def save_learned(path: Path, learned: Learned, note: Mapping[str, Any]) -> None:
    """Integers by site and activation state by name, with a note; the file appears whole or not at all."""
    tensors = {f"activations/{name}": value.cpu().clone() for name, value in learned.activations.items()}
    for site, parts in learned.integers.items():
        for i, (codes, (scale, zero_point), _) in enumerate(parts):
            for what, value in (("codes", codes), ("scale", scale), ("zero_point", zero_point)):
                tensors[f"weights/{site}/{i}/{what}"] = value.cpu().contiguous()
    specs = {site: [dataclasses.asdict(part.spec) for part in parts] for site, parts in learned.integers.items()}
    metadata = {"header": json.dumps({"specs": specs, "note": note}, sort_keys=True)}
    write_atomically(path, lambda p: save_file(tensors, p, metadata))


def load_learned(path: Path) -> tuple[Learned, dict[str, Any]]:
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
    return Learned(integers, activations), header["note"]


class UnitFiles:
    """Keeps every finished unit as a file of a folder, so that a killed run goes on after the last one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)

    def part(self, name: str) -> "UnitFiles":
        """A folder of its own for work that goes over the same units again."""
        return UnitFiles(self.folder / name)

    def path(self, unit: str) -> Path:
        """Where a unit is."""
        return self.folder / f"{unit}.safetensors"

    def get(self, unit: str) -> Learned | None:
        """What a finished unit has learned."""
        return load_learned(self.path(unit))[0] if self.path(unit).is_file() else None

    def put(self, unit: str, learned: Learned, report: UnitReport) -> None:
        """Keep a unit, with what was measured while it was learned."""
        save_learned(self.path(unit), learned, dataclasses.asdict(report))

    def reports(self) -> list[dict[str, Any]]:
        """What was measured, unit by unit, in the order in which they were learned."""
        columns = [field.name for field in dataclasses.fields(UnitReport)]
        files = sorted(self.folder.rglob("*.safetensors"), key=lambda path: path.stat().st_mtime_ns)
        return [{column: note[column] for column in columns} for note in (load_learned(path)[1] for path in files)]


class UnitProgress:
    """Shows a phase of a method on a progress bar and mirrors its loss curves: one for each unit, phase and time around."""

    def __init__(self, advance: Advance, mirror: Mirror, phase: str) -> None:
        self.advance, self.mirror, self.phase = advance, mirror, phase
        self.finished_units, self.total, self.rounds = 0, 0, 0

    def start(self, units: int) -> None:
        """The bar counts units; it is given as a share of one. A second start goes over them again."""
        self.finished_units, self.total = 0, units
        self.rounds += 1

    def progress(self, what: str, number: int, of: int) -> None:
        """During work that has no units and no loss."""
        self.advance(number / of, what)

    def iteration(self, unit: str, number: int, of: int, loss: float) -> None:
        """Within a unit."""
        self.advance((self.finished_units + number / of) / self.total, f"{unit}  loss {loss:.2e}")
        again = f" {self.rounds}" if self.rounds > 1 else ""
        self.mirror.loss(f"{self.phase}{again}/{unit}", number, loss)

    def finished(self, unit: str, report: UnitReport | None) -> None:
        """After a unit."""
        self.finished_units += 1
        note = "kept from before" if report is None else f"{report.error_before:.2e} → {report.error_after:.2e}"
        self.advance(self.finished_units / self.total, f"{unit}  {note}")
