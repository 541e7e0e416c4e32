"""Benchmark of the engines on this machine: seconds, memory, bytes, and agreement with the simulation.

    python scripts/bench_deploy.py {digits|ldm_bedroom} [--threads 2 --rounds 5 --steps 20 ...]

Quantizes the shipped network, or one of real size with random weights, by rounding to nearest, with ranges from random inputs.
Latencies are medians of calls that take turns, with a pause after each and the same threads. Load time and memory are those of
a fresh process with nothing but the runtime. On a GPU, torchao's dtypes are compared with torch's float32 and the simulation.
"""

import argparse
import copy
import functools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import openvino as ov
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from random_denoiser import random_denoiser
from rich.console import Console
from torch import Tensor, nn

from tfmq_exp.cli.terminal import standard_streams
from tfmq_exp.denoisers.denoiser import Denoiser
from tfmq_exp.denoisers.families.unet import attentions
from tfmq_exp.denoisers.read_structure import read_structure
from tfmq_exp.deploy.engine import read_manifest, write_manifest
from tfmq_exp.deploy.onednn import OneDNN
from tfmq_exp.deploy.openvino import runtime
from tfmq_exp.deploy.openvino.engine import OpenVINOUNet
from tfmq_exp.deploy.openvino.export import export, pairs_saturate
from tfmq_exp.deploy.openvino.parity import LayerParity, compare_layers
from tfmq_exp.deploy.openvino.trace import shared_copy, trace
from tfmq_exp.quant.observers import MinMax
from tfmq_exp.quant.quantizers import Mode
from tfmq_exp.sampling.guidance import Sampling
from tfmq_exp.surgery.quantized_network import QuantizedNetwork, build_quantized_network
from tfmq_exp.surgery.resolve import resolve

LOAD = r"""
import json, pathlib, re, runpy, sys, time
import numpy as np
path, folder, batch, threads, shape = sys.argv[1:]
ExportedUNet = runpy.run_path(path)["ExportedUNet"]
began = time.perf_counter()
unet = ExportedUNet(pathlib.Path(folder), batch=int(batch), threads=int(threads))
took = time.perf_counter() - began
unet(np.zeros(json.loads(shape), np.float32), unet.timesteps[0])
print(json.dumps([took, 1024 * int(re.search(r'VmHWM:\s+(\d+)', open('/proc/self/status').read())[1])]))
"""


def models(args: argparse.Namespace) -> tuple[Denoiser, Sampling, QuantizedNetwork]:
    overrides = [f"model={args.model}", f"quant={args.quant}", f"method={args.method}", f"method/scales={args.scales}"]
    overrides += [f"protocol.sampling.num_inference_steps={args.steps}", *args.overrides]
    with initialize_config_dir(str(Path(__file__).parents[1] / "conf"), version_base="1.3"):
        cfg: DictConfig = compose("config", overrides)
    make: Any = functools.partial(instantiate, _convert_="all")
    if args.model == "digits":
        denoiser: Denoiser = make(cfg.model.denoiser)
    else:
        denoiser = random_denoiser(args.model, json.dumps(OmegaConf.to_container(cfg.model.denoiser.config)))
    sampling = Sampling(make(cfg.sampler), **make(cfg.model.sampling))
    method, network, timesteps = make(cfg.method), denoiser.network, sampling.finite_set(denoiser)
    structure, names = read_structure(network, denoiser.example()), tuple(attentions(network))
    plan = resolve(method.surgery, structure, names, method.scales, timesteps)
    return denoiser, sampling, calibrated_on_noise(build_quantized_network(network, plan, MinMax()), denoiser)


def calibrated_on_noise(model: QuantizedNetwork, denoiser: Denoiser) -> QuantizedNetwork:
    model.calibrate_weights()
    for layer in model.weight_layers():
        model.freeze(layer)
    model.set_activations(Mode.OBSERVE)
    for i, t in enumerate(model.context.timesteps):
        model(**inputs_at(denoiser, 1, t, seed=i))
    model.tabulate_scales()
    model.set_activations(Mode.QUANTIZE)
    return model


def inputs_at(denoiser: Denoiser, rows: int, t: float, seed: int) -> dict[str, Tensor]:
    noise = torch.randn(rows, *denoiser.sample_shape, generator=torch.Generator().manual_seed(seed))
    conditions = {name: value.expand(rows, *value.shape[1:]) for name, value in denoiser.example().items()}
    return {**conditions, "sample": noise, "timestep": torch.full((rows,), t)}


