"""Conversion of a UNet by OpenVINO's frontend, with operations of ours for some of its modules."""

import copy
import itertools
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import openvino.opset13 as ops
import torch
from openvino.frontend import FrontEndManager
from openvino.frontend.pytorch import ConversionExtension, ModuleExtension
from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder
from torch import Tensor, nn

from tfmq_exp.deploy.openvino.graph import GraphOperation, GraphQuantizer, Node, constant
from tfmq_exp.deploy.weight_tables import per_row
from tfmq_exp.quant.timestep_context import TimestepContext, exact_timesteps, network_timesteps

Network = TypeVar("Network", bound=nn.Module)


class UNetWithStepInput(nn.Module):
    """(sample, step, conditions) -> noise: a UNet called with the index of the sampling step instead of the timestep.

    Inputs and outputs of the layers in `taps` are further outputs.
    """

    def __init__(self, network: nn.Module, context: TimestepContext, taps: Sequence["Tap"] = ()) -> None:
        super().__init__()
        self.network, self.context, self.taps = network, context, tuple(taps)
        self.timesteps = network_timesteps(exact_timesteps(context.timesteps))
        self.quantizers = [module for module in network.modules() if isinstance(module, GraphQuantizer)]
        columns = [column for quantizer in self.quantizers for column in quantizer.columns.values()]
        table = torch.stack(columns or [torch.zeros(context.num_steps)], dim=1)
        # quantizers of one tensor have the same columns, and become one where the graph shares equal operations
        self.table, places = table.unique(dim=1, return_inverse=True)
        self.places: list[int] = places.tolist()  # of the quantizers' columns, in their order

    def forward(self, sample: Tensor, step: Tensor, encoder_hidden_states: Tensor | None = None) -> Any:
        """`step` is one number for the whole batch."""
        conditions = {} if encoder_hidden_states is None else {"encoder_hidden_states": encoder_hidden_states}
        row, places = self.table[step].split(1), iter(self.places)
        for quantizer in self.quantizers:
            quantizer.present |= {name: row[next(places)] for name in quantizer.columns}
        rows = sample.shape[0]
        t = self.timesteps[step].expand(rows)
        with self.context.at(t, steps=step.expand(rows)):
            noise = self.network(sample, timestep=t, **conditions).sample
        return (noise, *itertools.chain(*(tap.seen for tap in self.taps))) if self.taps else noise


class Tap(nn.Module):
    """Notes the input and the output of a layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.seen: tuple[Tensor, ...] = ()

    def forward(self, input: Tensor) -> Tensor:
        """Same signature as the layer."""
        self.seen = (input, self.layer(input))
        return self.seen[1]


def shared_copy(network: Network) -> Network:
    """Copy of the modules of a network, whose tensors are those of the network."""
    return copy.deepcopy(network, {id(x): x for x in itertools.chain(network.parameters(), network.buffers())})


def trace(
    network: nn.Module, context: TimestepContext, example: Mapping[str, Tensor], taps: Sequence[Tap] = ()
) -> tuple[Any, dict[GraphOperation, list[Node]]]:
    """Convert a network, its group norms by `group_norm`.

    Args:
        network: the network, which conversion leaves with further attributes: a copy.
        context: of the network; the input `step` is an index into its timesteps.
        example: keyword arguments of a forward pass; all shapes but the batch become those of the converted model.
        taps: in the network, for further outputs.

    Returns:
        OpenVINO's model, and the nodes of every `GraphOperation`, as many as it is called.
    """
    frontend: Any = FrontEndManager().load_by_framework("pytorch")
    modules, nodes = dict[nn.Module, ModuleExtension](), dict[GraphOperation, list[Node]]()

    def build(module: nn.Module, context: Any) -> Any:
        x = context.get_input(0)
        if isinstance(module, nn.GroupNorm):
            return group_norm(module, x).outputs()
        nodes[module].append(node := module.build(x))  # type: ignore[index, operator]
        return node.outputs()

    for i, module in enumerate(network.modules()):
        if isinstance(module, GraphOperation | nn.GroupNorm):
            # no call of the module and no tensor of it in here: the tracer would look them up by the module's name
            shape = torch.zeros_like if isinstance(module, nn.GroupNorm) else module.forward
            modules[module] = ModuleExtension(module, f"tfmq_exp::op{i}", lambda _, x, shape=shape: shape(x))
            frontend.add_extension(ConversionExtension(f"tfmq_exp::op{i}", lambda c, module=module: build(module, c)))
        if isinstance(module, GraphOperation):
            nodes[module] = []
    frontend.add_extension(ConversionExtension("aten::softplus", lambda c: softplus(c.get_input(0)).outputs()))
    inputs = {("step" if name == "timestep" else name): value for name, value in example.items()}
    inputs["step"] = torch.tensor(0)
    # torch's tracer reads every property of a module, those of the context, too
    with context.at(torch.tensor(context.timesteps[:1])), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tracing: shapes that become constants are those of the network
        # as `openvino.convert_model`, without its second trace and minutes of preprocessing that is not needed
        decoder = TorchScriptPythonDecoder(
            UNetWithStepInput(network, context, taps),
            example_input=inputs,
            module_extensions=modules,
            trace_kwargs={"check_trace": False},
        )
        model = frontend.convert(frontend.load(decoder))
    for node in filter(is_times_one, model.get_ordered_ops()):
        node.output(0).replace(node.input_value(1))
    shapes = {name: [-1, *value.shape[1:]] if name != "step" else [] for name, value in inputs.items()}
    model.reshape({port: shapes[port.get_any_name()] for port in model.inputs})
    return model, nodes


def is_times_one(node: Node) -> bool:
    """Whether a node is a product with the constant 1, as of the second summand in the frontend's additions."""
    if node.get_type_name() != "Multiply":
        return False
    factor = node.input_value(0).get_node()
    factor = factor.input_value(0).get_node() if factor.get_type_name() in ("Convert", "ConvertLike") else factor
    return factor.get_type_name() == "Constant" and factor.data.shape == () and factor.data == 1


def group_norm(norm: nn.GroupNorm, x: Node) -> Node:
    """GroupNorm by MVN: the plugin's own GroupNormalization is slow next to quantized operations."""
    grouped = ops.reshape(x, ops.constant([0, norm.num_groups, -1]), True)
    y = ops.reshape(ops.mvn(grouped, ops.constant([2]), True, norm.eps, "INSIDE_SQRT"), ops.shape_of(x), False)
    if not norm.affine:
        return y
    dims = x.get_partial_shape().rank.get_length() - 1
    weight, bias = (constant(per_row(values, dims)) for values in (norm.weight, norm.bias))
    return ops.add(ops.multiply(y, weight), bias)


def softplus(u: Node) -> Node:
    """log(1 + e^u) = max(u, 0) + log1p(y), y = e^-|u|; OpenVINO's own loses the digits of e^u below zero."""
    y = ops.exp(ops.negative(ops.abs(u)))
    log1p = ops.multiply(constant(2.0), ops.atanh(ops.divide(y, ops.add(y, constant(2.0)))))
    return ops.add(ops.maximum(u, constant(0.0)), log1p)
