"""Calls of modules, recorded while a network runs."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn


class StopForward(Exception):  # noqa: N818 - a signal, not an error
    """Raised by a hook once everything is captured: the rest of the network need not run."""


@contextmanager
def recorded_calls(modules: Mapping[str, nn.Module], *, before: bool = False) -> Iterator[dict[str, tuple[Any, ...]]]:
    """Record (args, kwargs, output) of every module's latest call, by name; without the output, `before` it runs.

    A forward pass stops once all are there. Clear them between passes.
    """
    calls: dict[str, tuple[Any, ...]] = {}

    def record(name: str, call: tuple[Any, ...]) -> None:
        calls[name] = call
        if len(calls) == len(modules):
            raise StopForward

    with ExitStack() as hooks:
        for name, module in modules.items():
            register = module.register_forward_pre_hook if before else module.register_forward_hook
            hooks.enter_context(register(lambda _, *call, _name=name: record(_name, call), with_kwargs=True))
        yield calls
