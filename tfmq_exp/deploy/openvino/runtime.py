"""Runs an exported model with numpy and openvino alone; this file can be copied to where the model is deployed.

network = ExportedUNet(Path("exported"))
noise = network(x, 981)                    # numpy arrays: x of shape [batch, channels, height, width]
"""

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import openvino.opset13 as ops

FORMAT = "tfmq_exp.deployed"
TILE = 32  # numbers in bfloat16 that an AMX instruction sums
LFS_POINTER = b"version https://git-lfs"


def compile_settings(threads: int | None, precision: str) -> dict[str, str]:
    """Settings of the CPU plugin; by default it would compute floating point in bfloat16, and quantize more by itself.

    Args:
        threads: None leaves the number to OpenVINO.
        precision: of the floating-point part: f32 or bf16.

    Raises:
        ValueError: another precision.
    """
    if precision not in ("f32", "bf16"):
        raise ValueError(f"the float part is computed in f32 or bf16, got {precision!r}")
    settings = {
        "INFERENCE_PRECISION_HINT": precision,
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
        "PERFORMANCE_HINT": "LATENCY",
    }
    return settings | ({"INFERENCE_NUM_THREADS": str(threads)} if threads else {})


def check_file(path: Path) -> Path:
    """Return the path of a file of an exported model; ValueError if it is missing or a pointer of Git LFS."""
    if not path.is_file():
        raise ValueError(f"{path.parent} holds no exported model: there is no {path.name}")
    with path.open("rb") as file:
        if file.read(len(LFS_POINTER)) == LFS_POINTER:
            raise ValueError(f"{path} is a pointer of Git LFS: fetch the file with `git lfs pull`")
    return path


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest of an exported model.

    Raises:
        ValueError: a folder without such a model, or a damaged manifest.
    """
    path = check_file(folder / "deployed.json")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        raise ValueError(f"{path} is of format {found!r}, this program reads {FORMAT!r}")
    steps = manifest.get("timesteps")
    if not isinstance(steps, list) or not steps or not all(type(t) is int and t >= 0 for t in steps):
        raise ValueError(f"{path} is damaged: its timesteps must be whole numbers, got {str(steps)[:50]}")
    rows = manifest.get("attention", [])
    if not isinstance(rows, list) or not all(map(is_attention_row, rows)):
        raise ValueError(f"{path} is damaged: its attention must be rows of names and scores, got {str(rows)[:50]}")
    return manifest


def is_attention_row(row: Any) -> bool:
    """Whether a value of the manifest has an attention, and the precision of its scores in bfloat16, None for float32."""
    named = isinstance(row, dict) and isinstance(row.get("attention"), str)
    return named and "scores" in row and row["scores"] in ("bf16", "f32", None)


def attention_nodes(model: Any) -> dict[str, Any]:
    """Operations of a model that compute the products of an attention and its softmax, by name; masked ones left out."""
    found = (node for node in model.get_ordered_ops() if node.get_type_name() == "ScaledDotProductAttention")
    return {node.get_friendly_name(): node for node in found if node.get_input_size() == 3}


def compute_in_bf16(attention: Any, scores: str) -> None:
    """Replace one of the `attention_nodes` by products in bfloat16, whose sums and softmax are float32.

    Args:
        attention: the operation, of q, k, v of shape [batch, heads, tokens, width].
        scores: precision that the scores q k^T are kept in until the softmax: bf16, or f32, which is slower.
    """
    q, k, v = attention.input_values()
    width = attention.get_input_partial_shape(0)[3].get_length()
    q = ops.multiply(q, ops.constant(np.float32(width**-0.5)))
    if scores == "f32" and width % TILE == 0:  # two columns of zeros: a width of whole tiles has its scores rounded
        none, two = ops.constant([0, 0, 0, 0]), ops.constant([0, 0, 0, 2])
        q, k = (ops.pad(x, none, two, "constant", ops.constant(np.float32(0))) for x in (q, k))
    q, k, v = (ops.convert(x, "bf16") for x in (q, k, v))
    probabilities = ops.softmax(ops.matmul(q, k, False, True), -1)
    attention.output(0).replace(ops.convert(ops.matmul(probabilities, v, False, False), "f32").output(0))


def attention_model(heads: int, tokens: int, width: int, scores: str | None) -> Any:
    """Model of one attention: q, k, v of shape [1, heads, tokens, width], all float32, to an output of that shape.

    `scores` is their precision in bfloat16, see `compute_in_bf16`; None is float32 for everything.
    """
    operands = [ops.parameter([1, heads, tokens, width], np.float32) for _ in range(3)]
    node: Any = ops.scaled_dot_product_attention(*operands, causal=False)
    model: Any = ov.Model([ops.abs(node)], operands)  # pyright: ignore[reportGeneralTypeIssues]
    if scores:
        compute_in_bf16(node, scores)
    return model


def bf16_attention_pays() -> bool:
    """Whether attention in bfloat16 is as exact as it is said to be on this processor, and takes at most 0.9 of float32's time.

    Measured, since the processor's own list of formats has bfloat16 where it is emulated, too. It is faster with AMX, slower or
    less exact with bfloat16 in vectors alone, and many times slower where it is emulated (`scripts/bench_attention.py`).
    """
    if not keeps_scores():
        return False
    core, shape = ov.Core(), (4, 1024, 32)
    given = [np.random.default_rng(i).standard_normal((1, *shape), dtype=np.float32) for i in range(3)]
    requests = [
        core.compile_model(attention_model(*shape, scores), "CPU", compile_settings(1, "f32")).create_infer_request()
        for scores in (None, "bf16")
    ]
    taken: list[list[float]] = [[], []]
    for _ in range(6):  # in turns, in seconds of the CPU, of which other processes take none
        for request, seconds in zip(requests, taken, strict=True):
            began = time.process_time()
            request.infer(given)
            seconds.append(time.process_time() - began)
    f32, bf16 = map(min, taken)
    return bf16 < 0.9 * f32


def keeps_scores() -> bool:
    """Whether this processor keeps scores in float32 where they are to be kept: the error is then well below that of bfloat16.

    With bfloat16 in vectors, and not in tiles (AMX), OpenVINO rounds them in either case.
    """
    core, shape = ov.Core(), (2, 64, 64)
    q, k, v = (np.random.default_rng(i).standard_normal((1, *shape), dtype=np.float32) for i in range(3))
    found = [
        core.compile_model(attention_model(*shape, scores), "CPU", compile_settings(1, "f32"))([10 * q, k, v])[0]
        for scores in (None, "f32", "bf16")
    ]
    kept, rounded = (float(np.square(x - found[0]).mean()) for x in found[1:])
    return kept < 0.7 * rounded


class ExportedUNet:
    """(sample, timestep, conditions) -> noise.

    Args:
        folder: with `model.xml`, `model.bin` and `deployed.json`.
        batch: rows that the model is compiled for; fewer are filled up, more are computed in parts.
        threads: None leaves the number to OpenVINO.
        precision: of the floating-point part, f32 or bf16.
        bf16_attention: compute those attentions in bfloat16 for which the export allows it; None does so if it is faster on
            this processor.

    Raises:
        ValueError: a folder without such a model.
    """

    def __init__(
        self,
        folder: Path,
        *,
        batch: int = 1,
        threads: int | None = None,
        precision: str = "f32",
        bf16_attention: bool | None = None,
    ) -> None:
        self.manifest, self.batch, core = read_manifest(folder), batch, ov.Core()
        self.timesteps = tuple(self.manifest["timesteps"])
        check_file(folder / "model.bin")
        try:
            model = core.read_model(check_file(folder / "model.xml"))
        except RuntimeError as error:
            reason = " ".join(str(error).split())[-200:]
            raise ValueError(f"{folder}: model.xml or model.bin is damaged: {reason}") from error
        shapes = {port: list(port.get_partial_shape()) for port in model.inputs}
        self.inputs = sorted(port.any_name for port in model.inputs if port.any_name != "step")
        model.reshape({port: [batch, *shape[1:]] if shape else [] for port, shape in shapes.items()})
        self.bf16 = {row["attention"]: row["scores"] for row in self.manifest.get("attention", []) if row["scores"]}
        if self.bf16 and not (bf16_attention_pays() if bf16_attention is None else bf16_attention):
            self.bf16 = {}
        for name, node in attention_nodes(model).items():
            if scores := self.bf16.get(name.removesuffix("/products")):
                compute_in_bf16(node, scores)
        self.compiled = core.compile_model(model, "CPU", compile_settings(threads, precision))
        self.request = self.compiled.create_infer_request()

    def __call__(self, sample: np.ndarray, timestep: int, **conditions: np.ndarray) -> np.ndarray:
        """Predict noise of shape [batch, channels, height, width]; all rows are at one timestep.

        Raises:
            ValueError: a timestep that was not exported, or other conditions than the model takes.
        """
        if timestep not in self.timesteps:
            ends = f"{min(self.timesteps)} .. {max(self.timesteps)}"
            raise ValueError(f"timestep {timestep} is none of the {len(self.timesteps)} exported ones ({ends})")
        step, inputs = np.array(self.timesteps.index(timestep)), {"sample": sample, **conditions}
        if sorted(inputs) != self.inputs:
            raise ValueError(f"the model takes {', '.join(self.inputs)}; it was given {', '.join(sorted(inputs))}")
        parts = [slice(start, start + self.batch) for start in range(0, len(sample), self.batch)]
        return np.concatenate([self._part({name: x[rows] for name, x in inputs.items()}, step) for rows in parts])

    def _part(self, inputs: Mapping[str, np.ndarray], step: np.ndarray) -> np.ndarray:
        """Compute at most `batch` rows. Missing rows are copies of the first: ranges over all rows stay the same."""
        rows = len(inputs["sample"])
        given: dict[str, Any] = {"step": step}
        for name, value in inputs.items():
            missing = [value[:1]] * (self.batch - rows)
            given[name] = np.ascontiguousarray(np.concatenate([value, *missing]), dtype=np.float32)
        return self.request.infer(given)[0][:rows].copy()
