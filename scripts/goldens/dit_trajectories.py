"""Trajectories around original DiT networks: respaced DDPM with a learned variance, DDIM, and guidance of three channels."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from goldens.comparing import EXACT, DamagedError, Group, Record
from goldens.trajectories import follow
from tfmq_exp.denoisers.denoiser import Conditions, noise_of
from tfmq_exp.sampling.ancestral import DDPM
from tfmq_exp.sampling.samplers import DDIM
from tfmq_exp.sampling.trajectory import Predict

GUIDED = 3  # channels; the original guides the first three of four "for exact reproducibility", and so do its published numbers
TOLERANCES = {"": 2e-6, "_f64": 1e-11}  # relative to the largest value
LABELS = "class_labels"


def sampler_of(respacing: str, loop: str, eta: float | None, *, learned: bool) -> DDIM | DDPM:
    """Our sampler for a respacing of the original (`250`: from end to end, `ddim50`: every 20th) and a loop of it.

    Raises:
        DamagedError: a respacing or a loop that there is none for.
    """
    count = respacing.removeprefix("ddim")
    if not count.isdecimal() or loop not in ("p", "ddim"):
        raise DamagedError(f"there is no sampler for the respacing {respacing!r} and the loop {loop!r}")
    spacing = "uniform" if respacing.startswith("ddim") else "ends"
    if loop == "ddim":
        return DDIM(int(count), eta or 0.0, spacing, steps_offset=0, set_alpha_to_one=True)
    return DDPM(int(count), "learned" if learned else "large", spacing)


def predictor(network: Any, guidance: float | None, *, whole: bool) -> Predict:
    """The network as a function of (x, t, conditions), with the original's guidance where there is a scale.

    Args:
        network: that of diffusers.
        guidance: its scale; None for none.
        whole: return the weights of the variance after the noise, too.
    """

    def predict(x: Tensor, t: Tensor, conditions: Conditions) -> Tensor:
        labels = conditions.given[LABELS]
        if guidance is None:
            output = network(x, t, labels).sample
        else:
            null = conditions.null[LABELS].expand_as(labels)
            both = network(torch.cat([x, x]), torch.cat([t, t]), torch.cat([labels, null])).sample
            with_class, without = both.chunk(2)
            guided = without[:, :GUIDED] + guidance * (with_class[:, :GUIDED] - without[:, :GUIDED])
            output = torch.cat([guided, with_class[:, GUIDED:]], dim=1)  # the others stay those of the class
        return output if whole else noise_of(output, x)

    return predict


def end_to_end(
    name: str,
    key: str,
    run: Record,
    recorded: Record,
    network: Mapping[str, Any],
    schedule: Mapping[str, Any],
    learned: bool,
) -> Iterator[Group]:
    """One run of the original program, in single and double precision.

    Args:
        name: of the groups.
        key: prefix of its recordings.
        run: its settings.
        recorded: of its network.
        network: by suffix of the precision.
        schedule: the noise of training.
        learned: whether the network returns weights of its variance.
    """
    sampler = sampler_of(run["respacing"], run["loop"], run["eta"], learned=learned)
    timesteps = Group(f"{name}: timesteps", EXACT)
    for golden in (run["timesteps"], recorded[f"{key}.timesteps"]):
        timesteps.compare(sampler.calls(schedule), golden)
    yield timesteps
    null = torch.tensor([network[""].config.num_embeds_ada_norm])  # the row after those of the classes
    conditions = Conditions({LABELS: recorded[f"{key}.y"]}, {LABELS: null})
    whole = isinstance(sampler, DDPM) and sampler.variance == "learned"
    noise = recorded[f"{key}.noise"] if sampler.eta else ()
    for suffix, tolerance in TOLERANCES.items():
        golden = recorded[f"{key}.traj{suffix}"]
        group = Group(f"{name}{suffix}", tolerance)
        predict = predictor(network[suffix], run["cfg"], whole=whole)
        group.compare(follow(predict, sampler, schedule, golden[0], noise, conditions), golden)
        yield group


def timestep_lists(lists: Mapping[str, list[int]], schedule: Mapping[str, Any]) -> Group:
    """The timesteps that the original visits for each respacing."""
    group = Group("dit: timesteps of respacings", EXACT)
    for respacing, golden in lists.items():
        group.compare(sampler_of(respacing, "p", None, learned=False).calls(schedule), golden)
    return group
