"""Saved pipelines of the goldens, and how they were called."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

GOLDENS = Path(__file__).parents[1] / "goldens/transformers/pipelines"
INDEX: dict[str, dict[str, Any]] = json.loads((GOLDENS / "index.json").read_text())
NAMES = tuple(INDEX)


def call_of(name: str) -> tuple[list[Any], dict[str, Any]]:
    """Prompts or classes of a recorded call, and its settings."""
    call = {key: value for key, value in INDEX[name]["call"].items() if key != "output_type"}
    return call.pop("prompt", None) or call.pop("class_labels"), call


def recorded(name: str) -> dict[str, Tensor]:
    return load_file(GOLDENS / f"{name}.io.safetensors")


def copied(name: str, place: Path) -> Path:
    """A copy of a pipeline's folder, to be changed."""
    return Path(shutil.copytree(GOLDENS / name, place / name))


def edit(file: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change what a JSON file holds."""
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
