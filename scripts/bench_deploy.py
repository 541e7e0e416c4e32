"""What executing integers brings on this machine: seconds, memory, bytes, and how near it stays to the simulation.

    python scripts/bench_deploy.py {digits|ldm_bedroom} [--threads 2 --rounds 5 --steps 20 ...]

Quantizes the network (the shipped one, or one of real size with random weights) by rounding to nearest, with ranges from random
inputs: seconds, bytes and agreement mean something, images do not. Latencies are medians of calls that take turns, with a pause
after each; all candidates have the same threads. Load time and memory are those of a fresh process that has nothing but the loader.
Where there is a GPU, torchao's forms are compared on it with torch's float32 and with the simulation.
"""

import argparse
import copy
import functools
import json
import resource
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
from bench_real_size import random_denoiser
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from tfmq_exp.cli.terminal import standard_streams
from tfmq_exp.denoisers.denoiser import Denoiser
from tfmq_exp.denoisers.unet import attentions, read_structure
from tfmq_exp.deploy.agreement import agreement
from tfmq_exp.deploy.convert import converted_float
from tfmq_exp.deploy.engine import read_manifest, write_manifest
from tfmq_exp.deploy.loader import FORMAT, Deployed
from tfmq_exp.deploy.onednn_engine import OneDNN
from tfmq_exp.deploy.openvino_engine import OpenVINODenoiser, export
from tfmq_exp.deploy.pairs import pairs_saturate
from tfmq_exp.quant.observers import MinMax
from tfmq_exp.quant.quantizers.base import Mode
from tfmq_exp.sampling.guidance import Sampling
from tfmq_exp.surgery.build import build_quantized_unet
from tfmq_exp.surgery.quantized_unet import QuantizedUNet
from tfmq_exp.surgery.resolve import resolve

CONF = Path(__file__).parents[1] / "conf"
PAUSE = 0.02  # seconds after each call, so that one engine's threads are asleep when the next one's start
LOAD = r"""
import json, re, sys, time
from pathlib import Path
import importlib.util
spec = importlib.util.spec_from_file_location("loader", sys.argv[1])
loader = importlib.util.module_from_spec(spec); spec.loader.exec_module(loader)
import numpy as np
began = time.perf_counter()
unet = loader.Deployed(Path(sys.argv[2]), batch=int(sys.argv[3]), threads=int(sys.argv[4]))
took = time.perf_counter() - began
unet(np.zeros(json.loads(sys.argv[5]), np.float32), unet.timesteps[0])
print(json.dumps([took, 1024 * int(re.search(r'VmHWM:\s+(\d+)', Path('/proc/self/status').read_text())[1])]))
"""


def parts_of(args: argparse.Namespace) -> tuple[Denoiser, Sampling, QuantizedUNet]:
    """The float network, how it is sampled, and its quantized copy, calibrated on random inputs."""
    words = [f"model={args.model}", f"quant={args.quant}", f"method={args.method}", f"method/scales={args.scales}"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg: DictConfig = compose("config", [*words, f"model.protocol.steps={args.steps}", *args.overrides])
    make: Any = functools.partial(instantiate, _convert_="all")
    if args.model == "digits":
        denoiser: Denoiser = make(cfg.model.denoiser)
    else:
        architecture = json.dumps(OmegaConf.to_container(cfg.model.denoiser.config, resolve=True))
        denoiser = random_denoiser(args.model, architecture)
    sampling = Sampling(make(cfg.sampler), **make(cfg.model.sampling))
    method = make(cfg.method)
    unet, timesteps = denoiser.unet, sampling.finite_set(denoiser)
    names = tuple(attentions(unet))
    plan = resolve(method.surgery, read_structure(unet, denoiser.example()), names, method.scales, timesteps)
    return denoiser, sampling, calibrated(build_quantized_unet(unet, plan, MinMax()), denoiser)


@torch.no_grad()
def calibrated(model: QuantizedUNet, denoiser: Denoiser) -> QuantizedUNet:
    """Weights rounded to nearest, ranges of one random input at every step."""
    model.calibrate_weights()
    for site in model.weight_layers():
        model.freeze(site)
    model.set_activations(Mode.OBSERVE)
    for i, t in enumerate(model.context.timesteps):
        model(**inputs_at(denoiser, 1, t, seed=i))
    model.tabulate_scales()
    model.set_activations(Mode.QUANTIZE)
    return model


def inputs_at(denoiser: Denoiser, rows: int, t: int, seed: int) -> dict[str, Tensor]:
    """Keyword arguments of a forward pass on noise."""
    example = denoiser.example()
    noise = torch.randn(rows, *denoiser.sample_shape, generator=torch.Generator().manual_seed(seed))
    conditions = {name: value.expand(rows, *value.shape[1:]) for name, value in example.items()}
    return {**conditions, "sample": noise, "timestep": torch.full((rows,), t)}


def medians(candidates: Mapping[str, Callable[[], object]], rounds: int, now: Callable[[], float]) -> dict[str, float]:
    """Seconds of each, taking turns; the first round warms up."""
    taken: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds + 1):
        for name, call in candidates.items():
            began = now()
            call()
            taken[name].append(now() - began)
            time.sleep(PAUSE)
    return {name: statistics.median(seconds[1:]) for name, seconds in taken.items()}


