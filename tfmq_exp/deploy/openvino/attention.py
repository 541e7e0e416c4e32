"""Attention's products in an exported model: their names, and the noise that bfloat16 would add to them.

Where the noise allows it, they are computed in bfloat16 if that is faster on the processor on which the model is opened. The noise
does not depend on the processor.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import openvino as ov
import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from tfmq_exp.deploy.openvino.runtime import TILE, attention_nodes, compile_settings

BF16_NOISE = 0.1  # that bfloat16 may add to an attention, as a share of the mean squared error of eight bits
MIN_SCORES = 2**18  # of an attention; with fewer, bfloat16 saves less than a tenth of a millisecond
PATH = "__module.network."  # of the network's modules in names that the frontend gives


class AttentionNoise(NamedTuple):
    """Number of scores of an attention, and its `bf16_noise` by the precision that they are kept in."""

    scores: int
    shares: dict[str, float]


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
) -> dict[str, AttentionNoise]:
    """Largest noise of each named attention at the given steps, on operands that reach it in the model.

    Args:
        model: OpenVINO's, as it is exported; it is not changed.
        example: keyword arguments of a forward pass, of which the first row is used; the timestep is ignored.
        steps: indices of sampling steps.
        threads: None leaves the number to OpenVINO.
    """
    tapped = model.clone()
    named = {name: node for name, node in attention_nodes(tapped).items() if name.endswith("/products")}
    if not named:
        return {}
    tapped.add_outputs([operand for node in named.values() for operand in node.input_values()])
    given = {name: value[:1].numpy() for name, value in example.items() if name != "timestep"}
    shapes: dict[Any, list[int]] = {name: list(value.shape) for name, value in given.items()}
    tapped.reshape({**shapes, "step": []})
    compiled = ov.Core().compile_model(tapped, "CPU", compile_settings(threads, "f32"))
    noise = dict[str, AttentionNoise]()
    for step in steps:
        _, *out = compiled({**given, "step": torch.tensor(step).numpy()}).to_tuple()
        operands = [torch.from_numpy(x)[0] for x in out]
        for name, q, k, v in zip(named, operands[::3], operands[1::3], operands[2::3], strict=True):
            found = noise.setdefault(name.removesuffix("/products"), AttentionNoise(q[..., 0].numel() * k.shape[1], {}))
            for scores in ("bf16", "f32") if q.shape[-1] % TILE == 0 else ("f32",):
                found.shares[scores] = max(found.shares.get(scores, 0.0), bf16_noise(q, k, v, scores))
    return noise


def bf16_noise(
    q: Float[Tensor, "heads queries width"],
    k: Float[Tensor, "heads keys width"],
    v: Float[Tensor, "heads keys width"],
    scores: str,
) -> float:
    """Mean squared error of attention in bfloat16, over that of its output in eight bits.

    In bfloat16, q / sqrt(width), k, v, probabilities, output and, if `scores` is bf16, the scores are rounded; sums and the
    softmax are float32. Eight bits over the output's range have a step of (max - min) / 255 and the error step^2 / 12.
    """
    exact, rounded = list[Tensor](), list[Tensor]()
    for a, b, c in zip(q, k, v, strict=True):  # one head at a time: probabilities are [queries, keys]
        exact.append(F.scaled_dot_product_attention(a[None], b[None], c[None])[0].double())
        products = bf16(a * a.shape[-1] ** -0.5) @ bf16(b).T
        probabilities = (bf16(products) if scores == "bf16" else products).softmax(-1)
        rounded.append(bf16(bf16(probabilities) @ bf16(c)).double())
    y = torch.stack(exact)
    step = max(float(y.max() - y.min()), torch.finfo(torch.float32).tiny) / 255
    return float((torch.stack(rounded) - y).square().mean()) / (step**2 / 12)


def bf16(x: Tensor) -> Tensor:
    """Round to bfloat16."""
    return x.bfloat16().float()


def attention_rows(noise: Mapping[str, AttentionNoise], pays: bool) -> list[dict[str, Any]]:
    """Rows of the manifest: how each attention's products are executed, with the reason for floating point.

    Args:
        noise: result of `attention_noise`; of two precisions of the scores, the first that is quiet enough is chosen.
        pays: whether bfloat16 is faster on this processor.
    """
    rows = list[dict[str, Any]]()
    for name, (count, shares) in noise.items():
        scores, share = next(((s, x) for s, x in shares.items() if x <= BF16_NOISE), (None, shares["f32"]))
        why = "" if scores else f"bf16 would add more than {BF16_NOISE} of the noise of eight bits"
        if count < MIN_SCORES:
            scores, why = None, f"bf16 is not faster with fewer than {MIN_SCORES} scores"
        elif scores and not pays:
            why = "bf16 is not faster on this processor"
        note = f"scores in {scores}, {share:.2g} of the noise of eight bits" if scores and not why else ""
        executed = "float" if why else "bf16"
        row = {"attention": name, "scores": scores, "noise": share, "executed": executed, "note": note, "why": why}
        rows.append(row)
    return rows
