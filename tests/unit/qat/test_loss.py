"""The loss against sums over single values."""

import pytest
import torch

from tfmq_exp.qat.loss import Norm, loss, noisy


def values(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(2, 3, 4, 4, generator=generator).to(dtype) for _ in range(2))
    return first, second


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loss_is_the_mean_over_values_in_float32(norm: Norm, dtype: torch.dtype) -> None:
    predicted, noise = values(dtype)
    pairs = zip(predicted.flatten().tolist(), noise.flatten().tolist(), strict=True)
    errors = [abs(a - b) if norm == "l1" else (a - b) ** 2 for a, b in pairs]
    found = loss(predicted, noise, norm)
    assert found.dtype == torch.float32
    assert float(found) == pytest.approx(sum(errors) / len(errors), rel=1e-5)


def test_rows_are_as_noisy_as_their_timesteps() -> None:
    clean, noise = values(torch.float32)
    alphas = torch.tensor([0.96, 0.36])
    found = noisy(clean, noise, torch.tensor([1, 0]), alphas)
    torch.testing.assert_close(found[0], 0.6 * clean[0] + 0.8 * noise[0])
    torch.testing.assert_close(found[1], 0.96**0.5 * clean[1] + 0.2 * noise[1])