def relative(x: Tensor, wanted: Tensor) -> float:
    """Mean squared difference over mean square."""
    return float((x.double() - wanted.double()).square().mean() / wanted.double().square().mean())


def fresh_process(folder: Path, args: argparse.Namespace, shape: tuple[int, ...]) -> tuple[float, int]:
    """Seconds to load and the most bytes, in a process of its own."""
    loader = Path(__file__).parents[1] / "tfmq_exp/deploy/loader.py"
    given = [str(loader), str(folder), str(args.batch), str(args.threads), json.dumps([args.batch, *shape])]
    done = subprocess.run([sys.executable, "-c", LOAD, *given], capture_output=True, text=True, check=True)
    seconds, size = json.loads(done.stdout)
    return seconds, size


def float_folder(denoiser: Denoiser, timesteps: tuple[int, ...], example: Mapping[str, Tensor], folder: Path) -> Path:
    """The float network exported in the same form."""
    folder.mkdir()
    ov.save_model(converted_float(denoiser.unet, timesteps, example), folder / "model.xml", compress_to_fp16=False)
    write_manifest(folder, {"format": FORMAT, "timesteps": list(timesteps)})
    return folder


def by_nncf(plain: Path, inputs: Sequence[Mapping[str, Any]], folder: Path) -> Path:
    """The float network quantized by OpenVINO's own tool: what its int8 kernels bring on this processor, whatever the grids."""
    import nncf  # here: nobody else needs it  # pyright: ignore[reportMissingImports]

    model = ov.Core().read_model(plain / "model.xml")
    folder.mkdir()
    ov.save_model(nncf.quantize(model, nncf.Dataset(inputs)), folder / "model.xml", compress_to_fp16=False)
    write_manifest(folder, read_manifest(plain))
    return folder


def errors(model: QuantizedUNet, candidates: Mapping[str, nn.Module], inputs: Mapping[str, Any]) -> dict[str, float]:
    """Of one forward pass against the simulation in float32; in float64 it is the floor that no engine goes below."""
    with torch.no_grad():
        wanted = model(**inputs).sample
        found = {name: relative(unet(**inputs).sample, wanted) for name, unet in candidates.items()}
        twice = {name: v.double() if v.is_floating_point() else v for name, v in inputs.items()}
        found["simulation in float64 (floor)"] = relative(model.double()(**twice).sample, wanted)
        model.float()
    return found


def trajectory_seconds(unet: nn.Module, denoiser: Denoiser, sampling: Sampling, rows: int) -> float:
    """A whole sampling run."""
    began = time.perf_counter()
    for _ in sampling.trajectory(sampling.predictor(unet), denoiser, seed=0, stream="bench", indices=range(rows)):
        pass
    return time.perf_counter() - began


def on_gpu(
    denoiser: Denoiser, model: QuantizedUNet, example: Mapping[str, Tensor], rounds: int
) -> Mapping[str, Mapping[str, float]]:
    """Seconds, and errors against the simulation there, of all that a GPU executes; empty without one."""
    if not torch.cuda.is_available():
        return {}
    from tfmq_exp.deploy.torchao_engine import PRODUCTS, TorchAO  # here: without a GPU it need not be installed

    device = torch.device("cuda")
    given = {name: value.to(device) for name, value in example.items()}
    unets: dict[str, nn.Module] = {
        "torch fp32": copy.deepcopy(denoiser.unet).to(device),
        "torch simulation": copy.deepcopy(model).to(device),
    }
    for form, product in PRODUCTS.items():
        if torch.cuda.get_device_capability() >= product.capability:
            unets[f"torchao {form}"] = TorchAO(form).open(model, Path(), batch=len(given["sample"]))

    def finished(unet: nn.Module) -> None:
        unet(**given)
        torch.cuda.synchronize()

    calls = {name: functools.partial(finished, unet) for name, unet in unets.items()}
    wanted = unets["torch simulation"](**given).sample
    return {
        "seconds": medians(calls, rounds, time.perf_counter),
        "errors": {name: relative(unet(**given).sample, wanted) for name, unet in unets.items() if "torchao" in name},
    }


def report(found: Mapping[str, Any], console: Console) -> None:
    """All of it as tables."""
    view = Table(title="one forward pass, and sampling runs", title_justify="left")
    for column in ("", "ms", "times OpenVINO fp32", "times torch fp32", "sampling, s"):
        view.add_column(column, justify="left" if not column else "right")
    seconds = found["seconds"]
    for name, taken in seconds.items():
        ratios = (f"{seconds[base] / taken:.2f}" for base in ("openvino fp32", "torch fp32"))
        view.add_row(name, f"{1e3 * taken:.1f}", *ratios, f"{found['sampling'][name]:.2f}" if found["sampling"] else "")
    console.print(view)
    if found["gpu"]:
        view = Table(title=f"one forward pass on {torch.cuda.get_device_name()}", title_justify="left")
        for column in ("", "ms", "times torch fp32", "error"):
            view.add_column(column, justify="left" if not column else "right")
        seconds, errors = found["gpu"]["seconds"], found["gpu"]["errors"]
        for name, taken in seconds.items():
            error = f"{errors[name]:.1e}" if name in errors else ""
            view.add_row(name, f"{1e3 * taken:.1f}", f"{seconds['torch fp32'] / taken:.2f}", error)
        console.print(view)
    for name in ("bytes", "loading", "errors", "sites", "kernels"):
        console.print(f"{name}: {json.dumps(found[name])}", highlight=False, soft_wrap=True)


