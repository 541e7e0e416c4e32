"""Errors for numbers that are not finite, where they arise: a NaN that is averaged, clamped or compared looks like a result."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class NotFiniteError(ValueError):
    """A NaN or an infinity where none may be; the message names the place."""


class DivergedError(NotFiniteError):
    """A loss that is not finite any more.

    Args:
        what: learns, or is trained.
        iteration: counted from 1.
        of: number of iterations.
        loss: its value.
        rates: current learning rates by their keys in the configuration.
    """

    def __init__(self, what: str, iteration: int, of: int, loss: float, rates: Mapping[str, float]) -> None:
        named = " or ".join(f"{key} (now {value:g})" for key, value in rates.items())
        super().__init__(f"{what} diverged: its loss is {loss} at iteration {iteration} of {of}; lower {named}")
        self.what, self.iteration, self.of, self.loss, self.rates = what, iteration, of, loss, rates


def require_finite(x: Tensor, what: str) -> Tensor:
    """Return a tensor whose values are all finite; else NotFiniteError, which counts the others and calls it `what`."""
    if not bool(torch.isfinite(x).all()):
        nans, infinities = int(x.isnan().sum()), int(x.isinf().sum())
        kinds = [f"{count} {name}" for count, name in ((nans, "NaN"), (infinities, "infinite")) if count]
        raise NotFiniteError(f"{what} is not finite: {' and '.join(kinds)} of {x.numel()} values")
    return x


def require_finite_weights(network: nn.Module, what: str) -> None:
    """Check every parameter and buffer of a network; NotFiniteError names the first that is not finite."""
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        require_finite(tensor, f"{what}: {name}")


def relative(error: Tensor, scale: Tensor, what: str) -> Tensor:
    """Divide an error by the size of the exact values; no error is 0, whatever the size. NotFiniteError for x / 0 and NaN."""
    return require_finite(torch.where((error == 0) & (scale == 0), 0, error / scale), f"the relative error of {what}")


@contextmanager
def within(what: str) -> Iterator[None]:
    """Put the current piece of work before the message of a `NotFiniteError`."""
    try:
        yield
    except DivergedError:
        raise
    except NotFiniteError as error:
        raise NotFiniteError(f"{what}: {error}") from error


@contextmanager
def naming_rates(key: str) -> Iterator[None]:
    """Put a key of the configuration before the learning rates that a `DivergedError` names."""
    try:
        yield
    except DivergedError as e:
        rates = {f"{key}.{name}": value for name, value in e.rates.items()}
        raise DivergedError(e.what, e.iteration, e.of, e.loss, rates) from e