def medians(candidates: Mapping[str, Callable[[], object]], rounds: int, now: Callable[[], float]) -> dict[str, float]:
    """Median seconds of each candidate; they take turns, and the first round warms up."""
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds + 1):
        for name, call in candidates.items():
            began = now()
            call()
            taken[name].append(now() - began)
            time.sleep(0.02)  # so that the threads of one engine are asleep when those of the next one start
    return {name: statistics.median(seconds[1:]) for name, seconds in taken.items()}


def relative(x: Tensor, expected: Tensor) -> float:
    return float((x.double() - expected.double()).square().mean() / expected.double().square().mean())


def load_seconds_and_peak_bytes(folder: Path, args: argparse.Namespace, shape: tuple[int, ...]) -> list[float]:
    given = [runtime.__file__, str(folder), str(args.batch), str(args.threads), json.dumps([args.batch, *shape])]
    return json.loads(subprocess.check_output([sys.executable, "-c", LOAD, *given], text=True))


def save_float(model: Any, timesteps: Sequence[float], folder: Path) -> Path:
    folder.mkdir()
    ov.save_model(model, folder / "model.xml", compress_to_fp16=False)
    write_manifest(folder, {"format": runtime.FORMAT, "timesteps": list(timesteps)})
    return folder


def quantize_by_nncf(plain: Path, denoiser: Denoiser, timesteps: Sequence[float], folder: Path) -> Path:
    """Quantize the float network by OpenVINO's own tool: the speed-up of its int8 kernels on this processor."""
    import nncf  # here: optional  # pyright: ignore[reportMissingImports]

    samples = [{"sample": inputs_at(denoiser, 1, t, seed=int(t))["sample"].numpy(), "step": 0} for t in timesteps[:2]]
    quantized = nncf.quantize(ov.Core().read_model(plain / "model.xml"), nncf.Dataset(samples))
    return save_float(quantized, timesteps, folder)


def errors(model: QuantizedNetwork, candidates: Mapping[str, nn.Module], inputs: Mapping[str, Any]) -> dict[str, float]:
    """Errors of one forward pass against the simulation in float32; that of float64 is the floor for all engines."""
    expected = model(**inputs).sample
    doubled = {name: v.double() if v.is_floating_point() else v for name, v in inputs.items()}
    found = {name: relative(network(**inputs).sample, expected) for name, network in candidates.items()}
    exact = copy.deepcopy(model).double()(**doubled).sample
    return {**found, "simulation in float64 (floor)": relative(exact, expected)}


def trajectory_seconds(network: nn.Module, denoiser: Denoiser, sampling: Sampling, rows: int) -> float:
    began, predict = time.perf_counter(), sampling.predictor(network)
    list(sampling.trajectory(predict, denoiser, seed=0, stream="bench", indices=range(rows)))
    return time.perf_counter() - began


def on_gpu(network: nn.Module, model: QuantizedNetwork, example: Mapping[str, Tensor], rounds: int) -> dict[str, Any]:
    """Seconds and errors of everything that a GPU executes; empty without one."""
    if not torch.cuda.is_available():
        return {}
    from tfmq_exp.deploy.torchao.engine import TorchAO  # here: without a GPU it need not be installed
    from tfmq_exp.deploy.torchao.products import FORMATS

    given, simulated = {name: value.to("cuda") for name, value in example.items()}, copy.deepcopy(model).to("cuda")
    unets: dict[str, nn.Module] = {"torch fp32": copy.deepcopy(network).to("cuda"), "torch simulation": simulated}
    for dtype, product in FORMATS.items():
        if torch.cuda.get_device_capability() >= product.capability:
            unets[f"torchao {dtype}"] = TorchAO(dtype).open(model, Path(), batch=len(given["sample"]))
    expected = simulated(**given).sample

    def call(network: nn.Module) -> None:
        network(**given)
        torch.cuda.synchronize()

    calls = {name: functools.partial(call, one) for name, one in unets.items()}
    errors = {name: relative(one(**given).sample, expected) for name, one in unets.items() if "torchao" in name}
    return {"seconds": medians(calls, rounds, time.perf_counter), "errors": errors}


def summary(rows: Sequence[LayerParity]) -> dict[str, Any]:
    errors, exact = [row.error for row in rows], [row.error for row in rows if not row.beyond]
    worst = {"worst": max(errors, default=None), "worst without ties": max(exact, default=None)}
    sums = {name: sum(getattr(row, name) for row in rows) for name in ("outputs", "beyond", "unexplained")}
    return {"compared": len(rows), "median": statistics.median(errors) if rows else None, **worst, **sums}


