"""Peak memory of reconstructing a network block by block that is not in memory itself.

    python scripts/bench_blocks.py check FOLDER [--width 384 --blocks 114 --kill-after 40 --rest-mib 300]
    python scripts/bench_blocks.py write FOLDER [--width 384 --blocks 114]
    python scripts/bench_blocks.py learn FOLDER [--samples 16 --iterations 2 --kill-after K]

`write` makes a PixArt transformer with random weights, as shards (1 GiB of them by default). `learn` learns its rounding at 4 bits with
its parameters on the meta device, and prints one JSON object: the peak of resident memory beyond that after all imports, the bytes
of a block and of two streams, how often tensors were read, and a hash of all integers. With --kill-after it kills itself once so
many units are learned; the same command without it goes on from there. `check` does all that in processes of their own: it
learns the network at once, and again with a kill in between, and its status is 1 unless both end with the same bits, within two blocks,
two streams and --rest-mib of memory.
"""

import argparse
import hashlib
import json
import logging
import os
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from compare_reference import NoCheckpoints
from diffusers import PixArtTransformer2DModel
from gpu.networks import recipe_of
from safetensors.torch import save_file

from tfmq_exp.calibration.dataset import CalibrationSet
from tfmq_exp.calibration.timesteps import EveryKth
from tfmq_exp.denoisers.loading.meta_network import on_meta, parameters_on_meta, skeleton
from tfmq_exp.denoisers.loading.sharded_weights import ShardedWeights
from tfmq_exp.denoisers.read_structure import read_structure
from tfmq_exp.denoisers.structure import Role
from tfmq_exp.methods.weights import Reconstruct
from tfmq_exp.pipeline.unit_checkpoints import CheckpointedIntegers, FileUnitCheckpointer
from tfmq_exp.quant.observers import MinMax
from tfmq_exp.quant.scales.observed_ranges import StaticConfig
from tfmq_exp.reconstruction.blocks.stored_weights import StoredWeights
from tfmq_exp.reconstruction.context import ComputeConfig, ReconstructionContext, UnitReport, quiet_trainer
from tfmq_exp.reconstruction.units import QuantizedInputs, TemporalAware
from tfmq_exp.surgery.config import AttentionBits, LayerBits, QuantizationConfig, ScalePlan
from tfmq_exp.surgery.quantized_network import build_quantized_network
from tfmq_exp.surgery.resolve import resolve

CPU = torch.device("cpu")
TIMESTEPS = (751, 501, 251, 1)
TOKENS, TEXT, SIZE = 16, 32, 32  # words of a text, their width, height and width of a latent
SHARD = 2**27  # bytes
# Weights of blocks are read once by a process. Those of the ends are read by the passes that capture what the stem, the text's
# projection, the blocks and the head read, and by their own unit.
READS = {"inside blocks": 1, "all": 4}


def network_on_meta(config: dict[str, Any]) -> Any:
    """A network with its parameters on the meta device."""
    with parameters_on_meta():
        settings = {key: value for key, value in config.items() if not key.startswith("_")}
        return PixArtTransformer2DModel(**settings).requires_grad_(False).eval()


