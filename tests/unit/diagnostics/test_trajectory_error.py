"""Errors along the trajectory, against two trajectories written down plainly."""

import pytest
import torch
from torch import Tensor

from tests.helpers.diagnosis import Subject
from tfmq_exp.core.seeds import Stream
from tfmq_exp.diagnostics.trajectory_error import ERRORS, TrajectoryPair


def relative(value: Tensor, expected: Tensor) -> float:
    return float((value - expected).square().mean() / expected.var())


def pair_of(subject: Subject) -> TrajectoryPair:
    sampling = subject.sampling
    return TrajectoryPair(sampling.predictor(subject.model), sampling, subject.denoiser, sampling, seed=0)


def accumulated(subject: Subject, batch: int) -> list[dict[str, float]]:
    steps: list[int] = []
    found = pair_of(subject).accumulation(3, batch, steps.append)
    assert steps == list(range(1, 1 + 4 * -(-3 // batch)))
    return found


def test_errors_are_those_of_two_whole_trajectories(subject: Subject) -> None:
    rows, sampling = accumulated(subject, 3), subject.sampling
    where = {"seed": 0, "stream": Stream.DIAGNOSTICS, "indices": range(3)}
    ask, predict = sampling.predictor(subject.network), sampling.predictor(subject.model)
    conditions = sampling.conditions(subject.denoiser, 0, Stream.DIAGNOSTICS, range(3))
    original = list(sampling.trajectory(ask, subject.denoiser, **where))
    own = list(sampling.trajectory(predict, subject.denoiser, **where))
    with torch.no_grad():
        for row, a, b in zip(rows, original, own, strict=True):
            t = torch.full((3,), a.t)
            assert row["t"] == a.t
            assert row["eps_error"] == pytest.approx(relative(predict(a.x, t, conditions), a.eps), rel=1e-4)
            assert row["own_eps_error"] == pytest.approx(relative(b.eps, ask(b.x, t, conditions)), rel=1e-4)
            assert row["eps_distance"] == pytest.approx(relative(b.eps, a.eps), rel=1e-4)
            assert row["x_error"] == pytest.approx(relative(b.x_next, a.x_next), rel=1e-4)
    first = rows[0]
    assert first["eps_error"] == first["own_eps_error"] == first["eps_distance"]


def test_batches_make_no_difference_and_runs_report_the_same(subject: Subject) -> None:
    together, apart = accumulated(subject, 3), accumulated(subject, 2)
    reported = pair_of(subject).error(3)
    for a, b, c in zip(together, apart, reported, strict=True):
        assert [a[key] for key in ERRORS] == pytest.approx([b[key] for key in ERRORS], rel=1e-3)
        assert (a["eps_error"], a["x_error"]) == pytest.approx((c["eps_error"], c["x_error"]), rel=1e-4)
