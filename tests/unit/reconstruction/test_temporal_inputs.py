"""The pairs of timestep and condition that the Temporal Information Block learns from."""

from dataclasses import replace

import torch

from tests.helpers.transformers import read_stored
from tfmq_exp.calibration.dataset import CalibrationSet
from tfmq_exp.quant.timestep_context import TimestepContext
from tfmq_exp.reconstruction.temporal_inputs import temporal_inputs


def flux_data(rows: list[tuple[int, int]], pooled: torch.Tensor) -> CalibrationSet:
    """Samples of (step, row of the table of conditions); the table has these pooled texts."""
    data = read_stored("flux_dev").calibration()
    steps, conditions = (torch.tensor(column) for column in zip(*rows, strict=True))
    table = {name: value[torch.zeros(len(pooled), dtype=torch.long)] for name, value in data.conditions.items()}
    table |= {"pooled_projections": pooled, "guidance": torch.full((len(pooled),), 3.5)}
    t = torch.tensor([1.0, 0.75, 0.25], dtype=torch.float64)[steps]
    x = torch.randn(len(rows), *data.x.shape[1:], generator=torch.Generator().manual_seed(0))
    return replace(data, x=x, t=t, step=steps, image=conditions, conditions=table, condition=conditions)


def test_every_pair_comes_once() -> None:
    pooled = torch.randn(4, 10, generator=torch.Generator().manual_seed(1))
    pooled[3] = pooled[0]  # the same prompt twice in the table
    data = flux_data([(0, 0), (0, 1), (0, 0), (1, 3), (1, 0), (2, 2), (0, 3), (2, 2)], pooled)
    t, (rows, given), nothing = (
        tree := temporal_inputs(read_stored("flux_dev").network, data, TimestepContext((1.0, 0.75, 0.25)))
    ).structure(tree.tensors)
    assert nothing == {}
    assert given.keys() == {"pooled_projections", "guidance"}
    assert torch.equal(t, rows)
    assert t.dtype == torch.float32
    pairs = {(float(time), tuple(row.tolist())) for time, row in zip(t, given["pooled_projections"], strict=True)}
    expected = {(float(time), tuple(pooled[i].tolist())) for time, i in ((1.0, 0), (1.0, 1), (0.75, 0), (0.25, 2))}
    assert pairs == expected
    assert len(t) == 4


def test_another_guidance_is_another_pair() -> None:
    pooled = torch.randn(1, 10, generator=torch.Generator().manual_seed(1)).repeat(2, 1)
    data = flux_data([(0, 0), (0, 1)], pooled)
    data = replace(data, conditions={**data.conditions, "guidance": torch.tensor([3.5, 1.0])})
    tree = temporal_inputs(read_stored("flux_dev").network, data, TimestepContext((1.0,)))
    assert len(tree) == 2


def test_classes_are_whole_numbers() -> None:
    stored = read_stored("dit")
    data = stored.calibration(seed=1)
    t, (_, given), _ = (
        tree := temporal_inputs(stored.network, data, TimestepContext(stored.timesteps.tolist()))
    ).structure(tree.tensors)
    assert t.dtype == given["class_labels"].dtype == torch.int64
    classes = len(set(stored.arguments["class_labels"].tolist()))
    assert len(t) == len(stored.timesteps) * classes


def test_without_conditions_every_timestep_comes_once() -> None:
    stored = read_stored("wan21")
    context = TimestepContext((999, 500, 0))
    t, (rows,), given = (tree := temporal_inputs(stored.network, stored.calibration(seed=1), context)).structure(
        tree.tensors
    )
    assert t.tolist() == rows.tolist() == [999, 500, 0]
    assert given == {}
    real = temporal_inputs(
        read_stored("lumina2").network, read_stored("lumina2").calibration(), TimestepContext((0.5, 0.1))
    )
    assert torch.equal(real.tensors[0], torch.tensor([0.5, 0.1]))
