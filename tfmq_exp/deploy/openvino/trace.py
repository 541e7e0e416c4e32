"""Conversion of a UNet by OpenVINO's frontend, with operations of ours for some of its modules."""

import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from openvino.frontend import FrontEndManager
from openvino.frontend.pytorch import ConversionExtension, ModuleExtension
from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder
from torch import Tensor, nn

from tfmq_exp.deploy.openvino.fake_quantize import Node
from tfmq_exp.deploy.openvino.graph import group_norm


@dataclass(frozen=True)
class GraphReplacement:
    """Operations for a module of the network.

    Args:
        module: in the network.
        build: makes the operations from the input and, by name, the present sampling step's number of each column.
        columns: what changes with the step, each [steps].
        evaluate: makes an output of the right shape for tracing.
    """

    module: nn.Module
    build: Callable[[Node, Mapping[str, Node]], Node]
    columns: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    evaluate: Callable[[Tensor], Tensor] = torch.zeros_like

    def operations(self, context: Any) -> Any:
        """Convert the traced operation (OpenVINO's `ConversionExtension`)."""
        now = {name: context.get_input(i) for i, name in enumerate(self.columns, start=1)}
        return self.build(context.get_input(0), now).outputs()


class UNetWithStepInput(nn.Module):
    """(sample, step, conditions) -> noise: a UNet called with the index of the sampling step instead of the timestep."""

    table: Tensor
    timesteps: Tensor

    def __init__(self, unet: nn.Module, timesteps: Sequence[int]) -> None:
        super().__init__()
        self.unet = unet
        self.register_buffer("timesteps", torch.tensor(timesteps))
        self.register_buffer("table", torch.zeros(len(timesteps), 1))  # columns of all replacements
        self.row: tuple[Tensor, ...] = ()  # numbers of the present step

    def forward(self, sample: Tensor, step: Tensor, encoder_hidden_states: Tensor | None = None) -> Tensor:
        """`step` is one number for the whole batch."""
        self.row = self.table[step].split(1)
        conditions = {} if encoder_hidden_states is None else {"encoder_hidden_states": encoder_hidden_states}
        return self.unet(sample, self.timesteps[step].expand(sample.shape[0]), **conditions).sample


def trace(
    unet: nn.Module, timesteps: Sequence[int], replacements: Sequence[GraphReplacement], example: Mapping[str, Tensor]
) -> Any:
    """Convert a network with replacements, and group norms with ours; the network itself is not changed.

    Args:
        unet: the network.
        timesteps: of the sampler, in its order; the input `step` is an index into them.
        replacements: modules that are converted by operations of their own.
        example: keyword arguments of a forward pass; all shapes but the batch become those of the converted model.

    Returns:
        OpenVINO's model.
    """
    stepped = UNetWithStepInput(unet, timesteps)
    norms = [module for module in unet.modules() if isinstance(module, nn.GroupNorm)]
    norm_replacements = [
        GraphReplacement(norm, partial(lambda norm, x, _: group_norm(norm, x), norm)) for norm in norms
    ]
    columns: list[Tensor] = []
    frontend: Any = FrontEndManager().load_by_framework("pytorch")
    modules: dict[nn.Module, ModuleExtension] = {}
    for i, one in enumerate([*replacements, *norm_replacements]):
        own, kind = slice(len(columns), len(columns) + len(one.columns)), f"tfmq_exp::op{i}"
        columns += one.columns.values()
        modules[one.module] = ModuleExtension(
            one.module,
            kind,
            evaluate=lambda _, x, *__, evaluate=one.evaluate: evaluate(x),
            convert=lambda _, operation, x, *__, own=own: operation(x, *stepped.row[own]),
        )
        frontend.add_extension(ConversionExtension(kind, one.operations))
    if columns:
        stepped.table = torch.stack(columns, dim=1).to(torch.float32)
    inputs = {("step" if name == "timestep" else name): value for name, value in example.items()}
    inputs["step"] = torch.tensor(0)
    with restored(unet), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tracing: shapes that become constants are those of the network
        # as `openvino.convert_model`, without its second trace and minutes of preprocessing that is not needed
        decoder = TorchScriptPythonDecoder(
            stepped, example_input=inputs, module_extensions=modules, trace_kwargs={"check_trace": False}
        )
        model = frontend.convert(frontend.load(decoder))
    shapes = {name: [-1, *value.shape[1:]] if name != "step" else [] for name, value in inputs.items()}
    model.reshape({port: shapes[port.get_any_name()] for port in model.inputs})
    return model


@contextmanager
def restored(unet: nn.Module) -> Generator[None]:
    """Remove the attributes that OpenVINO's module extensions add to modules."""
    before = {id(module): set(module.__dict__) for module in unet.modules()}
    try:
        yield
    finally:
        for module in unet.modules():
            for name in set(module.__dict__) - before[id(module)]:
                del module.__dict__[name]