def main() -> int:
    """Quantize, export, compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=("digits", "ldm_bedroom", "ldm_imagenet", "sd_v1_4"))
    parser.add_argument("--quant", default="w4a8")
    parser.add_argument("--method", default="nearest")
    parser.add_argument("--scales", default="finite_set_all")
    parser.add_argument("--steps", type=int, default=20, help="of the sampler")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sites", type=int, default=19, help="that are compared one by one; 0 for none")
    parser.add_argument("--nncf", action="store_true", help="OpenVINO's own quantizer too; needs the package nncf")
    parser.add_argument("--no-sampling", action="store_true", help="leave whole sampling runs out")
    parser.add_argument(
        "--cpu-seconds", action="store_true", help="of a call: hardly moved by other work on the machine"
    )
    parser.add_argument("--json", type=Path, help="also write the numbers there")
    parser.add_argument("overrides", nargs="*", help="of run.py")
    args = parser.parse_intermixed_args()
    torch.set_num_threads(args.threads)
    console = Console()
    denoiser, sampling, model = parts_of(args)
    timesteps, example = model.context.timesteps, inputs_at(denoiser, args.batch, model.context.timesteps[0], seed=1)
    float_bytes = 4 * sum(p.numel() for p in denoiser.unet.parameters())
    console.print(f"{args.model}: {float_bytes / 4e6:.1f} M parameters, batch {args.batch}", highlight=False)
    with tempfile.TemporaryDirectory() as name, torch.no_grad():
        folder = Path(name) / "integers"
        folder.mkdir()
        saturates = pairs_saturate()
        found = export(model, example, folder, halves=saturates, threads=args.threads)
        plain = float_folder(denoiser, timesteps, example, Path(name) / "float")
        engines: dict[str, nn.Module] = {
            "torch fp32": denoiser.unet,
            "torch simulation": model,
            "openvino fp32": OpenVINODenoiser(Deployed(plain, batch=args.batch, threads=args.threads), model),
            f"openvino {args.quant}": OpenVINODenoiser(Deployed(folder, batch=args.batch, threads=args.threads), model),
            f"onednn {args.quant}": OneDNN().open(model, folder, batch=args.batch),
        }
        if args.nncf:
            given = [{"sample": inputs_at(denoiser, 1, t, seed=t)["sample"].numpy(), "step": 0} for t in timesteps[:2]]
            other = by_nncf(plain, given, Path(name) / "nncf")
            deployed = Deployed(other, batch=args.batch, threads=args.threads)
            engines["openvino w8a8 by nncf"] = OpenVINODenoiser(deployed, model)
        calls = {name: functools.partial(unet, **example) for name, unet in engines.items()}
        size = sum((folder / f"model.{end}").stat().st_size for end in ("xml", "bin"))
        manifest = read_manifest(folder)
        shape = denoiser.sample_shape
        result: dict[str, Any] = {
            "model": args.model,
            "pairs_saturate": saturates,
            "seconds": medians(calls, args.rounds, time.process_time if args.cpu_seconds else time.perf_counter),
            "sampling": {}
            if args.no_sampling
            else {name: trajectory_seconds(unet, denoiser, sampling, args.batch) for name, unet in engines.items()},
            "bytes": {"float": float_bytes, "file": size, "ratio": size / float_bytes, **manifest["bytes"]},
            "loading": {"integers": fresh_process(folder, args, shape), "float": fresh_process(plain, args, shape)}
            if len(example) == 2
            else {},
            "kernels": manifest["kernels"],
            "errors": errors(model, {name: engines[name] for name in engines if args.quant in name}, example),
            "gpu": on_gpu(denoiser, model, example, args.rounds),
            "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }
        names = list(found.products)
        chosen = names[:: max(1, len(names) // args.sites)] if args.sites else []
        steps = sorted({0, len(timesteps) // 2, len(timesteps) - 1})
        rows = agreement(found, model, example, steps=steps, sites=chosen, threads=args.threads) if chosen else []
    result["sites"] = {
        "compared": len(rows),
        "median": statistics.median(row.error for row in rows) if rows else None,
        "worst": max((row.error for row in rows), default=None),
        "worst without ties": max((row.error for row in rows if not row.beyond), default=None),
        "outputs": sum(row.outputs for row in rows),
        "beyond 1e-5": sum(row.beyond for row in rows),
        "unexplained by ties": sum(row.unexplained for row in rows),
    }
    report(result, console)
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    with standard_streams():
        sys.exit(main())
