"""The layout of a network's calls, found in made-up runs whose layout is known."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tfmq_exp.denoisers.denoiser import nested
from tfmq_exp.denoisers.pipelines.call_layout import CallLayout, find_layout, kinds_of, weights_of_sum
from tfmq_exp.denoisers.pipelines.pipeline_calls import GuidanceLayout, PipelineCalls
from tfmq_exp.denoisers.pipelines.recorded_pipeline import RecordedStep, Run

NUMBERS = 12


def guided(results: Tensor) -> Tensor:
    """Guidance 3 of [null, given] results."""
    return results[0] + 3 * (results[1] - results[0])


def run(images: int, *, same: bool = False, steps: int = 2, mix: Any = guided, **extra: Any) -> Run:
    """A run of calls of null and given rows, in which the function `extra` of rows and step adds arguments."""
    generator, made, rows = torch.Generator().manual_seed(images), list[RecordedStep](), 2 * images
    text = torch.cat([torch.zeros(images, 5), torch.arange(images).float()[:, None].expand(-1, 5) + 1])
    for step in range(steps):
        one = torch.randn(NUMBERS, generator=generator)
        results = one.expand(rows, -1) if same else torch.randn(rows, NUMBERS, generator=generator)
        call = {"sample": torch.empty(rows, 3, 2, 2, device="meta"), "t": torch.full((rows,), 9 - step), "text": text}
        call |= {name: make(rows, step) for name, make in extra.items()}
        made.append(RecordedStep([call], [results], mix(results.view(2, images, NUMBERS))))
    return Run("sample", "t", made, {}, torch.arange(steps), torch.zeros(0), False)


def layout(**options: Any) -> CallLayout:
    return find_layout(run(2, **options), run(3, same=True, **options))


def test_rows_constants_and_guidance() -> None:
    found = layout(
        rope=lambda _rows, _step: torch.ones(2, 7),  # as many as images in one of the runs, and no rows
        sizes=lambda rows, _step: {"time": torch.arange(rows), "none": None, "pair": (1, 0.5)},
        texts=lambda rows, _step: [torch.ones(1 + row % 2, 4) for row in range(rows)],
        shapes=lambda rows, _step: [[(1, 4, 4)]] * rows,
    )
    assert found.rows == {"text", "sizes.time", "texts", "texts.lengths"}
    assert found.lists == {"texts", "shapes"}
    assert found.guidance == GuidanceLayout(("null", "given"), 1, (-2.0, 3.0), 1.0)


@pytest.mark.parametrize(
    ("mix", "expected"),
    [
        (lambda r: -(r[0] + 2 * (r[1] - r[0])), (("null", "given"), (1.0, -2.0), -1.0)),
        (lambda r: r[0] + 4 * (r[0] - r[1]), (("given", "null"), (5.0, -4.0), 1.0)),
        (
            lambda r: guided(r) * r[1].norm(dim=-1, keepdim=True) / guided(r).norm(dim=-1, keepdim=True),
            (("null", "given"), None, 1.0),
        ),
        (lambda r: guided(r) + 1, (("null", "given"), None, None)),
        (lambda r: guided(r)[:, : NUMBERS // 2], (("null", "given"), (-2.0, 3.0), 1.0)),  # without a learned variance
    ],
)
def test_weights_of_results(mix: Any, expected: tuple[Any, ...]) -> None:
    guidance = layout(mix=mix).guidance
    assert (guidance.order, guidance.weights, guidance.scale) == expected


def test_weights_that_change_with_the_steps_are_no_sum() -> None:
    steps = [
        (results, scale * results[0])
        for scale, results in zip((1.0, 2.0), torch.randn(2, 2, 3, 8).double(), strict=True)
    ]
    assert weights_of_sum(steps) is None
    assert weights_of_sum(steps[:1]) == (1.0, 0.0)


@pytest.mark.bad_input
@pytest.mark.parametrize("weights", [(1.0, 1.0), (2.0, -1.0, 1.0), (-1.0, -2.0)])
def test_other_results_are_refused(weights: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="guidance moves to"):
        kinds_of(weights)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("extra", "named"),
    [
        ({"clock": lambda _rows, step: step}, "clock changes with the steps"),
        ({"count": lambda rows, _step: rows}, "count depends on the number of images"),
        ({"halves": lambda rows, _step: torch.zeros(rows // 2, 3)}, "halves depends on the number of images"),
        ({"options": lambda rows, _step: {f"of_{rows}": 1}}, "depends on the number of images"),
        ({"names": lambda rows, _step: [str(row) for row in range(rows)]}, "names of the network has other values"),
    ],
)
def test_arguments_that_are_neither_rows_nor_constants_are_refused(extra: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        layout(**extra)


def test_arguments_are_put_together_as_the_network_takes_them() -> None:
    calls = PipelineCalls(
        sample="x",
        timestep="t",
        sample_shape=(3,),
        given={"text": torch.ones(1, 2, 4), "text.lengths": torch.tensor([1]), "sizes.time": torch.ones(1)},
        null={},
        constants={"rope.0": 1, "rope.1": 2, "shapes": [(1, 2)], "sizes.none": None, "mask": 0, "empty": {}},
        guidance=GuidanceLayout(("given",), 1, (1.0,), 1.0),
        timesteps=(1,),
        timestep_dtype="int64",
        set_timesteps={},
        scheduler_timesteps=(1,),
        scheduler_sigmas=(),
        null_constants={"mask": None},
        lists=frozenset({"x", "text", "shapes"}),
    )
    sample, rows = torch.randn(2, 3), {name: value.repeat_interleave(2, dim=0) for name, value in calls.given.items()}
    rows["text.lengths"] = torch.tensor([1, 2])
    found = calls.arguments(sample, torch.tensor([5, 5]), rows)
    assert found.keys() == {"x", "t", "text", "rope", "shapes", "sizes", "mask", "empty"}
    assert isinstance(found["x"], list)
    assert torch.equal(torch.stack(found["x"]), sample)
    assert [tuple(row.shape) for row in found["text"]] == [(1, 4), (2, 4)]
    assert found["rope"] == (1, 2)
    assert found["shapes"] == [[(1, 2)], [(1, 2)]]
    assert found["sizes"]["none"] is None
    assert (found["mask"], found["empty"]) == (0, {})
    assert calls.arguments(sample, sample, rows, null=True)["mask"] is None


def test_more_than_ten_entries_stay_in_order() -> None:
    assert nested({f"rope.{i}": i for i in range(12)}) == {"rope": tuple(range(12))}
