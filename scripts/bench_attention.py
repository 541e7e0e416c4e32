"""Benchmark of one attention in float32, bfloat16 and int8 on this processor: milliseconds, and noise.

    python scripts/bench_attention.py [--heads 14 --tokens 1024 --width 32 --threads 1 --scores 1]

Operands are normally distributed. Noise is the mean squared error over that of eight bits for the output, as in `deployed.json`.
In int8, operands have the range of these very numbers, which a deployed model would have to learn. Calls take turns. With the
environment variable ONEDNN_MAX_CPU_ISA=AVX512_CORE_VNNI or AVX512_CORE_BF16 the processor is used as one without AMX.
"""

import argparse
import statistics
import time
from typing import Any

import numpy as np
import openvino as ov
import openvino.opset13 as ops
from rich.console import Console

from tfmq_exp.deploy.openvino.runtime import attention_model, compile_settings

INT8 = {"int8 q, k": ("q", "k"), "int8 q, k, v, probabilities": ("q", "k", "v", "probabilities")}


def exact(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities and output in float64."""
    q, k, v = (x.astype(float) for x in (q, k, v))
    scores = q @ k.swapaxes(-1, -2) / q.shape[-1] ** 0.5
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    probabilities = weights / weights.sum(-1, keepdims=True)
    return probabilities, probabilities @ v


def int8_model(shape: tuple[int, ...], quantized: tuple[str, ...], largest: dict[str, float]) -> Any:
    """Model of one attention whose `quantized` operands go through bytes with constant ranges; `largest` are magnitudes."""

    def quantize(name: str, x: Any) -> Any:
        if name not in quantized:
            return x
        low, levels = (0.0, 255) if name == "probabilities" else (-128 / 127 * largest[name], 127)
        ends = [ops.constant(np.float32(end)) for end in (low, low + 255 / levels * largest[name])]
        return ops.fake_quantize(x, *ends, *ends, 256)

    inputs = [ops.parameter([1, *shape], np.float32) for _ in range(3)]
    q, k, v = (quantize(name, x) for name, x in zip("qkv", inputs, strict=True))
    scores = ops.multiply(ops.matmul(q, k, False, True), ops.constant(np.float32(shape[-1] ** -0.5)))
    y = ops.matmul(quantize("probabilities", ops.softmax(scores, -1)), v, False, False)
    return ov.Model([ops.abs(y)], inputs)  # pyright: ignore[reportGeneralTypeIssues]


def main() -> None:
    """Measure, and print a line for each format."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, count in {"heads": 14, "tokens": 1024, "width": 32, "threads": 1, "rounds": 9}.items():
        parser.add_argument(f"--{name}", type=int, default=count)
    parser.add_argument("--scores", type=float, default=1.0, help="standard deviation of scores")
    args = parser.parse_args()
    shape = (args.heads, args.tokens, args.width)
    given = [np.random.default_rng(i).standard_normal((1, *shape), dtype=np.float32) for i in range(3)]
    given[0] *= np.float32(args.scores)
    probabilities, y = exact(*given)
    largest = {name: float(np.abs(x).max()) for name, x in zip("qkv", given, strict=True)}
    largest["probabilities"] = float(probabilities.max())
    kinds = {"f32": None, "bf16": "bf16", "bf16, scores in f32": "f32"}
    models = {name: attention_model(*shape, scores) for name, scores in kinds.items()}
    models |= {name: int8_model(shape, quantized, largest) for name, quantized in INT8.items()}
    settings = compile_settings(args.threads, "f32")
    requests = {name: ov.Core().compile_model(m, "CPU", settings).create_infer_request() for name, m in models.items()}
    taken: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(args.rounds + 1):
        for name, request in requests.items():
            began = time.perf_counter()
            request.infer(given)
            taken[name].append(time.perf_counter() - began)
    for name, request in requests.items():
        error = np.square(request.get_output_tensor().data - np.abs(y)).mean()
        noise, seconds = error / ((y.max() - y.min()) ** 2 / 255**2 / 12), statistics.median(taken[name][1:])
        Console().print(f"{name:30}{1e3 * seconds:9.2f} ms  noise {noise:.2g}", highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
