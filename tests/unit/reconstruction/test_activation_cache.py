"""Storage of activations, and random batches of them."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.reconstruction import CPU
from tfmq_exp.reconstruction.activation_cache import SpillAllocator, TensorTree


def test_storage_spills_beyond_its_budget(tmp_path: Path) -> None:
    storage = SpillAllocator(1000, tmp_path)
    first = storage.allocate((10, 25), torch.float32)
    assert not list(tmp_path.rglob("*"))
    second = storage.allocate((3, 7), torch.float64)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert [path.stat().st_size for path in files] == [3 * 7 * 8]
    first.fill_(1)
    second.copy_(torch.arange(21).reshape(3, 7))
    assert (second.shape, second.dtype) == ((3, 7), torch.float64)
    assert files[0].read_bytes() == torch.arange(21, dtype=torch.float64).numpy().tobytes()
    storage.clear()
    assert not list(tmp_path.rglob("*"))
    storage.allocate((250,), torch.float32)
    assert not list(tmp_path.rglob("*"))


@pytest.mark.parametrize("budget", [0, 2**20])
def test_leaves_hold_a_structure_over_all_samples(budget: int) -> None:
    def batch(start: int, stop: int) -> Any:
        rows = torch.arange(start, stop)
        return ((rows.float()[:, None], None), {"flag": True, "nested": [rows, "name"]})

    leaves = TensorTree.like(batch(0, 3), 8, SpillAllocator(budget))
    for start in (0, 3, 6):
        leaves.write(start, batch(start, min(start + 3, 8)))
    rows = torch.tensor([6, 1])
    (x, nothing), further = leaves.structure([tensor[rows] for tensor in leaves.tensors])
    assert x.tolist() == [[6.0], [1.0]]
    assert nothing is None
    assert further["flag"] is True
    assert further["nested"][0].tolist() == [6, 1]
    assert further["nested"][1] == "name"
    assert len(leaves) == 8
    assert leaves.whole[1]["nested"][0].tolist() == list(range(8))
    assert leaves.thinned(2).whole[0][0].tolist() == [[0.0], [4.0]]
    batches = [structure[1]["nested"] for structure in leaves.batches(3, CPU)]
    assert [(rows.tolist(), name) for rows, name in batches] == [
        ([0, 1, 2], "name"),
        ([3, 4, 5], "name"),
        ([6, 7], "name"),
    ]


def test_single_numbers_are_constants() -> None:
    example = {"x": torch.zeros(2, 2), "s": torch.tensor(5.0)}
    leaves = TensorTree.like(example, 4, SpillAllocator(2**20))
    leaves.write(2, example)
    assert leaves.structure([x[2:] for x in leaves.tensors])["s"] == 5
    assert len(leaves) == 4


def test_the_device_comes_first_then_memory_then_the_disk(tmp_path: Path) -> None:
    """With torch's device without numbers in place of a GPU."""
    storage = SpillAllocator(1000, tmp_path, torch.device("meta"), 2000)
    assert storage.capacity == 3000
    devices = [storage.allocate((size,), torch.uint8).device.type for size in (1500, 600, 500, 500)]
    assert devices == ["meta", "cpu", "meta", "cpu"]  # 1500 and 500; 600, and 500 that memory has no room for
    assert [path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()] == [500]
    storage.clear()
    assert storage.allocate((2000,), torch.uint8).device.type == "meta"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_memory_beside_a_gpu_is_page_locked_and_counts_as_torch_takes_it() -> None:
    storage = SpillAllocator(3000, None, torch.device("cuda", 0))
    assert storage.allocate((1025,), torch.uint8).is_pinned()
    assert storage.used == 2048
