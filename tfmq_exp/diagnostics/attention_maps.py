"""Maps of the cross-attention that single words get, in the float and in the quantized network.

As Prompt-to-Prompt (arXiv 2208.01626, section 3.1) shows them: means over heads and over the blocks of one resolution.
"""

import math
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float64
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from tfmq_exp.diagnostics.rows import Row
from tfmq_exp.diagnostics.sensitivity import THIRDS
from tfmq_exp.surgery.attention import attention_modules

NETWORKS = ("float", "quantized")
SHOWN = 16**2  # positions, as in Prompt-to-Prompt
MOST_HALVINGS = 8  # of the sample's sides
Places = Mapping[str, Mapping[int, Sequence[int]]]  # word -> image -> places of its tokens in the image's text


class AttentionProbabilities(TorchFunctionMode):
    """Attention of one module to some tokens of some rows, recomputed from its queries and keys inside this block.

    Args:
        tokens: of each row that counts, by its index from the end; several sets of them.
        found: gets for each set the share of attention, [positions], mean over heads, by row and set.
    """

    def __init__(self, tokens: Mapping[int, Sequence[Sequence[int]]], found: dict[tuple[int, int], Tensor]) -> None:
        super().__init__()
        self.tokens, self.found = tokens, found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
            given = dict(zip(names, args, strict=False)) | kwargs
            for row in self.tokens:  # one after the other: all rows would be as large as the network's largest tensors
                self.keep(row, probabilities(given, row))
        result = func(*args, **kwargs)
        if func is Tensor.softmax and result.dim() == 4:  # attention with quantized operands
            for row in self.tokens:
                self.keep(row, result[row])
        return result

    def keep(self, row: int, attention: Float[Tensor, "heads positions tokens"]) -> None:
        """Keep the share of a row's attention that its sets of tokens get."""
        for i, tokens in enumerate(self.tokens[row]):
            self.found[row, i] = attention[..., list(tokens)].sum(-1).mean(0).double().cpu()


def probabilities(given: Mapping[str, Any], row: int) -> Float[Tensor, "heads positions tokens"]:
    """softmax(q k^T / sqrt(width) + mask) of one row, from arguments of `scaled_dot_product_attention`."""
    q, k, mask, scale = given["query"][row], given["key"][row], given.get("attn_mask"), given.get("scale")
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        own = mask.expand(len(given["query"]), *mask.shape[1:])[row]
        scores = scores.masked_fill(~own, -torch.inf) if own.dtype == torch.bool else scores + own
    return scores.softmax(-1)


@dataclass
class AttentionMaps:
    """Sums of maps by word, image, number of positions, network and third of the sampling steps."""

    places: Places
    shape: tuple[int, ...]  # of a sample
    calls: int  # of the network along a trajectory
    sums: dict[tuple[str, int, int], Float64[Tensor, "networks thirds positions"]] = field(default_factory=dict)
    counts: dict[tuple[str, int, int], Float64[Tensor, "networks thirds 1"]] = field(default_factory=dict)

    @contextmanager
    def recorded(
        self, network: nn.Module, name: Literal["float", "quantized"], images: Sequence[int], call: int
    ) -> Generator[None]:
        """Add the cross-attention of one network call, whose last rows are these images, inside this block."""
        rows = {
            i - len(images): {word: own[image] for word, own in self.places.items() if image in own}
            for i, image in enumerate(images)
        }
        rows = {row: words for row, words in rows.items() if words}
        place = NETWORKS.index(name), call * len(THIRDS) // self.calls
        modes: list[AttentionProbabilities] = []

        def enter(_module: nn.Module, _args: Any, given: dict[str, Any]) -> None:
            if given.get("encoder_hidden_states") is not None:
                modes.append(AttentionProbabilities({row: [*words.values()] for row, words in rows.items()}, {}))
                modes[-1].__enter__()

        def leave(_module: nn.Module, _args: Any, given: dict[str, Any], _output: Any) -> None:
            if given.get("encoder_hidden_states") is not None:
                mode = modes.pop()
                mode.__exit__(None, None, None)
                for (row, i), attention in mode.found.items():
                    self._add([*rows[row]][i], images[row], place, attention)

        with ExitStack() as hooks:
            for module in attention_modules(network).values() if rows else ():
                hooks.enter_context(module.register_forward_pre_hook(enter, with_kwargs=True))
                hooks.enter_context(module.register_forward_hook(leave, with_kwargs=True))
            yield

    def _add(self, word: str, image: int, place: tuple[int, int], attention: Float64[Tensor, "positions"]) -> None:
        key, sizes = (word, image, len(attention)), (len(NETWORKS), len(THIRDS))
        zeros = torch.zeros(*sizes, len(attention), dtype=torch.float64), torch.zeros(*sizes, 1, dtype=torch.float64)
        self.sums.setdefault(key, zeros[0])[place] += attention
        self.counts.setdefault(key, zeros[1])[place] += 1

    def maps(self) -> dict[tuple[str, int, int], Float64[Tensor, "networks thirds height width"]]:
        """Means by word, image and number of positions; NaN in a third without steps."""
        return {
            key: (total / self.counts[key]).unflatten(-1, grid(key[-1], self.shape)) for key, total in self.sums.items()
        }

    def shown(self) -> dict[str, Float64[Tensor, "networks thirds height width"]]:
        """For each word the maps of its first image, at the number of positions that is nearest to `SHOWN`."""
        maps, found = self.maps(), dict[str, Tensor]()
        for word, own in self.places.items():
            keys = [key for key in maps if key[:2] == (word, min(own))]
            if keys:
                found[word] = maps[min(keys, key=lambda key: abs(math.log(key[-1] / SHOWN)))]
        return found

    def rows(self) -> list[Row]:
        """Comparison of the maps, in the mean over images.

        Returns:
            rows with `word`, `height`, `width`, `third`; `images` that have the word; `float` and `quantized`, the share of all
            attention that the word gets; `correlation` of the two maps over positions (Pearson's), None where one is even.
        """
        found: dict[tuple[str, int], list[Tensor]] = {}
        for (word, _, positions), maps in self.maps().items():
            found.setdefault((word, positions), []).append(maps)
        rows: list[Row] = []
        for (word, _), maps in sorted(found.items(), key=lambda item: ([*self.places].index(item[0][0]), item[0][1])):
            stacked = torch.stack(maps)  # [images, networks, thirds, height, width]
            height, width = stacked.shape[-2:]
            for third, name in enumerate(THIRDS):
                if bool((pair := stacked[:, :, third].flatten(2)).isnan().any()):
                    continue
                centred = pair - pair.mean(-1, keepdim=True)
                exact, own = (centred / centred.norm(dim=-1, keepdim=True)).unbind(1)
                correlation = float((exact * own).sum(-1).mean())
                shares = dict(zip(NETWORKS, pair.mean((0, 2)).tolist(), strict=True))
                named = {"word": word, "height": height, "width": width, "third": name, "images": len(maps)}
                rows.append({**named, **shares, "correlation": None if math.isnan(correlation) else correlation})
        return rows


def grid(positions: int, shape: Sequence[int]) -> tuple[int, int]:
    """Height and width of a map of so many positions; ValueError if halving a sample of this shape leads to none."""
    sizes = [tuple(-(-side // 2**halvings) for side in shape[-2:]) for halvings in range(MOST_HALVINGS)]
    for height, width in sizes:
        if height * width == positions:
            return height, width
    raise ValueError(f"attention of {positions} positions is no map of a sample of {tuple(shape)}")
