"""Attention's products in an exported model: their names, and the noise that bfloat16 would add to them.

Whether they are computed in bfloat16 is decided where the model is opened, since processors differ in speed; the noise does not
depend on the processor.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import openvino as ov
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from tfmq_exp.deploy.openvino.runtime import BF16_NOISE, attention_nodes, compile_settings

PATH = "__module.unet."  # of the network's modules in names that the frontend gives


def name_attentions(model: Any, attentions: Collection[str]) -> None:
    """Name the products of attentions, whose operands are not quantized, as `{attention}/products`.

    Args:
        model: OpenVINO's, just converted; nodes have the frontend's names.
        attentions: names of the network's attention modules.
    """
    for found, node in attention_nodes(model).items():
        if (name := found.removeprefix(PATH).split("/")[0]) in attentions:
            node.set_friendly_name(f"{name}/products")


def attention_noise(
    model: Any, example: Mapping[str, Tensor], steps: Sequence[int], threads: int | None
) -> dict[str, float]:
    """Largest `bf16_noise` of each attention that `name_attentions` has named, on the operands that reach it in the model.

    Args:
        model: OpenVINO's, as it is exported; it is not changed.
        example: keyword arguments of a forward pass, of which the first row is used; the timestep is ignored.
        steps: indices of sampling steps.
        threads: None leaves the number to OpenVINO.
    """
    tapped = model.clone()
    nodes = {
        name.removesuffix("/products"): node for name, node in attention_nodes(tapped).items() if "/products" in name
    }
    if not nodes:
        return {}
    tapped.add_outputs([operand for node in nodes.values() for operand in node.input_values()])
    given = {name: value[:1].numpy() for name, value in example.items() if name != "timestep"}
    shapes: dict[Any, list[int]] = {name: list(value.shape) for name, value in given.items()}
    tapped.reshape({**shapes, "step": []})
    compiled, noise = (
        ov.Core().compile_model(tapped, "CPU", compile_settings(threads, "f32")),
        dict.fromkeys(nodes, 0.0),
    )
    for step in steps:
        _, *out = compiled({**given, "step": torch.tensor(step).numpy()}).to_tuple()
        operands = iter([torch.from_numpy(x)[0] for x in out])
        for name in nodes:
            noise[name] = max(noise[name], bf16_noise(next(operands), next(operands), next(operands)))
    return noise


def bf16_noise(
    q: Float[Tensor, "heads queries width"], k: Float[Tensor, "heads keys width"], v: Float[Tensor, "heads keys width"]
) -> float:
    """Mean squared error of attention in bfloat16, over that of its output in eight bits.

    In bfloat16, operands, probabilities and output are rounded, while sums and the softmax are float32. Eight bits over the
    output's range have a step of (max - min) / 255 and the error step^2 / 12.
    """
    exact, rounded = [], []
    for operands in zip(q, k, v, strict=True):  # one head at a time: probabilities are [queries, keys]
        exact.append(F.scaled_dot_product_attention(*(x[None] for x in operands))[0])
        a, b, c = (x.bfloat16().float() for x in operands)
        probabilities = (a @ b.T * a.shape[-1] ** -0.5).softmax(-1)
        rounded.append((probabilities.bfloat16().float() @ c).bfloat16().float())
    y, error = torch.stack(exact).double(), torch.stack(rounded).double() - torch.stack(exact).double()
    step = max(float(y.max() - y.min()), torch.finfo(torch.float32).tiny) / 255
    return float(error.square().mean()) / (step**2 / 12)


def attention_rows(noise: Mapping[str, float], bf16: bool) -> list[dict[str, Any]]:
    """Rows of the manifest: how each attention's products are executed, with the reason for floating point.

    Args:
        noise: result of `attention_noise`.
        bf16: whether bfloat16 is used on this processor.
    """
    rows = list[dict[str, Any]]()
    for name, share in noise.items():
        quiet, told = share <= BF16_NOISE, f"{share:.2g} of the noise of eight bits"
        executed, note = ("bf16", f"adds {told}") if bf16 and quiet else ("float", "")
        why = "" if executed == "bf16" else "bf16 is not faster on this processor"
        why = why if quiet else f"bf16 would add {told}, above {BF16_NOISE}"
        rows.append({"attention": name, "noise": share, "executed": executed, "note": note, "why": why})
    return rows
