"""Numbers that are not finite stop where they arise: a NaN that is averaged, clamped or compared looks like a result."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class NotFiniteError(ValueError):
    """A NaN or an infinity where none may be; the message says where."""


class DivergedError(NotFiniteError):
    """A loss that is not finite any more.

    Args:
        what: learns, or is trained.
        iteration: counted from 1.
        of: how many iterations there are.
        loss: its value.
        rates: the learning rates that it has, by their place in the configuration.
    """

    def __init__(self, what: str, iteration: int, of: int, loss: float, rates: Mapping[str, float]) -> None:
        named = " or ".join(f"{key} (now {value:g})" for key, value in rates.items())
        super().__init__(f"{what} diverged: its loss is {loss} at iteration {iteration} of {of}; lower {named}")
        self.what, self.iteration, self.of, self.loss, self.rates = what, iteration, of, loss, rates

    def under(self, key: str) -> "DivergedError":
        """The same where the rates' places are below a key."""
        rates = {f"{key}.{name}": value for name, value in self.rates.items()}
        return DivergedError(self.what, self.iteration, self.of, self.loss, rates)


def require_finite(x: Tensor, what: str) -> Tensor:
    """The tensor itself.

    One reduction, and on a GPU one synchronisation.

    Args:
        x: of any type; integers are always finite.
        what: it is, for the message.

    Raises:
        NotFiniteError: some value is NaN or infinite; says how many of how many, and which kinds.
    """
    if not bool(torch.isfinite(x).all()):
        nans, infinities = int(x.isnan().sum()), int(x.isinf().sum())
        kinds = [f"{count} {name}" for count, name in ((nans, "NaN"), (infinities, "infinite")) if count]
        raise NotFiniteError(f"{what} is not finite: {' and '.join(kinds)} of {x.numel()} values")
    return x


def require_finite_weights(network: nn.Module, what: str) -> None:
    """Look at every parameter and buffer of a network.

    Raises:
        NotFiniteError: names the first tensor with a NaN or an infinity.
    """
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        require_finite(tensor, f"{what}: {name}")


def relative(error: Tensor, scale: Tensor, what: str) -> Tensor:
    """An error over the size of what it is an error of, element by element; no error is 0, whatever the size.

    Args:
        error: at least 0.
        scale: variance or mean square of the exact values, of the same shape.
        what: it is the error of, for the message.

    Raises:
        NotFiniteError: either is not finite, or there is an error and nothing to measure it by.
    """
    return require_finite(torch.where((error == 0) & (scale == 0), 0, error / scale), f"the relative error of {what}")


@contextmanager
def within(what: str) -> Iterator[None]:
    """Put what is being done before the message of a `NotFiniteError`."""
    try:
        yield
    except DivergedError:
        raise
    except NotFiniteError as error:
        raise NotFiniteError(f"{what}: {error}") from error


@contextmanager
def naming_rates(key: str) -> Iterator[None]:
    """Say of what diverges where its learning rates are, which are below a key of the configuration."""
    try:
        yield
    except DivergedError as error:
        raise error.under(key) from error
