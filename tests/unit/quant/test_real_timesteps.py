"""Timesteps that are no whole numbers: of flow matching, of EDM, and fractional ones of older schedulers."""

import json
import math
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.transformers import GOLDENS
from tfmq_exp.core.records import decode, encode
from tfmq_exp.quant.scales.observed_ranges import TimestepGroupConfig
from tfmq_exp.quant.timestep_context import Timestep, TimestepContext, exact_timesteps, network_timesteps
from tfmq_exp.surgery.resolve import STORED, ResolvedConfig

FLOW, EDM = (load_file(GOLDENS / part / "samplers.safetensors") for part in ("flow", "edm"))
LISTS = {f"flow.{name}": value for name, value in FLOW.items() if name.endswith((".timesteps", ".network_t"))}
# what EDM's networks are given: c_noise = log(sigma) / 4 (arXiv 2206.00364, table 1)
LISTS |= {f"edm.{name}": sigmas.log() / 4 for name, sigmas in EDM.items() if name.endswith(".sigmas_of_calls")}
EVERY = pytest.mark.parametrize("name", LISTS)


def listed(name: str) -> tuple[Timestep, ...]:
    """A recorded list as a run has it: whole numbers where all are, else the exact values of float32."""
    values = LISTS[name]
    if bool((values == values.round()).all()):
        return tuple(int(t) for t in values)
    return tuple(values.float().double().tolist())


@EVERY
def test_every_list_survives_a_file_exactly(name: str) -> None:
    timesteps = tuple(dict.fromkeys(listed(name)))
    plan = ResolvedConfig({}, {}, timesteps, "error")
    read = decode(json.loads(json.dumps(encode(plan, STORED))), ResolvedConfig, STORED)
    assert read.timesteps == timesteps
    assert [type(t) for t in read.timesteps] == [type(t) for t in timesteps]
    exact = exact_timesteps(read.timesteps)
    assert exact.dtype == (torch.int64 if isinstance(timesteps[0], int) else torch.float64)
    given = network_timesteps(exact)
    assert given.dtype in (torch.int64, torch.float32)
    assert torch.equal(given.double(), torch.tensor(timesteps, dtype=torch.float64))


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_view_of_a_timestep_finds_its_step(name: str, dtype: torch.dtype) -> None:
    timesteps = listed(name)
    first = [timesteps.index(t) for t in timesteps]  # a timestep that comes twice keeps the first of its steps
    context, t = TimestepContext(timesteps), torch.tensor(timesteps, dtype=torch.float64)
    assert context.step_indices(t.to(dtype)).tolist() == first
    # a pipeline that gives its network thousandths, in whatever precision and order it divides
    thousandths = TimestepContext((t / 1000).float().double().tolist())
    for view in (t / 1000, (t / 1000).to(dtype), t.to(dtype) / 1000, t.to(dtype) * 1e-3):
        assert thousandths.step_indices(view).tolist() == first


@EVERY
def test_timesteps_between_two_steps_are_refused(name: str) -> None:
    timesteps = sorted(set(listed(name)))
    context = TimestepContext(timesteps)
    for low, high in pairwise(timesteps):
        for share in (0.5, 0.01, 0.99):
            with pytest.raises(ValueError, match=r"timestep .* is outside the calibrated finite set"):
                context.step_indices(torch.tensor([low + share * (high - low)], dtype=torch.float64))
    for wrong in (math.nan, math.inf, timesteps[-1] + 1.0, timesteps[0] - 1.0):
        with pytest.raises(ValueError, match="outside the calibrated finite set"):
            context.step_indices(torch.tensor([timesteps[0], wrong], dtype=torch.float64))


@pytest.mark.parametrize(
    ("own", "foreign"),
    [
        ("flow.flux_1024x1024", "flow.flux_768x1344"),
        ("flow.flux_768x1344", "flow.flux_1024x1024"),
        ("flow.flux_1024x1024", "flow.flux_512x512"),
        ("flow.sd3_shift3", "flow.hunyuan_video_shift7"),
        ("flow.sdxl_euler_karras", "flow.sdxl_euler_leading"),
    ],
)
@pytest.mark.parametrize("kind", ["timesteps", "network_t"])
def test_lists_of_other_resolutions_are_refused(own: str, foreign: str, kind: str) -> None:
    context = TimestepContext(listed(f"{own}.{kind}"))
    with pytest.raises(ValueError, match="outside the calibrated finite set"):
        context.require(listed(f"{foreign}.{kind}"))
    with pytest.raises(ValueError, match="outside the calibrated finite set"):
        context.step_indices(LISTS[f"{foreign}.{kind}"].float())


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
def test_a_set_of_numbers_alone(wrong: float) -> None:
    with pytest.raises(ValueError, match=f"timesteps must be finite numbers, got {wrong}"):
        TimestepContext((1.0, wrong))


def test_steps_of_negative_and_small_timesteps_are_told_apart() -> None:
    values = listed("edm.heun_18.sigmas_of_calls")
    assert min(values) < 0 < max(values)
    context = TimestepContext(values)
    assert context.step_indices(torch.tensor(values).float()).tolist() == [values.index(t) for t in values]
    assert TimestepContext((1e-3, 1e-4, 0.0)).step_indices(torch.tensor([0.0, 1e-4, 1e-3])).tolist() == [2, 1, 0]


@pytest.mark.parametrize(("t", "nearest"), [(1.05, 0), (0.75, 0), (0.6, 1), (-3.0, 2)])
def test_nearest_reads_the_closest_step(t: float, nearest: int) -> None:
    assert TimestepContext((1.0, 0.5, -1.5)).step_indices(torch.tensor([t]), "nearest").tolist() == [nearest]


def test_whole_numbers_stay_whole() -> None:
    assert TimestepContext((999, 1)).timesteps == (999, 1)
    assert all(type(t) is int for t in TimestepContext((999, 1)).timesteps)
    assert exact_timesteps((999, 1)).dtype == network_timesteps(exact_timesteps((999, 1))).dtype == torch.int64
    assert exact_timesteps((999, 0.5)).tolist() == [999.0, 0.5]


def test_intervals_are_of_training_timesteps() -> None:
    """FLUX is given thousandths, EDM logarithms: they would all fall into one interval."""
    intervals = TimestepGroupConfig(4, 1000)
    assert list(intervals.range_of_step((1000.0, 751.12109375, 250.0, 8.928571701049805))) == [2, 2, 1, 0]
    for timesteps in ((1.0, 0.75, 0.009), (1.0955, -1.5537)):
        with pytest.raises(ValueError, match=r"intervals are parts of the training timesteps 0 \.\. 1000"):
            intervals.range_of_step(timesteps)
