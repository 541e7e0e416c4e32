"""The average against numbers put together by hand."""

import pytest
import torch
from torch import nn

from tfmq_exp.qat.ema import copy_average, moving_average


@pytest.mark.parametrize(
    ("decay", "expected"),
    [
        (0.9999, [1 * 2 / 11 + 2 * 9 / 11, (1 * 2 / 11 + 2 * 9 / 11) * 3 / 12 + 5 * 9 / 12]),
        (0.2, [1 * 2 / 11 + 2 * 9 / 11, (1 * 2 / 11 + 2 * 9 / 11) * 0.2 + 5 * 0.8]),
        (0.0, [2.0, 5.0]),
    ],
)
def test_the_past_weighs_little_at_first_and_then_what_was_asked_for(decay: float, expected: list[float]) -> None:
    parameter = nn.Parameter(torch.tensor([1.0, 1.0], dtype=torch.float64))
    average = moving_average([parameter], decay)
    found = []
    for value in (2.0, 5.0):
        with torch.no_grad():
            parameter.fill_(value)
        average.update_parameters(nn.ParameterList([parameter]))
        (mean,) = average.module.parameters()
        found.append(float(mean[0]))
    assert found == pytest.approx(expected)
    copy_average(average, [parameter])
    assert parameter.tolist() == pytest.approx([expected[-1]] * 2)
