"""Rows of random batches, and loading them."""

import pytest
import torch

from tfmq_exp.reconstruction.random_batches import RandomRows, load_batches

GPU = pytest.param(
    "cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
)


@pytest.mark.parametrize(("samples", "batch"), [(12, 4), (10, 4), (9, 2)])
def test_random_batches_visit_all_rows_once_per_pass(samples: int, batch: int) -> None:
    whole = samples // batch
    batches = list(RandomRows(torch.arange(samples), batch, 5 * whole, seed=3).batches())
    assert [len(rows) for rows in batches] == [batch] * 5 * whole
    passes = [torch.cat(batches[i : i + whole]).tolist() for i in range(0, 5 * whole, whole)]
    assert all(len(set(seen)) == whole * batch for seen in passes)
    assert len({tuple(seen) for seen in passes}) == 5


def test_random_batches_depend_on_the_seed_alone() -> None:
    def drawn(seed: int) -> list[list[int]]:
        return [rows.tolist() for rows in RandomRows(torch.arange(20), 5, 8, seed).batches()]

    assert drawn(1) == drawn(1)
    assert drawn(1) != drawn(2)


def test_few_rows_come_all_at_once() -> None:
    assert [rows.tolist() for rows in RandomRows(torch.arange(4), 8, 3, seed=0).batches()] == [[0, 1, 2, 3]] * 3


@pytest.mark.parametrize(("iterations", "chunk"), [(1, 10), (10, 10), (23, 10), (7, 3)])
def test_batches_come_in_chunks_and_none_is_lost(iterations: int, chunk: int) -> None:
    source = RandomRows(torch.arange(20), 5, iterations, 0, chunk)
    chunks = list(source)
    assert len(chunks) == len(source)
    assert [len(chunk) for chunk in chunks[:-1]] == [chunk] * (len(chunks) - 1)
    flat = [rows.tolist() for chunk in chunks for rows in chunk]
    assert flat == [rows.tolist() for rows in source.batches()]
    assert len(flat) == iterations


@pytest.mark.parametrize("device", ["cpu", GPU])
def test_loaded_batches_are_the_rows_in_their_memory_layout(device: str) -> None:
    plain = torch.randn(9, 4, 6, 5)
    tensors = [plain, plain.to(memory_format=torch.channels_last), torch.arange(9)]
    batches = list(RandomRows(torch.arange(9), 4, 5, seed=0).batches())
    loaded = list(load_batches(tensors, batches, torch.device(device)))
    assert len(loaded) == 5
    for rows, found in zip(batches, loaded, strict=True):
        for x, y in zip(tensors, found, strict=True):
            assert y.device.type == device
            assert torch.equal(y.cpu(), x[rows])
            assert y.stride() == x[rows].stride()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("place", ["device", "page-locked", "memory"])
def test_batches_on_a_gpu_are_the_rows_wherever_the_samples_are(place: str) -> None:
    """Rows of 64 KiB and small ones, while the device is busy with the batches before."""
    device = torch.device("cuda", 0)
    plain = torch.randn(9, 16, 32, 33)
    samples = [plain, plain.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2), torch.arange(9)]
    stored = [{"device": x.to, "page-locked": x.pin_memory, "memory": x.to}[place] for x in samples]
    given = [move(device) if place == "device" else move("cpu") if place == "memory" else move() for move in stored]
    batches = list(RandomRows(torch.arange(9), 4, 50, seed=0).batches())
    busy = torch.randn(2048, 2048, device=device)
    for rows, found in zip(batches, load_batches(given, batches, device), strict=True):
        for _ in range(5):
            busy = torch.tanh(busy @ busy)
        kept = [x.clone() for x in found]
        del found
        for x, y in zip(samples, kept, strict=True):
            assert torch.equal(y.cpu(), x[rows])
            assert y.stride() == x[rows].stride()