def report(found: Mapping[str, Any], console: Console) -> None:
    seconds, sampling = found["seconds"], found["sampling"]
    for name, taken in seconds.items():
        ratios = (f"{seconds[base] / taken:5.2f} times {base}" for base in ("openvino fp32", "torch fp32"))
        run = f"sampling run {sampling[name]:.2f} s" if name in sampling else ""
        console.print(f"{name:35}{1e3 * taken:9.1f} ms", *ratios, run, sep="  ", highlight=False, soft_wrap=True)
    for name in ("bytes", "loading", "errors", "layers", "kernels", "attention", "gpu"):
        console.print(f"{name}: {json.dumps(found[name])}", highlight=False, soft_wrap=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=("digits", "ldm_bedroom", "ldm_imagenet", "sd_v1_4"))
    for name, default in {"quant": "w4a8", "method": "nearest", "scales": "finite_set_all"}.items():
        parser.add_argument(f"--{name}", default=default)
    for name, count in {"steps": 20, "batch": 1, "threads": 2, "rounds": 5}.items():
        parser.add_argument(f"--{name}", type=int, default=count)
    parser.add_argument("--layers", type=int, default=19, help="number of layers to compare one by one; 0 for none")
    parser.add_argument("--nncf", action="store_true", help="OpenVINO's own quantizer too; needs the package nncf")
    parser.add_argument("--no-sampling", action="store_true", help="leave whole sampling runs out")
    parser.add_argument("--cpu-seconds", action="store_true", help="of a call: less affected by other processes")
    parser.add_argument("--json", type=Path, help="also write the numbers there")
    parser.add_argument("overrides", nargs="*", help="of run.py")
    return parser.parse_intermixed_args()


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    denoiser, sampling, model = models(args)
    timesteps, saturates, integers = model.context.timesteps, pairs_saturate(), Path(tempfile.mkdtemp(dir=folder))
    example = inputs_at(denoiser, args.batch, timesteps[0], seed=1)
    converted = export(model, example, integers, split_int8_weights=saturates, threads=args.threads)
    traced, _ = trace(shared_copy(denoiser.network), model.context, example)
    plain, shape = save_float(traced, timesteps, folder / "float"), denoiser.sample_shape
    exported = {"openvino fp32": plain, f"openvino {args.quant}": integers}
    if args.nncf:
        exported["openvino w8a8 by nncf"] = quantize_by_nncf(plain, denoiser, timesteps, folder / "nncf")
    engines: dict[str, nn.Module] = {"torch fp32": denoiser.network, "torch simulation": model}
    open_model = functools.partial(runtime.ExportedUNet, batch=args.batch, threads=args.threads)
    engines |= {name: OpenVINOUNet(open_model(path)) for name, path in exported.items()}
    engines[f"openvino {args.quant}, attention in f32"] = OpenVINOUNet(open_model(integers, bf16_attention=False))
    engines[f"onednn {args.quant}"] = OneDNN().open(model, integers, batch=args.batch)
    calls = {name: functools.partial(network, **example) for name, network in engines.items()}
    seconds = medians(calls, args.rounds, time.process_time if args.cpu_seconds else time.perf_counter)
    sampled = {} if args.no_sampling else engines
    runs = {name: trajectory_seconds(network, denoiser, sampling, args.batch) for name, network in sampled.items()}
    alone = {"integers": integers, "float": plain} if len(example) == 2 else {}
    float_bytes = 4 * sum(p.numel() for p in denoiser.network.parameters())
    size, manifest = sum(path.stat().st_size for path in integers.glob("model.*")), read_manifest(integers)
    compared = list(converted.products)[:: max(1, len(converted.products) // args.layers)] if args.layers else []
    among: Any = {"steps": sorted({0, len(timesteps) // 2, len(timesteps) - 1}), "layers": compared}
    parity = compare_layers(model, example, split_int8_weights=saturates, threads=args.threads, **among)
    return {
        **{"model": args.model, "pairs_saturate": saturates, "seconds": seconds, "sampling": runs},
        "bytes": {"float": float_bytes, "file": size, "ratio": size / float_bytes, **manifest["bytes"]},
        "loading": {name: load_seconds_and_peak_bytes(path, args, shape) for name, path in alone.items()},
        "errors": errors(model, {name: network for name, network in engines.items() if args.quant in name}, example),
        "gpu": on_gpu(denoiser.network, model, example, args.rounds),
        **{"kernels": manifest["kernels"], "attention": manifest["attention"], "layers": summary(parity)},
    }


def main() -> None:
    args = arguments()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        report(found := measure(args, Path(folder)), Console())
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    with standard_streams():
        main()
