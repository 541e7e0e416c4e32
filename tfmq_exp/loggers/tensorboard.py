"""TensorBoard."""

import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image

from tfmq_exp.loggers.base import Logger, Points, Rows, RunMetadata


class TensorBoard(Logger):
    """Event files under `<run folder>/<folder>`; `tensorboard --logdir outputs` shows all runs.

    The choices of the configuration and the final numbers make a row of the page HPARAMS.
    """

    def __init__(self, folder: str = "tensorboard") -> None:
        self.folder = folder
        self.numbers: dict[str, float] = {}

    def open(self, run: RunMetadata) -> "TensorBoard":
        """Start the event file. An earlier one of the same run is removed: a resumed run writes all of it again.

        Raises:
            RuntimeError: TensorBoard is not installed.
        """
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise RuntimeError("logger=tensorboard needs TensorBoard: pip install '.[tensorboard]'") from error
        shutil.rmtree(run.folder / self.folder, ignore_errors=True)
        self.writer: Any = SummaryWriter(str(run.folder / self.folder))
        self.writer.add_text("config", f"```yaml\n{yaml.safe_dump(dict(run.settings), sort_keys=False)}```")
        self.choices = {**run.choices, "seed": run.settings.get("seed", 0)}
        return self

    def log_loss(self, unit: str, iteration: int, value: float) -> None:
        self.writer.add_scalar(f"loss/{unit}", value, iteration)

    def log_curve(self, name: str, axis: str, points: Points) -> None:
        for place, values in points:  # which is the event's step
            for key, value in values.items():
                self.writer.add_scalar(f"{name}/{key}", value, place)

    def log_table(self, name: str, rows: Rows) -> None:
        if rows:
            lines = [rows[0].keys(), ["---"] * len(rows[0]), *(row.values() for row in rows)]
            self.writer.add_text(f"tables/{name}", "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines))

    def log_image(self, name: str, path: Path) -> None:
        with Image.open(path) as image:
            self.writer.add_image(f"images/{name}", np.asarray(image.convert("RGB")), dataformats="HWC")

    def log_summary(self, values: Mapping[str, Any]) -> None:
        """Numbers become scalars at step 0; other values are in the run folder only."""
        numbers = {key: float(value) for key, value in values.items() if isinstance(value, int | float)}
        self.numbers |= numbers
        for key, value in numbers.items():
            self.writer.add_scalar(key, value, 0)

    def close(self, *, failed: bool) -> None:
        from torch.utils.tensorboard.summary import hparams

        for part in hparams(self.choices, self.numbers):
            self.writer.file_writer.add_summary(part)
        self.writer.add_text("status", "failed" if failed else "finished")
        self.writer.close()

    def locations(self) -> list[str]:
        return [f"TensorBoard: tensorboard --logdir {shlex.quote(str(self.writer.log_dir))}"]
