"""All scores of one evaluation against torch-fidelity's own program; FID, for which it takes long, and sFID, which it has not,
against the definition.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch_fidelity
from torch import Tensor
from torch.utils.data import Dataset

from tests.helpers.evaluation import TensorDataset, frechet_of_few, measured, pictures, score
from tfmq_exp.evaluation.features import inception_extractor
from tfmq_exp.evaluation.scores import Evaluator

COUNT = 12  # KID's subsets are then all images on both sides, whatever the random numbers
OPTIONS = {"cuda": False, "batch_size": COUNT, "cache": False, "save_cpu_ram": True, "verbose": False}


class Bytes(Dataset[Tensor]):
    """Images as torch-fidelity takes them."""

    def __init__(self, images: Tensor) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor:
        return self.images[index]


def shards(images: Tensor) -> Iterator[Tensor]:
    yield from images.split([5, 1, len(images) - 6])


@pytest.mark.slow
def test_scores_are_those_of_torch_fidelity(inception_file: Path) -> None:
    real, generated = pictures(COUNT, 32, seed=0), pictures(COUNT, 32, seed=2, noise=60)
    extract = inception_extractor(str(inception_file), batch_size=COUNT, device="cpu")
    evaluator = Evaluator("Inception", extract, TensorDataset(real), kid=True, precision_recall=True)
    port, spatial, pooled = extract.network.network, list[Tensor](), list[Tensor]()
    with (
        port.Mixed_6d.register_forward_hook(lambda _module, _inputs, output: spatial.append(output[:, :7])),
        port.AvgPool.register_forward_hook(lambda _module, _inputs, output: pooled.append(output)),
    ):
        ours = score(evaluator, measured(evaluator), shards(generated))
    theirs = torch_fidelity.calculate_metrics(
        input1=Bytes(generated),
        input2=Bytes(real),
        isc=True,
        kid=True,
        prc=True,
        kid_subset_size=COUNT,
        kid_subsets=3,
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(inception_file),
        **OPTIONS,
    )
    pairs = {
        "kid": "kernel_inception_distance_mean",
        "precision": "precision",
        "recall": "recall",
    }
    for name, theirs_name in pairs.items():
        assert ours[name] == pytest.approx(theirs[theirs_name], rel=1e-3), name
    excess = ours["is"] - 1  # random weights hardly tell classes apart
    assert excess > 1e-5
    assert excess == pytest.approx(theirs["inception_score_mean"] - 1, rel=1e-3)
    assert abs(ours["kid"]) > 0.01
    assert 0 < ours["precision"] < 1 or 0 < ours["recall"] < 1
    for name, parts in (("fid", pooled), ("sfid", spatial)):
        rows = torch.cat(parts).permute(0, 2, 3, 1).flatten(1).double().numpy()
        assert ours[name] == pytest.approx(frechet_of_few(rows[:COUNT], rows[COUNT:]), rel=1e-3)
