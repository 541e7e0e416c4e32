"""Weights into a network: strictly, and without a second copy of them."""

from collections.abc import Mapping

from torch import Tensor, nn


def differences(network: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """The reasons why a state dict is not this network's: names that are missing or unknown, and other shapes."""
    expected = network.state_dict()
    shapes = {name: (tuple(state[name].shape), tuple(expected[name].shape)) for name in expected if name in state}
    kinds = {
        "missing": [name for name in expected if name not in state],
        "not in the architecture": [name for name in state if name not in expected],
        "of another shape": [
            f"{name} {given} instead of {own}" for name, (given, own) in shapes.items() if given != own
        ],
    }
    return [f"{len(names)} {kind}, first {names[0]}" for kind, names in kinds.items() if names]


def assign_weights(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Make these tensors a network's own, as float32; it may have been built on the meta device.

    They are taken over, not copied, where they are contiguous float32 already. The network is left in evaluation mode and
    without gradients.

    Raises:
        ValueError: the tensors are not exactly those of the architecture, or no real numbers: integers of a quantized
            file mean nothing without its scales.
    """
    if problems := differences(network, state):
        raise ValueError(f"the weights do not fit the architecture: {'; '.join(problems)}")
    expected = network.state_dict()
    if wrong := [n for n in expected if expected[n].is_floating_point() and not state[n].is_floating_point()]:
        kind = str(state[wrong[0]].dtype).removeprefix("torch.")
        found = f"{len(wrong)} weights are no floating point numbers, first {wrong[0]} ({kind})"
        raise ValueError(f"{found}: quantized by others?")
    network.load_state_dict({name: value.float().contiguous() for name, value in state.items()}, assign=True)
    network.eval().requires_grad_(False)
