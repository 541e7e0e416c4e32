"""Similarity of blocks, against whole outputs that hooks keep and the estimate as its authors write it."""

from collections import Counter

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.helpers.diagnosis import Subject
from tfmq_exp.core.seeds import Stream
from tfmq_exp.diagnostics import block_similarity
from tfmq_exp.diagnostics.attention_maps import AttentionMaps
from tfmq_exp.diagnostics.block_similarity import BlockSimilarity, examples_of
from tfmq_exp.diagnostics.sensitivity import float_units, quantized_units
from tfmq_exp.quant.timestep_context import Timestep

Rows = list[dict[str, float]]
BLOCK = "mid_block.resnets.1"


def rows_of(subject: Subject, images: int = 3, batch: int = 2) -> Rows:
    given = subject.model, subject.denoiser, subject.structure, subject.sampling
    return BlockSimilarity(*given, seed=0).measure(images, batch, AttentionMaps({}, (4, 8, 8), 4))


def outputs(subject: Subject) -> list[tuple[Timestep, Tensor, Tensor]]:
    """Of a block at every call: float and quantized output on the float trajectory, rows with the condition."""
    kept: dict[str, Tensor] = {}
    networks = {"float": subject.network, "quantized": subject.model.network}
    handles = [
        network.get_submodule(BLOCK).register_forward_hook(
            lambda _m, _a, out, name=name: kept.__setitem__(name, out[-3:])
        )
        for name, network in networks.items()
    ]
    sampling, where = subject.sampling, {"seed": 0, "stream": Stream.DIAGNOSTICS, "indices": range(3)}
    conditions = sampling.conditions(subject.denoiser, *where.values())
    found = []
    for step in sampling.trajectory(sampling.predictor(subject.network), subject.denoiser, **where):
        with torch.no_grad():
            sampling.predictor(subject.model)(step.x, torch.full((3,), step.t), conditions)
        found.append((step.t, kept["float"], kept["quantized"]))
    for handle in handles:
        handle.remove()
    return found


def features(x: Tensor) -> np.ndarray:
    """[positions of all images, channels]"""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]).double().numpy()


def hsic(k: np.ndarray, m: np.ndarray) -> float:
    """HSIC_1 of Song et al. 2012, as Nguyen et al. (arXiv 2010.15327, eq. 3) write it."""
    n, k, m = len(k), k - np.diag(np.diag(k)), m - np.diag(np.diag(m))
    ones = np.ones(n)
    total = ones @ k @ ones * (ones @ m @ ones) / ((n - 1) * (n - 2))
    return float(np.trace(k @ m) + total - 2 / (n - 2) * (ones @ k @ m @ ones)) / (n * (n - 3))


def test_similarities_are_those_of_whole_outputs(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(block_similarity, "POSITIONS", 10**6)
    rows = [row for row in rows_of(subject) if row["block"] == BLOCK]
    for row, (t, exact, own) in zip(rows, outputs(subject), strict=True):
        assert row["t"] == t
        x, y = features(exact), features(own)
        k, m = x @ x.T, y @ y.T
        assert row["cka"] == pytest.approx(hsic(k, m) / (hsic(k, k) * hsic(m, m)) ** 0.5, rel=1e-5)
        assert row["cosine"] == pytest.approx(float((x * y).sum() / ((x * x).sum() * (y * y).sum()) ** 0.5), rel=1e-6)
        assert 0.1 < row["cka"] < 0.999  # neither nothing in common, nor the same


def test_float_against_float_is_1(subject: Subject) -> None:
    units = quantized_units(subject.model, subject.network, subject.structure)
    with float_units(subject.model, subject.network, units):
        rows = rows_of(subject)
    blocks = {block.name for block in subject.structure.blocks}
    assert {row["block"] for row in rows} == blocks - {"time_embedding"}
    assert [row[key] for row in rows for key in ("cka", "cosine")] == pytest.approx([1] * 2 * len(rows), abs=1e-6)


def test_batches_and_minibatches(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batches make no difference but rounding; minibatches make another estimate of nearly the same."""

    def values() -> list[float]:
        return [row["cka"] for row in rows_of(subject, images=6, batch=4)]

    together = values()
    assert [row["cka"] for row in rows_of(subject, images=6, batch=6)] == pytest.approx(together, abs=1e-5)
    monkeypatch.setattr(block_similarity, "MINIBATCH", 3)
    apart = values()
    assert apart != pytest.approx(together, abs=1e-5)
    assert apart == pytest.approx(together, abs=0.05)


def test_each_network_runs_once_for_each_call_and_batch(subject: Subject) -> None:
    count: Counter[str] = Counter()
    networks: dict[str, nn.Module] = {"float": subject.network, "quantized": subject.model.network}
    handles = [m.register_forward_hook(lambda *_, name=name: count.update([name])) for name, m in networks.items()]
    rows_of(subject, images=3, batch=2)
    for handle in handles:
        handle.remove()
    assert count == {"float": 4 * 2, "quantized": 4 * 2}
    assert not any(module._forward_hooks for network in networks.values() for module in network.modules())


def test_examples_are_positions() -> None:
    image, text = torch.arange(2 * 5 * 3.0).view(2, 5, 3), torch.full((2, 4, 3), -1.0)
    both = examples_of((text, image, None), 1, seed=0)
    assert sorted(both.tolist()) == sorted([*text[1].tolist(), *image[1].tolist()])
    maps = torch.arange(2 * 3 * 8 * 8.0).view(2, 3, 8, 8)
    chosen = examples_of(maps, 2, seed=0)
    assert chosen.shape == (2 * 32, 3)
    assert torch.equal(chosen[32:] - chosen[:32], torch.full((32, 3), 192.0))  # the same positions of both images
    assert torch.equal(chosen[:, 1] - chosen[:, 0], torch.full((64,), 64.0))  # features are channels
    assert torch.equal(examples_of(torch.eye(3), 2, seed=0), torch.eye(3)[1:])
