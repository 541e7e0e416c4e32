"""Seconds of a network of real size on a device: iterations, GPTQ, images, engines; and of the full recipe, from these."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gpu.measuring import Clock, Row, seconds_of, synchronize
from gpu.networks import Network, learned_unit, recipe_of
from tfmq_exp.core.precision import Precision
from tfmq_exp.core.seeds import Stream
from tfmq_exp.reconstruction.capture import call_unit
from tfmq_exp.reconstruction.closed_form import GPTQConfig, round_layers
from tfmq_exp.reconstruction.random_batches import RandomRows
from tfmq_exp.reconstruction.units import Unit
from tfmq_exp.report.published_tables import find_table, read_published

DEVICE_CACHE = 2**36  # bytes, more than any unit needs here
IMAGES = 16  # that are sampled together
LAUNCHED = 3  # iterations whose launches fit into a device's queue


def iterations_of(quick: bool) -> int:
    """Number of iterations that are timed."""
    return 2 if quick else 20


def iteration_seconds(
    network: Network, unit: Unit, precision: Precision = "float32", device_cache_bytes: int = DEVICE_CACHE
) -> float:
    """Seconds of one iteration of a unit, with its samples loaded as in a run.

    Args:
        network: whose weights have ranges.
        unit: to learn.
        precision: of the unit's products.
        device_cache_bytes: 0 for samples in page-locked memory beside the device.
    """
    count, device = iterations_of(network.quick), network.device
    activations = network.activations(unit, 2 * network.batch, device_cache_bytes)
    recipe = replace(recipe_of(20_000, network.batch), precision=precision)
    with learned_unit(network.learning, unit, activations, recipe, device) as task:
        task.iteration = recipe.iterations // 2  # when the penalty is on
        (rows,) = RandomRows(torch.arange(2 * network.batch), network.batch, count, 0, chunk=count)
        return seconds_of(lambda: task.training_step(rows, 0), device, repeats=1) / count


def calibrate(network: Network) -> list[Row]:
    """Build the networks and set the ranges of all weights."""
    model = network.learning
    network.weight_range_seconds = seconds_of(model.calibrate_weights, network.device, 1, warm_up=0)
    parameters = sum(p.numel() for p in network.denoiser.network.parameters())
    return [
        Row("parameters", parameters),
        Row("weight ranges, 80 candidates", network.weight_range_seconds, "s", "once in a run"),
    ]


def iterations(network: Network, clock: Clock) -> list[Row]:
    """Seconds of an iteration for every unit, the largest and the median first, until the clock has run out."""
    two = network.largest_and_median
    for unit in dict.fromkeys([*two.values(), *network.by_size]):
        if clock.left < 0 and unit not in two.values():
            break
        network.iteration_seconds[unit.name] = iteration_seconds(network, unit)
    seconds, batch = network.iteration_seconds, network.batch
    rows = [
        Row(f"iteration of the {name} unit", seconds[unit.name], "s", f"{unit.name}, batch {batch}")
        for name, unit in two.items()
    ]
    measured = f"{len(network.iteration_seconds)} of {len(network.units)} units measured"
    return [*rows, Row("iteration, sum over all units", summed_iterations(network), "s", measured)]


def summed_iterations(network: Network) -> float:
    """Seconds of an iteration of each unit; units that were not measured in proportion to their multiply-accumulates."""
    measured = [unit for unit in network.units if unit.name in network.iteration_seconds]
    seconds = sum(network.iteration_seconds.values())
    return seconds * sum(map(network.macs, network.units)) / sum(map(network.macs, measured))


def launch_seconds(network: Network, unit: Unit) -> float:
    """Seconds that the host takes to launch an iteration, whose end it does not wait for."""
    activations = network.activations(unit, 2 * network.batch, DEVICE_CACHE)
    with learned_unit(network.learning, unit, activations, recipe_of(20_000, network.batch), network.device) as task:
        (rows,) = RandomRows(torch.arange(2 * network.batch), network.batch, LAUNCHED, 0, chunk=LAUNCHED)
        task.training_step(rows, 0)
        synchronize(network.device)
        began = time.perf_counter()
        task.training_step(rows, 0)
        return (time.perf_counter() - began) / LAUNCHED


def variants(network: Network) -> list[Row]:
    """Iterations of the largest unit in other precisions, and with samples beside the device; launching of iterations."""
    unit = network.largest_and_median["largest"]
    choices: Mapping[str, Any] = {
        "TF32": {"precision": "tf32"},
        "bfloat16": {"precision": "bfloat16"},
        "float32, samples in page-locked memory": {"device_cache_bytes": 0},
    }
    rows = [
        Row(f"iteration of the largest unit, {name}", iteration_seconds(network, unit, **choice), "s")
        for name, choice in choices.items()
    ]
    launches = {name: launch_seconds(network, each) for name, each in network.largest_and_median.items()}
    note = "host alone; where the iteration takes no longer, a CUDA graph could help"
    return [*rows, *(Row(f"launching an iteration of the {name} unit", s, "s", note) for name, s in launches.items())]


def closed_form(network: Network) -> list[Row]:
    """GPTQ of the largest and the median unit, on as many input vectors as in a run."""
    rows = []
    for name, unit in network.largest_and_median.items():
        model, count = network.learning, 2 * network.batch
        inputs, module = network.activations(unit, count, DEVICE_CACHE).inputs["float"], unit.module(model.network)
        layers = {layer: model.layer(layer) for layer in unit.layers}
        config = GPTQConfig(rows=200 if network.quick else 20_000)
        work = partial(round_layers, module, layers, model.context, inputs, config, batch=network.batch, seed=0)
        columns = sum(layer.weight[0].numel() for layer in layers.values())
        note = f"{unit.name}: {len(layers)} layers, {columns} columns, {count} samples"
        rows.append(Row(f"GPTQ of the {name} unit", seconds_of(work, network.device, 1, warm_up=0), "s", note))
        part = next(inputs.batches(network.batch, network.device))
        again = seconds_of(partial(call_unit, module, model.context, part), network.device, 2) / network.batch
        rows.append(Row(f"one more sample of the {name} unit", again * len(layers), "s", "a pass for every layer"))
    return rows


@contextmanager
def channels_last(network: nn.Module) -> Iterator[nn.Module]:
    """A network with its weights in the memory layout that 16-bit convolutions prefer, inside the block."""
    try:
        yield network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    finally:
        network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]


def sampling(network: Network) -> list[Row]:
    """Seconds per image: a few calls of the network times their number, and the first stage."""
    denoiser, device, quick = network.denoiser, network.device, network.quick
    count = 2 if quick else IMAGES
    settings, conditioned = network.sampling, bool(network.noise(1).conditions)
    steps = len(settings.calls(denoiser))
    conditions = settings.conditions(denoiser, 0, Stream.IMAGES, range(count))
    x, t = network.noise(count).x.to(device), torch.full((count,), network.plan.timesteps[0], device=device)

    def call(unet: Callable[..., Any], precision: Precision = "float32") -> float:
        predict = replace(settings, precision=precision).predictor(unet)
        return seconds_of(lambda: predict(x, t, conditions), device, 1 if quick else 3) / count

    unet, simulated = denoiser.network, network.quantized.for_timesteps(network.plan.timesteps)
    found = {"float32": call(unet), "TF32": call(unet, "tf32")}
    with channels_last(unet):
        found["bfloat16, channels last"] = call(unet, "bfloat16")
    found |= {"simulated w4a8, float32": call(simulated), "simulated w4a8, TF32": call(simulated, "tf32")}
    network.row_seconds |= {name: seconds / (2 if settings.guided else 1) for name, seconds in found.items()}
    decode = seconds_of(lambda: denoiser.first_stage.decode(x[:2]), device, 1) / 2
    note = f"{steps} calls{', guided' if settings.guided else ''}{', conditioned' if conditioned else ''}, {count} together"
    return [Row(f"image, {name}", steps * seconds + decode, "s", note) for name, seconds in found.items()]


def engines(network: Network) -> list[Row]:
    """The torchao engine against the simulation, by format: seconds of a call, and the difference of its outputs."""
    if find_spec("torchao") is None:
        return [Row("torchao", "not installed")]
    from tfmq_exp.deploy.torchao.engine import TorchAO  # here: it need not be installed

    rows_ = 2 if network.quick else IMAGES
    given = network.noise(rows_).inputs(network.device)
    given["timestep"] = torch.full_like(given["timestep"], network.plan.timesteps[0])
    repeats, expected = (1 if network.quick else 5), network.quantized(**given).sample
    simulation = seconds_of(lambda: network.quantized(**given), network.device, repeats) / rows_
    rows = [Row("row of a call, simulation", simulation, "s", f"{rows_} rows")]
    for dtype in ("int8", "fp8", "int4"):
        try:
            engine = TorchAO(dtype, network.device.type).open(network.quantized, Path(), batch=rows_)
            seconds = seconds_of(lambda: engine(**given), network.device, repeats) / rows_  # noqa: B023
            error = relative(engine(**given).sample, expected)
        except Exception as problem:  # a device without its kernel, or a version of torchao without it
            rows.append(Row(f"torchao {dtype}", "not executed", "", f"{' '.join(str(problem).split()):.200}"))
            continue
        rows.append(
            Row(f"row of a call, torchao {dtype}", seconds, "s", f"{simulation / seconds:.2f} times the simulation")
        )
        rows.append(Row(f"outputs, torchao {dtype}", error, "mean square", "relative to the simulation's"))
    return rows


def relative(x: Tensor, expected: Tensor) -> float:
    """Mean squared difference, over the mean square of the expected values."""
    return float((x.double() - expected.double()).square().mean() / expected.double().square().mean())


def full_recipe(network: Network) -> list[Row]:
    """Time of TFMQ-DM's recipe from the measured parts, beside the paper's figure.

    States are those of the trajectories that weights learn from; activation ranges see all of them. A unit's inputs are captured
    by a pass of the quantized network that ends there, on average in its middle.
    """
    if not (network.iteration_seconds and network.row_seconds):
        return [Row("estimate", "none", "", "iterations or images were not measured")]
    protocol, calls = network.protocol, network.sampling.calls(network.denoiser)
    calibration, units = protocol["calibration"], len(network.units)
    states = calibration["images"] * len(calls) * (2 if network.sampling.guided else 1)
    samples = states / calibration["step_stride"]
    exact, simulated = network.row_seconds["float32"], network.row_seconds["simulated w4a8, float32"]
    parts = {
        "trajectories": states * exact,
        "weight ranges": network.weight_range_seconds,
        "float outputs of the units": samples * exact,
        "quantized inputs of the units": samples * units / 2 * simulated,
        "iterations": protocol["reconstruction"]["iterations"] * summed_iterations(network),
        "outputs of the learned units": samples * simulated,
        "activation ranges": states * simulated,
    }
    notes = {"iterations": f"{units} units x {protocol['reconstruction']['iterations']} iterations"}
    rows = [Row(f"estimate: {name}", seconds / 3600, "h", notes.get(name, "")) for name, seconds in parts.items()]
    rows.append(Row("estimate: full recipe", sum(parts.values()) / 3600, "h", "from the parts above; not run"))
    return [*rows, *published(network.name)]


def published(model: str) -> list[Row]:
    """The paper's hours for this model, w4a8, if it prints any."""
    found = find_table(read_published(), "TFMQ-DM", "6")
    ours = [row for row in found if (row.model, row.bits, row.method) == (model, "w4a8", "tfmq")]
    notes = [f"{row.reference}, table 6, {row.protocol['device']}, {row.note}" for row in ours]
    hours = [row.scores.get("gpu_hours") for row in ours]
    return [Row("the paper's figure", own, "h", note) for own, note in zip(hours, notes, strict=True) if own]
