"""The loss of temporal features by segments, against a loop over segments."""

import pytest
import torch

from tests.helpers.transformers import NAMES, read_stored
from tfmq_exp.denoisers.families.find import family_of
from tfmq_exp.denoisers.structure import Role
from tfmq_exp.denoisers.temporal import TemporalInformationBlock, temporal_pairs
from tfmq_exp.reconstruction.activation_cache import TensorTree
from tfmq_exp.reconstruction.objectives import Segments


@pytest.mark.parametrize("name", NAMES)
def test_features_of_transformers_are_whole_numbers_of_segments(name: str) -> None:
    network = read_stored(name).network
    width = family_of(network).segment(network)
    assert width
    layers = [layer for layer, role in family_of(network).roles(network).items() if role is Role.TIME_PROJ]
    counts = {network.get_submodule(layer).out_features / width for layer in layers}  # type: ignore[operator]
    assert counts <= {1, 2, 3, 4, 6, 9}


@torch.no_grad()
def test_every_segment_counts_by_its_own_size() -> None:
    stored = read_stored("dit")
    data, network = stored.calibration(), stored.network
    t, given = temporal_pairs(stored.timesteps, {"class_labels": data.conditions["class_labels"]})
    features = TemporalInformationBlock(network, stored.structure())(t, given)
    importance = Segments().feature_importance(network, TensorTree(features))
    assert importance
    width = network.config["num_attention_heads"] * network.config["attention_head_dim"]  # type: ignore[index]
    errors = [torch.randn(x.shape, generator=torch.Generator().manual_seed(i)) for i, x in enumerate(features)]
    expected, energy, relative_energy = 0.0, 0.0, 0.0
    for x, error in zip(features, errors, strict=True):
        for segment in range(x.shape[1] // width):
            part = slice(segment * width, (segment + 1) * width)
            mean_square = float(x[:, part].double().square().mean())
            expected += float(error[:, part].double().square().sum()) / mean_square
            energy += float(x[:, part].double().square().sum())
            relative_energy += x[:, part].numel()
    rows = len(t)
    loss = sum(
        float(Segments().loss(x + error, x, weight)[0])
        for x, error, weight in zip(features, errors, importance.tensors, strict=True)
    )
    assert loss == pytest.approx(expected * energy / relative_energy / rows, rel=1e-4)


def test_a_segment_of_zeros_does_not_outweigh_the_others() -> None:
    network = read_stored("dit").network
    features = torch.randn(4, 96, generator=torch.Generator().manual_seed(0))
    features[:, :16] = 0
    importance = Segments().feature_importance(network, TensorTree((features,)))
    assert importance
    (weight,) = importance.tensors
    assert bool(weight.isfinite().all())
    assert float(weight[:, :16].max() / weight[:, 16:].mean()) < 2000


def test_blocks_are_learned_without_weights() -> None:
    """Only temporal features have segments: a block's loss is the squared error, see `Lp`."""
    x, target = torch.randn(2, 3, 8, 8), torch.zeros(2, 3, 8, 8)
    loss, slope = Segments().loss(x, target, None)
    assert float(loss) == pytest.approx(float(x.square().sum(1).mean()), rel=1e-5)
    assert torch.allclose(slope, 2 * x / (2 * 64))
