"""Similarity of every block's output features between the float and the quantized network, along the float trajectory."""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tfmq_exp.core.batches import batches
from tfmq_exp.core.finite import require_finite
from tfmq_exp.core.seeds import Stream
from tfmq_exp.denoisers.denoiser import Denoiser
from tfmq_exp.denoisers.structure import NetworkStructure
from tfmq_exp.diagnostics.attention_maps import AttentionMaps
from tfmq_exp.diagnostics.rows import Row
from tfmq_exp.diagnostics.similarity import similarities, similarity_sums
from tfmq_exp.sampling.guidance import Sampling
from tfmq_exp.sampling.trajectory import timestep_rows
from tfmq_exp.surgery.quantized_network import QuantizedNetwork

POSITIONS = 32  # of an image that are examples: the same ones for all images, steps and networks
MINIBATCH = 16  # trajectories


@dataclass(frozen=True)
class BlockSimilarity:
    """Float and quantized network on the same inputs, those of the float trajectory, so that errors add up over blocks alone.

    Under guidance the rows with the condition count. Examples are positions: pixels of a map, tokens of a sequence, of the
    image and, where a block returns both, of the text. Their features are the channels.
    """

    model: QuantizedNetwork
    denoiser: Denoiser  # the float network
    structure: NetworkStructure
    sampling: Sampling
    seed: int  # of the noise, and of the positions

    @property
    def blocks(self) -> list[str]:
        """All but the Temporal Information Block's, whose outputs depend on timestep and condition alone."""
        temporal = {*self.structure.temporal_layers}
        return [block.name for block in self.structure.blocks if not temporal.issuperset(block.layers)]

    def measure(
        self, images: int, batch: int, maps: AttentionMaps, each_call: Callable[[int], None] = lambda _: None
    ) -> list[Row]:
        """Similarities at every network call, each network run once for it.

        Args:
            images: trajectories.
            batch: of them that run together.
            maps: that record attention in the same passes.
            each_call: called with the number of calls that are done, over all minibatches.

        Returns:
            rows with `block`, `kind`, `step`, `t`, and `cka` and `cosine`, see `similarities`; None where they are not defined.
        """
        calls, names = self.sampling.calls(self.denoiser), self.blocks
        sums, done = torch.zeros(len(calls), len(names), 6, dtype=torch.float64), 0
        for minibatch in batches(images, MINIBATCH):
            parts = [minibatch[i : i + batch] for i in range(0, len(minibatch), batch)]
            for call, found in enumerate(self._calls(parts, maps)):
                pairs = ([torch.cat(part) for part in zip(*found[name], strict=True)] for name in names)
                sums[call] += torch.stack([similarity_sums(*pair) for pair in pairs])
                done += 1
                each_call(done)
        found = [[[None if v != v else v for v in one] for one in step] for step in similarities(sums).tolist()]
        kinds = {block.name: block.kind.value for block in self.structure.blocks}
        return [
            {"block": name, "kind": kinds[name], "step": step, "t": t, "cka": cka, "cosine": cosine}
            for step, t in enumerate(calls)
            for name, (cka, cosine) in zip(names, found[step], strict=True)
        ]

    def _calls(
        self, parts: Sequence[range], maps: AttentionMaps
    ) -> Generator[dict[str, list[tuple[Tensor, Tensor]]], None, None]:
        """Examples of every block in the float and in the quantized network, call after call, a pair for each part."""
        calls = self.sampling.calls(self.denoiser)
        start: dict[str, Any] = {"seed": self.seed, "stream": Stream.DIAGNOSTICS}
        predict_float = self.sampling.predictor(self.denoiser.network)
        predict = self.sampling.predictor(self.model.for_timesteps(calls))
        conditions = [self.sampling.conditions(self.denoiser, **start, indices=part) for part in parts]
        trajectories = [self.sampling.trajectory(predict_float, self.denoiser, **start, indices=part) for part in parts]
        for call, t in enumerate(calls):
            found: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in self.blocks}
            for part, given, steps in zip(parts, conditions, trajectories, strict=True):
                with (
                    self._examples(self.denoiser.network, len(part)) as exact,
                    maps.recorded(self.denoiser.network, "float", part, call),
                ):
                    x = next(steps).x
                with (
                    self._examples(self.model.network, len(part)) as quantized,
                    maps.recorded(self.model.network, "quantized", part, call),
                    torch.no_grad(),
                ):
                    predict(x, timestep_rows(t, len(x), x.device), given)
                for name, pairs in found.items():
                    pairs.append((exact[name], quantized[name]))
            yield found

    @contextmanager
    def _examples(self, network: nn.Module, rows: int) -> Generator[Mapping[str, Tensor]]:
        """Record examples of the last rows at every block's output inside this block."""
        found: dict[str, Tensor] = {}
        with ExitStack() as hooks:
            for name in self.blocks:

                def record(_module: nn.Module, _args: Any, output: Any, name: str = name) -> None:
                    found[name] = require_finite(examples_of(output, rows, self.seed), f"the output of {name}")

                hooks.enter_context(network.get_submodule(name).register_forward_hook(record))
            yield found


def examples_of(output: Any, rows: int, seed: int) -> Float[Tensor, "examples channels"]:
    """Examples of a block's output: of its last rows at most `POSITIONS` positions, the same ones in every call.

    Tensors are [rows, channels], [rows, tokens, channels] or [rows, channels, ...]; of several, positions follow one another.
    """
    tensors = [x[-rows:] for x in pytree.tree_leaves(output) if isinstance(x, Tensor)]
    x = torch.cat([x[:, None] if x.dim() == 2 else x if x.dim() == 3 else x.flatten(2).mT for x in tensors], dim=1)
    chosen = torch.randperm(x.shape[1], generator=torch.Generator().manual_seed(seed))[:POSITIONS]
    return x[:, chosen.to(x.device)].flatten(0, 1)
