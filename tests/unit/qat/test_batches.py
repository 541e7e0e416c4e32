"""Noisy images against sums over single values."""

import torch

from tfmq_exp.qat.batches import noisy


def test_rows_are_as_noisy_as_their_timesteps() -> None:
    clean, noise = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    alphas = torch.tensor([0.96, 0.36])
    found = noisy(clean, noise, torch.tensor([1, 0]), alphas)
    torch.testing.assert_close(found[0], 0.6 * clean[0] + 0.8 * noise[0])
    torch.testing.assert_close(found[1], 0.96**0.5 * clean[1] + 0.2 * noise[1])
