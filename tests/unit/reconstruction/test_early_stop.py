"""Early stop of a unit: its samples, and when it checks and ends."""

import pytest
import torch

from tests.unit.reconstruction.test_module import one_layer
from tfmq_exp.reconstruction.context import quiet_trainer
from tfmq_exp.reconstruction.early_stop import EarlyStop, StopOnceSettled
from tfmq_exp.reconstruction.random_batches import RandomRows


def test_samples_are_learned_on_or_held_back() -> None:
    learned, held = EarlyStop(held_out=0.25).split(20, 3, hold_back=True)
    assert len(held) == 5
    assert sorted([*learned.tolist(), *held.tolist()]) == list(range(20))
    assert held.tolist() != list(range(5))
    everything, same = EarlyStop(held_out=0.25).split(20, 3, hold_back=False)
    assert everything.tolist() == sorted(same.tolist()) == list(range(20))


def iterations(rule: EarlyStop, decided: bool, count: int = 60) -> tuple[int, StopOnceSettled]:
    """Iterations that a layer takes until it stops, of 60; its rounding is decided from the start, or never."""
    task, _, rounding = one_layer(penalty=0.0, iterations=count)
    assert task.rounding is not None
    with torch.no_grad():
        task.rounding.v.copy_(torch.where(rounding.v.flatten() > 0, 9.0, -9.0) if decided else torch.zeros(24))
    task.rounding.update()
    stop = StopOnceSettled(rule, task, torch.arange(5))
    rows = RandomRows(torch.arange(5), 8, count, seed=0, chunk=2)
    quiet_trainer(torch.device("cpu"))(max_epochs=1, callbacks=[stop]).fit(task, rows)
    return task.iteration, stop


def test_it_stops_after_checks_without_a_lower_error() -> None:
    stopped, stop = iterations(EarlyStop(every=10, checks=2), decided=True)
    assert stopped == 30  # the first check has the best error, two more do not improve it
    assert stop.done == 3


def test_it_never_stops_while_weights_are_undecided() -> None:
    stopped, stop = iterations(EarlyStop(every=10, checks=1), decided=False)
    assert stopped == 60
    assert stop.best == float("inf")


def test_the_error_is_that_of_the_rows() -> None:
    task, batch, _ = one_layer(penalty=0.0)
    stop = StopOnceSettled(EarlyStop(), task, torch.tensor([4, 1]))
    (error,) = task.losses([x[torch.tensor([4, 1])] for x in batch])[1]
    assert abs(stop.error() - float(error)) < 1e-6


def test_something_is_always_learned_on() -> None:
    learned, held = EarlyStop(held_out=0.999).split(3, 0, hold_back=True)
    assert (len(learned), len(held)) == (1, 2)
    with pytest.raises(ValueError, match=r"EarlyStop\.held_out must be a number, at least 0 and below 1, got 1"):
        EarlyStop(held_out=1)
