"""One block of a published transformer or UNet at its true size: seconds and memory of reconstructing it, and what that means for the whole.

    python scripts/bench_one_block.py {flux_double|flux_single|sd3.5_large|sdxl_transformer|sdxl_resnet|pixart_sigma|qwen_image}...
        [--samples 2 --iterations 2]

The network is built on the meta device, where one pass gives the shapes of what the block reads. The block alone gets numbers, random
ones, and learns its rounding at 4 bits, one sample an iteration, float32; layers of the modulation are rounded to nearest with it (they belong
to the Temporal Information Block). Seconds are CPU seconds of one thread, which other work on the machine hardly changes; the last
iteration counts. Prints one line of a table for each name, and what it estimates for all blocks of that kind.
"""

import argparse
import logging
import time
import warnings
from contextlib import suppress
from operator import methodcaller
from typing import Any

import diffusers
import torch
from bench_memory import peak_memory
from gpu.networks import learned_unit, recipe_of
from published_networks import PUBLISHED
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tfmq_exp.core.formatting import format_bytes, format_duration
from tfmq_exp.denoisers.families.family import LAYERS
from tfmq_exp.denoisers.families.find import family_of
from tfmq_exp.denoisers.loading.meta_network import on_meta, parameters_on_meta, skeleton
from tfmq_exp.denoisers.structure import Kind, Role
from tfmq_exp.quant.observers import MinMax
from tfmq_exp.quant.spec import QuantSpec
from tfmq_exp.reconstruction.activation_cache import SpillAllocator, TensorTree, mark_shared
from tfmq_exp.reconstruction.capture import UnitActivations, run_unit
from tfmq_exp.reconstruction.recorded_calls import StopForward, recorded_calls
from tfmq_exp.reconstruction.units import Unit
from tfmq_exp.surgery.quantized_network import build_quantized_network
from tfmq_exp.surgery.resolve import LayerConfig, ResolvedConfig
from tfmq_exp.surgery.stored_tensors import pack

CPU = torch.device("cpu")
ITERATIONS, SAMPLES, STEPS = 2000, 128, 50  # that the estimates are for
HEADER = (
    *("block", "weights", "a sample's stream", "capture, s a sample", "an iteration, s", "peak of learning"),
    *("its 4-bit file", f"{ITERATIONS} iterations", "blocks of the kind", "theirs together"),
    *("modulation", "its table, 8 bits", "weights it replaces, 16 bits"),
)


def on_cpu(call: Any) -> Any:
    """The structure with random numbers of the same shapes on the CPU."""
    generator = torch.Generator().manual_seed(0)

    def leaf(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if x.is_complex():
            return torch.polar(torch.ones(x.shape), torch.randn(x.shape, generator=generator))
        numbers = torch.randn(x.shape, generator=generator)
        return numbers.to(x.dtype) if x.is_floating_point() else torch.ones(x.shape, dtype=x.dtype)

    return pytree.tree_map(leaf, call)


class Alone(nn.Module):
    """A network of one block."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block.to_empty(device=CPU)
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            scale = parameter[0].numel() ** -0.5 if parameter.dim() > 1 else 0.1
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))

    def forward(self, x: Any) -> Any:
        return self.block(x)


def measure(name: str, samples: int, iterations: int) -> list[str]:
    """Cells of the table."""
    published = PUBLISHED[name]
    with parameters_on_meta():
        network = getattr(diffusers, published.network)(**published.config).requires_grad_(False).eval()
    roles, blocks = family_of(network).roles(network), [n for n, _ in family_of(network).blocks(network)]
    modulation = [network.get_submodule(layer) for layer, role in roles.items() if role is Role.TIME_PROJ]
    outline = skeleton(network)
    with recorded_calls({"block": outline.get_submodule(published.block)}, before=True) as calls:
        with suppress(StopForward):
            outline(**on_meta(dict(published.inputs)))
        call = calls["block"]
    alike = [block for block in blocks if published.alike(block)]
    weights = {
        block: sum(p.numel() for p in network.get_submodule(block).parameters()) for block in (*alike, published.block)
    }
    alone = Alone(network.get_submodule(published.block))
    layers = {
        n: roles[f"{published.block}{n.removeprefix('block')}"]
        for n, m in alone.named_modules()
        if isinstance(m, LAYERS)
    }
    plan = ResolvedConfig({n: LayerConfig(QuantSpec(4, "affine", axis=0), None) for n in layers}, {}, (0,), "error")
    model = build_quantized_network(alone, plan, MinMax())
    model.calibrate_weights()
    for layer in (rest := [layer for layer, role in layers.items() if role is Role.TIME_PROJ]):
        model.freeze(layer)
    learned = tuple(layer for layer in layers if layer not in rest)
    unit = Unit("block", Kind.TRANSFORMER, learned, "denoiser", methodcaller("get_submodule", "block"))
    shared = [
        isinstance(x, Tensor) and len(x) != 1 for x in pytree.tree_leaves(call)
    ]  # rotary tables: the batch is one
    one = TensorTree((torch.zeros(1), *mark_shared(on_cpu(call), shared)))
    storage = SpillAllocator(2**34)
    inputs = TensorTree.like(one.whole, samples, storage)
    for i in range(samples):
        inputs.write(i, one.whole)
    began = time.process_time()
    outputs = run_unit(alone.block, model.context, inputs, 1, storage)
    capture, stream = (time.process_time() - began) / samples, outputs.nbytes // samples
    began = time.process_time()
    activations = UnitActivations({"float": inputs}, outputs)
    with peak_memory() as peak, learned_unit(model, unit, activations, recipe_of(iterations, 1), CPU) as task:
        for i in range(iterations):
            began = time.process_time()
            task.iterate([x[i % samples : i % samples + 1] for x in task.samples.tensors])
        iteration = time.process_time() - began
    for layer in learned:
        model.freeze(layer)
    parts = [part for parts in model.integers.values() for part in parts]
    packed = sum(pack(part.codes, 4).nbytes + sum(x.nbytes for x in part.qparams) for part in parts)
    share = sum(weights[block] for block in alike) / weights[published.block]
    outputs_of_modulation = sum(layer.weight.shape[0] for layer in modulation)
    replaced = sum(p.numel() for layer in modulation for p in layer.parameters())
    return [
        f"{name} ({published.block})",
        f"{weights[published.block] / 1e6:.1f} M",
        format_bytes(stream),
        f"{capture:.1f}",
        f"{iteration:.1f}",
        format_bytes(peak[0]),
        format_bytes(packed),
        format_duration(iteration * ITERATIONS),
        f"{len(alike)}, {sum(weights[block] for block in alike) / 1e9:.2f} G weights",
        f"{format_duration(share * (iteration * ITERATIONS + 2 * SAMPLES * capture))}, {format_bytes(round(share * packed))}",
        f"{outputs_of_modulation} outputs",
        f"{STEPS * outputs_of_modulation / 1e6:.1f} MB",
        format_bytes(2 * replaced),
    ]


def main() -> None:
    """Measure, and print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=PUBLISHED)
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--iterations", type=int, default=2)
    args = parser.parse_args()
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    for cells in (HEADER, ["---"] * len(HEADER)):
        print(f"| {' | '.join(cells)} |")
    with torch.no_grad():
        for name in args.names:
            print(f"| {' | '.join(measure(name, args.samples, args.iterations))} |", flush=True)


if __name__ == "__main__":
    main()
