"""Errors of sampling with a quantized network against sampling with the float one, and how they accumulate over the steps."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from tfmq_exp.core.batches import batches
from tfmq_exp.core.finite import relative
from tfmq_exp.core.seeds import Stream
from tfmq_exp.denoisers.denoiser import Conditions, Denoiser
from tfmq_exp.diagnostics.rows import Row
from tfmq_exp.sampling.guidance import Sampling
from tfmq_exp.sampling.trajectory import Predict, Step, timestep_rows

ERRORS = ("eps_error", "own_eps_error", "eps_distance", "x_error")


class StepPair(NamedTuple):
    """A sampling step of the float and of the quantized trajectory, which start from the same noise."""

    exact: Step
    quantized: Step
    forced: Tensor  # the quantized network's prediction on the float trajectory (teacher forcing)
    conditions: Conditions


@dataclass(frozen=True)
class TrajectoryPair:
    """Sampling with the quantized and with the float network, step by step from the same noise."""

    predict: Predict  # the quantized network's
    quantized: Sampling  # that goes with it
    denoiser: Denoiser  # the float network
    sampling: Sampling  # that goes with it
    seed: int  # of the noise

    def steps(self, indices: Sequence[int]) -> Iterator[StepPair]:
        """The steps of the images with these indices, which run as one batch."""
        start: dict[str, Any] = {"seed": self.seed, "stream": Stream.DIAGNOSTICS, "indices": indices}
        conditions = self.sampling.conditions(self.denoiser, *start.values())
        quantized_steps = self.quantized.trajectory(self.predict, self.denoiser, **start)
        predict_float = self.sampling.predictor(self.denoiser.network)
        for exact in self.sampling.trajectory(predict_float, self.denoiser, **start):
            own = next(quantized_steps)
            # at the first step both are at x_T, where both predictions are known
            forced = _predict_at(self.predict, exact.x, exact.t, conditions) if exact.index else own.eps
            yield StepPair(exact, own, forced, conditions)

    def error(self, images: int, each_step: Callable[[int], None] = lambda _: None) -> list[Row]:
        """Two relative errors of every step: mean squared errors over the variance of the float quantity.

        `eps_error`: of the predicted noise on the float trajectory (what one step does); `x_error`: distance of the two
        trajectories (what has accumulated). `images` run in one batch; `each_step` is called with the index of each step.
        """
        rows: list[Row] = []
        for exact, own, forced, _ in self.steps(range(images)):
            eps_error = _relative(forced, exact.eps, f"the predicted noise at step {exact.index + 1}")
            x_error = _relative(own.x_next, exact.x_next, f"the trajectory at step {exact.index + 1}")
            rows.append({"step": exact.index, "t": exact.t, "eps_error": eps_error, "x_error": x_error})
            each_step(exact.index)
        return rows

    def accumulation(self, images: int, batch: int, each_step: Callable[[int], None] = lambda _: None) -> list[Row]:
        """Four relative errors of every step, in double precision over batches of the first images that `error` compares.

        `each_step` is called with the number of steps that are done, over all batches.

        Returns:
            rows of mean squared errors over the variance of the float quantity. `eps_error`: the prediction on the float
            trajectory (teacher forcing); `own_eps_error`: on the quantized trajectory, against the float network's
            prediction there; `eps_distance`: between the predictions on the two trajectories, which is the last plus what
            has accumulated; `x_error`: between the trajectories after the step.
        """
        calls, predict_float = self.sampling.calls(self.denoiser), self.sampling.predictor(self.denoiser.network)
        sums = torch.zeros(len(calls), len(ERRORS), 4, dtype=torch.float64)
        steps = (pair for indices in batches(images, batch) for pair in self.steps(indices))
        for done, (exact, own, forced, conditions) in enumerate(steps, 1):
            there = _predict_at(predict_float, own.x, exact.t, conditions) if exact.index else exact.eps
            pairs = ((forced, exact.eps), (own.eps, there), (own.eps, exact.eps), (own.x_next, exact.x_next))
            sums[exact.index] += torch.stack([_sums(*values) for values in pairs])
            each_step(done)
        error, total, squares, count = sums.unbind(-1)
        variance = (squares - total.square() / count) / (count - 1)
        errors = relative(error / count, variance, "predictions or trajectories").tolist()
        return [{"step": step, "t": t, **dict(zip(ERRORS, errors[step], strict=True))} for step, t in enumerate(calls)]


@torch.no_grad()
def _predict_at(predict: Predict, x: Tensor, t: float | int, conditions: Conditions) -> Tensor:
    return predict(x, timestep_rows(t, len(x), x.device), conditions)


def _relative(value: Tensor, exact: Tensor, what: str) -> float:
    return float(relative((value - exact).square().mean(), exact.var(), what))


def _sums(value: Tensor, exact: Tensor) -> Float[Tensor, "4"]:
    """Sums of squared differences, of `exact`, of its squares, and the number of values."""
    a, b = value.double(), exact.double()
    return torch.stack([(a - b).square().sum(), b.sum(), b.square().sum(), b.new_tensor(b.numel())]).cpu()