def sizes_of(width: int, blocks: int) -> dict[str, Any]:
    """Settings of a PixArt transformer, of which a block has 16 width^2 weights."""
    return {
        **{"num_attention_heads": width // 64, "attention_head_dim": 64, "cross_attention_dim": width},
        "num_layers": blocks,
    }


def config_of(width: int, blocks: int) -> dict[str, Any]:
    """A PixArt transformer."""
    ends = {"sample_size": SIZE, "caption_channels": TEXT, "use_additional_conditions": False, "norm_eps": 1e-6}
    return {**sizes_of(width, blocks), **ends, "in_channels": 4, "out_channels": 8}


def write(folder: Path, config: dict[str, Any]) -> None:
    """Write configuration and shards, with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    shards = [dict[str, torch.Tensor]()]
    generator = torch.Generator().manual_seed(0)
    for name, parameter in network_on_meta(config).named_parameters():
        if sum(x.nbytes for x in shards[-1].values()) > SHARD:
            shards.append({})
        value = torch.randn(parameter.shape, generator=generator)
        shards[-1][name] = value * (parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.1)
    names = [f"diffusion_pytorch_model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for name, tensors in zip(names, shards, strict=True):
        save_file(tensors, folder / name)
    index = {tensor: name for name, tensors in zip(names, shards, strict=True) for tensor in tensors}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps({"weight_map": index}), encoding="utf-8"
    )
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def calibration(samples: int) -> CalibrationSet:
    """Noise at every timestep in turn."""
    generator, rows = torch.Generator().manual_seed(1), torch.arange(samples)
    step = rows * len(TIMESTEPS) // samples
    text = {"encoder_hidden_states": torch.randn(samples, TOKENS, TEXT, generator=generator)}
    constants = {"added_cond_kwargs.resolution": None, "added_cond_kwargs.aspect_ratio": None}
    columns = torch.randn(samples, 4, SIZE, SIZE, generator=generator), torch.tensor(TIMESTEPS)[step], step, rows, text
    return CalibrationSet(*columns, constants=constants, first_argument="hidden_states")


def memory(kind: str) -> int:
    """Bytes of resident memory: VmRSS at present, VmHWM at its peak."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(kind))


class KillAfter(NoCheckpoints):
    """Follows the units, and kills this process after some of them; `restored` and `learned` count."""

    def __init__(self, count: int | None) -> None:
        self.count, self.restored, self.learned = count, 0, 0

    def on_unit_end(self, unit: str, report: UnitReport | None) -> None:
        """Count a unit."""
        self.restored, self.learned = self.restored + (report is None), self.learned + (report is not None)
        if self.learned == self.count:
            os.kill(os.getpid(), signal.SIGKILL)


def learn(args: argparse.Namespace) -> dict[str, Any]:
    """Learn the units that are not finished yet; the numbers to print."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak begins here
    start, began = memory("VmRSS"), time.perf_counter()
    config, data = json.loads((args.folder / "config.json").read_text(encoding="utf-8")), calibration(args.samples)
    network, shards = network_on_meta(config), ShardedWeights.of(args.folder)
    structure = read_structure(skeleton(network), on_meta(data[slice(0, 1)].inputs(CPU)))
    roles = {role.value: LayerBits(4, None) for role in Role}
    scales = ScalePlan(StaticConfig(), StaticConfig())
    plan = resolve(QuantizationConfig(roles, AttentionBits(), {}), structure, (), scales, TIMESTEPS)
    model = build_quantized_network(network, plan, MinMax())
    units, progress = args.folder / "units", KillAfter(args.kill_after)
    compute = ComputeConfig(4, 2**28, quiet_trainer(CPU))
    files = FileUnitCheckpointer(units, {}), progress, StoredWeights(shards, CheckpointedIntegers(units))
    context = ReconstructionContext(model, network, structure, data, compute, 0, *files)
    learning = replace(recipe_of(args.iterations, 4), inputs=QuantizedInputs())
    Reconstruct(TemporalAware(), EveryKth(1), learning)(context)
    peak, width = memory("VmHWM") - start, config["cross_attention_dim"]
    digest, integers = hashlib.sha256(), CheckpointedIntegers(units)
    for _, parts in sorted(integers.read(integers.layers()).items()):
        for part in parts:
            digest.update(part.codes.numpy().tobytes() + part.qparams.scale.numpy().tobytes())
    blocks = [layer.weights for layer in structure.layers.values() if layer.name.startswith("transformer_blocks.0.")]
    inside = [count for name, count in shards.reads.items() if name.startswith("transformer_blocks.")]
    return {
        "peak": peak,
        "block": 4 * sum(blocks),
        "streams": 2 * 4 * args.samples * (SIZE // 2) ** 2 * width,
        "network": sum(path.stat().st_size for path in args.folder.glob("*.safetensors")),
        "reads": {"inside blocks": max(inside), "all": max(shards.reads.values())},
        "units": {"restored": progress.restored, "learned": progress.learned},
        "seconds": time.perf_counter() - began,
        "sha256": digest.hexdigest(),
    }


def run(*arguments: Any) -> subprocess.CompletedProcess[str]:
    """Run this script, with tensors in pages of their own: glibc's free lists would be measured, too."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": f"{2**20}"}
    command = [sys.executable, __file__, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def check(args: argparse.Namespace) -> list[str]:
    """Learn a network at once and with a kill in between; everything that is not as it must be."""
    whole, killed = args.folder / "whole", args.folder / "killed"
    work = "--samples", args.samples, "--iterations", args.iterations
    write(whole, config_of(args.width, args.blocks))
    killed.mkdir(parents=True)
    for path in whole.iterdir():
        (killed / path.name).symlink_to(path.resolve())
    outcomes = [run("learn", whole, *work), run("learn", killed, *work, "--kill-after", args.kill_after)]
    resumed = run("learn", killed, *work)
    wrong = [outcome.stderr for outcome in (outcomes[0], resumed) if outcome.returncode]
    if wrong or outcomes[1].returncode != -signal.SIGKILL:
        return [*wrong, f"the killed process ended with {outcomes[1].returncode}"]
    found = [json.loads(outcome.stdout) for outcome in (outcomes[0], resumed)]
    print(json.dumps(dict(zip(("whole", "resumed"), found, strict=True)), indent=2))
    for one in found:
        bound = 2 * one["block"] + one["streams"] + args.rest_mib * 2**20
        wrong += [f"a peak of {one['peak']} bytes, allowed are {bound}"] if one["peak"] > bound else []
        wrong += [f"tensors were read {one['reads']} times"] if one["reads"] != READS else []
    wrong += ["the killed run ends with other bits"] if found[0]["sha256"] != found[1]["sha256"] else []
    return wrong


def main() -> int:
    """Write a network, learn its rounding and print the numbers, or check them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("check", "write", "learn"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("--width", type=int, default=384, help="a multiple of 64")
    parser.add_argument("--blocks", type=int, default=114)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--iterations", type=int, default=2)
    parser.add_argument("--kill-after", type=int, help="units")
    parser.add_argument("--rest-mib", type=int, default=300)
    args = parser.parse_args()
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    if args.command == "write":
        write(args.folder, config_of(args.width, args.blocks))
    elif args.command == "learn":
        print(json.dumps(learn(args), indent=2))
    else:
        args.kill_after = args.kill_after or 40
        for line in (wrong := check(args)):
            print(line, file=sys.stderr)
        return 1 if wrong else 0
    return 0


if __name__ == "__main__":
    sys.exit(main())
