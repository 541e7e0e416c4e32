"""One run of a pipeline of diffusers with a recorder in the place of its network: what the network and the scheduler are given."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from tfmq_exp.denoisers.loading.network_folder import reason_of

NOT_RECORDED = ("return_dict",)  # the form of the result alone
KEPT = 4096


class Prediction(NamedTuple):
    """A network's result, as pipelines read it: by its name or as the first of a tuple."""

    sample: Any


class Step(NamedTuple):
    """A scheduler's result, as pipelines read it: by name, by place, or unpacked."""

    prev_sample: Tensor
    pred_original_sample: Tensor


class FinishedError(Exception):
    """The end of a run, where all is recorded."""


class NetworkOutline(nn.Module):
    """A network of which a pipeline uses settings and attributes alone: a function is in the place of its forward pass.

    Args:
        network: the network, perhaps without its weights.
        run: takes the arguments by their names, and returns the result.
    """

    def __init__(self, network: Any, run: Callable[[dict[str, Any]], Any]) -> None:
        super().__init__()
        self.__dict__["network"] = network  # no submodule: its device and weights are not this one's
        self.run, self.signature = run, inspect.signature(network.forward)
        self.device, self.dtype = torch.device("cpu"), torch.float32

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["network"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(dict(self.signature.bind(*args, **kwargs).arguments))


@dataclass
class RecordedStep:
    """One step of a scheduler: the network's calls, their results, and the result that the scheduler was given.

    Of samples only the shape is kept, and of results the first `KEPT` numbers of every row.
    """

    calls: list[dict[str, Any]] = field(default_factory=list)
    results: list[Tensor] = field(default_factory=list)
    used: Tensor | None = None


@dataclass(frozen=True)
class Run:
    """A recorded run.

    Args:
        sample: name of the network's argument that is denoised.
        timestep: name of the network's argument that is the timestep.
        steps: in order; of each call all arguments but those of `NOT_RECORDED`.
        set_timesteps: arguments of the scheduler's method.
        timesteps: of the scheduler.
        sigmas: of the scheduler; empty where it has none.
        listed: whether the sample is a list of rows.
    """

    sample: str
    timestep: str
    steps: list[RecordedStep]
    set_timesteps: Mapping[str, Any]
    timesteps: Tensor
    sigmas: Tensor
    listed: bool


def stack_rows(value: Tensor | list[Tensor]) -> Tensor:
    """A sample that is a list of rows as one tensor."""
    return torch.stack(value) if isinstance(value, list) else value


def prediction_shape(network: Any, sample: Tensor) -> tuple[int, ...]:
    """The shape of a network's result: the sample's, with twice the channels where it has learned its variance, too.

    Channels are the last axis of packed samples [batch, tokens, channels], else the second.
    """
    config, shape = network.config, list(sample.shape)
    returned = config.get("out_channels") or vars(network).get("out_channels")
    if config.get("in_channels") and returned == 2 * config["in_channels"]:
        shape[-1 if sample.dim() == 3 else 1] *= 2
    return tuple(shape)


def first_numbers(result: Tensor) -> Tensor:
    """The first numbers of every row."""
    return result.flatten(1)[:, :KEPT].clone()


def plain(value: Any) -> Any:
    """An argument as plain data: arrays as lists of numbers."""
    return value.tolist() if hasattr(value, "tolist") else value


def record_run(
    pipeline: Any,
    network: Any,
    name: str,
    arguments: Mapping[str, Any],
    *,
    equal: bool = False,
    most_steps: int | None = None,
) -> Run:
    """Run a pipeline to the end of its sampling, with random results of a network that is not run.

    Args:
        pipeline: with a scheduler of its own; both are changed.
        network: the denoiser, perhaps without its weights.
        name: of the denoiser among the pipeline's components.
        arguments: of the pipeline's call.
        equal: whether all rows and calls of one step have the same random result, instead of independent ones.
        most_steps: end after these.

    Raises:
        ValueError: the pipeline cannot do with these arguments, or does not run its network as others do.
    """
    names = list(inspect.signature(network.forward).parameters)
    sample_name, timestep_name = names[0], next((n for n in ("timestep", "t") if n in names), "")
    steps, given, listed = [RecordedStep()], dict[str, Any](), set[bool]()
    scheduler = pipeline.scheduler
    set_timesteps, step = scheduler.set_timesteps, scheduler.step

    def forward(call: dict[str, Any]) -> Prediction:
        current = steps[-1]
        sample = stack_rows(call[sample_name])
        listed.add(isinstance(call[sample_name], list))
        shape = prediction_shape(network, sample)
        generator = torch.Generator().manual_seed(len(steps) if equal else 100 * len(steps) + len(current.calls))
        result = torch.randn(shape[1:] if equal else shape, generator=generator).expand(shape).to(sample)
        recorded = {key: value for key, value in call.items() if key not in NOT_RECORDED}
        current.calls.append({**recorded, sample_name: sample.to("meta")})
        current.results.append(first_numbers(result))
        return Prediction(list(result.unbind()) if isinstance(call[sample_name], list) else result)

    @wraps(set_timesteps)
    def recorded_timesteps(*args: Any, **kwargs: Any) -> None:
        bound = inspect.signature(set_timesteps).bind(*args, **kwargs).arguments
        named = {**{key: value for key, value in bound.items() if key != "kwargs"}, **bound.get("kwargs", {})}
        given.update({key: plain(value) for key, value in named.items() if key != "device" and value is not None})
        set_timesteps(*args, **kwargs)

    @wraps(step)
    def recorded_step(model_output: Tensor, *args: Any, **kwargs: Any) -> Any:
        steps[-1].used = first_numbers(model_output)
        if len(steps) == most_steps:
            raise FinishedError
        steps.append(RecordedStep())
        return step(model_output, *args, **kwargs)

    scheduler.set_timesteps, scheduler.step = recorded_timesteps, recorded_step
    setattr(pipeline, name, NetworkOutline(network, forward))
    try:
        pipeline(**arguments)
    except FinishedError:
        pass
    except Exception as error:  # arguments that do not go together fail in any way
        raise ValueError(f"{type(pipeline).__name__} cannot be run with these settings: {reason_of(error)}") from error
    steps = [one for one in steps if one.used is not None]
    if not steps or not all(one.calls for one in steps) or not timestep_name:
        raise ValueError(
            f"{type(pipeline).__name__} does not run its network once or more in every step of its scheduler"
        )
    sigmas = getattr(scheduler, "sigmas", None)
    sigmas = sigmas if isinstance(sigmas, Tensor) else torch.zeros(0)
    return Run(sample_name, timestep_name, steps, given, scheduler.timesteps, sigmas, True in listed)
