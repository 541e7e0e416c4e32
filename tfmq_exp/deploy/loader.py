"""Run an exported model: this file, numpy and openvino are all that it takes; copy it to where the model goes.

unet = Deployed(Path("exported"))
noise = unet(x, 981)                    # numpy arrays: x of shape [batch, channels, height, width]
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov

FORMAT = "tfmq_exp.deployed"
POINTER = b"version https://git-lfs"


def settings(threads: int | None, precision: str) -> dict[str, str]:
    """How the CPU plugin compiles: its defaults would compute the float part in bfloat16, and quantize more by itself.

    Args:
        threads: None leaves them to OpenVINO.
        precision: of what is not in integers: f32 or bf16.

    Raises:
        ValueError: another precision.
    """
    if precision not in ("f32", "bf16"):
        raise ValueError(f"the float part is computed in f32 or bf16, got {precision!r}")
    found = {
        "INFERENCE_PRECISION_HINT": precision,
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
        "PERFORMANCE_HINT": "LATENCY",
    }
    return found | ({"INFERENCE_NUM_THREADS": str(threads)} if threads else {})


def check_file(path: Path) -> Path:
    """A file of an exported model; ValueError if it is not there, or a pointer to it."""
    if not path.is_file():
        raise ValueError(f"{path.parent} holds no exported model: there is no {path.name}")
    with path.open("rb") as file:
        if file.read(len(POINTER)) == POINTER:
            raise ValueError(f"{path} is a pointer of Git LFS: fetch the file with `git lfs pull`")
    return path


def read_manifest(folder: Path) -> dict[str, Any]:
    """What an exported model says about itself.

    Raises:
        ValueError: a folder without such a model, or something else in the place of the file.
    """
    path = check_file(folder / "deployed.json")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else None
        raise ValueError(f"{path} is of format {found!r}, this program reads {FORMAT!r}")
    steps = manifest.get("timesteps")
    if not isinstance(steps, list) or not steps or not all(type(t) is int and t >= 0 for t in steps):
        raise ValueError(f"{path} is damaged: its timesteps must be whole numbers, got {str(steps)[:50]}")
    return manifest


class Deployed:
    """(sample, timestep, conditions) -> noise.

    Args:
        folder: with `model.xml`, `model.bin` and `deployed.json`.
        batch: rows that the model is compiled for; fewer are filled up, more go through in parts.
        threads: None leaves them to OpenVINO.
        precision: of what is not in integers, f32 or bf16.

    Raises:
        ValueError: a folder without such a model.
    """

    def __init__(self, folder: Path, *, batch: int = 1, threads: int | None = None, precision: str = "f32") -> None:
        self.manifest = read_manifest(folder)
        self.batch = batch
        self.timesteps = tuple(self.manifest["timesteps"])
        core = ov.Core()
        check_file(folder / "model.bin")
        try:
            model = core.read_model(check_file(folder / "model.xml"))
        except RuntimeError as error:
            reason = " ".join(str(error).split())[-200:]
            raise ValueError(f"{folder}: model.xml or model.bin is damaged: {reason}") from error
        shapes = {port: list(port.get_partial_shape()) for port in model.inputs}
        self.inputs = sorted(port.any_name for port in model.inputs if port.any_name != "step")
        model.reshape({port: [batch, *shape[1:]] if shape else [] for port, shape in shapes.items()})
        self.compiled = core.compile_model(model, "CPU", settings(threads, precision))
        self.request = self.compiled.create_infer_request()

    def step_of(self, timestep: int) -> int:
        """The index of a timestep among those of the sampler; ValueError for another."""
        if timestep not in self.timesteps:
            ends = f"{min(self.timesteps)} .. {max(self.timesteps)}"
            raise ValueError(f"timestep {timestep} is none of the {len(self.timesteps)} exported ones ({ends})")
        return self.timesteps.index(timestep)

    def __call__(self, sample: np.ndarray, timestep: int, **conditions: np.ndarray) -> np.ndarray:
        """Noise of shape [batch, channels, height, width]; all rows are at one timestep.

        Raises:
            ValueError: another timestep, or other conditions than the model takes.
        """
        step = np.array(self.step_of(timestep))
        inputs = {"sample": sample, **conditions}
        if sorted(inputs) != self.inputs:
            raise ValueError(f"the model takes {', '.join(self.inputs)}; it was given {', '.join(sorted(inputs))}")
        parts = [slice(start, start + self.batch) for start in range(0, len(sample), self.batch)]
        return np.concatenate(
            [self.part({name: value[rows] for name, value in inputs.items()}, step) for rows in parts]
        )

    def part(self, inputs: Mapping[str, np.ndarray], step: np.ndarray) -> np.ndarray:
        """At most `batch` rows. The first row fills up what is missing, so that ranges over all rows stay what they are."""
        rows = len(inputs["sample"])
        given: dict[str, Any] = {"step": step}
        for name, value in inputs.items():
            missing = [value[:1]] * (self.batch - rows)
            given[name] = np.ascontiguousarray(np.concatenate([value, *missing]), dtype=np.float32)
        return self.request.infer(given)[0][:rows].copy()
