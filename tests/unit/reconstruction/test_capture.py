"""Captured inputs and outputs are those of whole forward passes."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from tests.conftest import calibrated, quantizable
from tests.helpers.calibration import calibration
from tests.helpers.reconstruction import CPU, structure
from tfmq_exp.calibration.dataset import CalibrationSet
from tfmq_exp.reconstruction.activation_cache import SpillAllocator, TensorTree
from tfmq_exp.reconstruction.capture import Capture, call_unit, groups_within, run_unit, sample_bytes
from tfmq_exp.reconstruction.output_replay import OutputReplay
from tfmq_exp.reconstruction.units import Blockwise


def recorded(
    model: nn.Module, modules: Mapping[str, nn.Module], data: CalibrationSet, batch: int
) -> tuple[dict[str, list[list[Tensor]]], dict[str, list[list[Tensor]]]]:
    """Tensors that go into and come out of modules during whole forward passes."""
    inputs: dict[str, list[list[Tensor]]] = {name: [] for name in modules}
    outputs: dict[str, list[list[Tensor]]] = {name: [] for name in modules}

    def hook(name: str, args: Any, kwargs: Any, output: Any) -> None:
        inputs[name].append([tensor.clone() for tensor in tensors_of((args, kwargs))])
        outputs[name].append([tensor.clone() for tensor in tensors_of(output)])

    handles = [
        module.register_forward_hook(lambda _m, a, k, out, name=name: hook(name, a, k, out), with_kwargs=True)
        for name, module in modules.items()
    ]
    with torch.no_grad():
        for start in range(0, len(data), batch):
            model(**data[slice(start, start + batch)].inputs(CPU))
    for handle in handles:
        handle.remove()
    return inputs, outputs


def tensors_of(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def joined(batches: list[list[Tensor]]) -> list[Tensor]:
    return [torch.cat(parts) for parts in zip(*batches, strict=True)]


def equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return len(some) == len(others) and all(map(torch.equal, some, others))


def test_captured_inputs_are_those_of_a_whole_forward(network: nn.Module) -> None:
    data, model = calibration(network, each=3), calibrated(quantizable(network, weight=3, activation=None))
    units = Blockwise()(structure(network), frozenset(model.weight_layers()))
    modules = {unit.name: unit.module(model.network) for unit in units}
    inputs, outputs = recorded(model, modules, data, 5)
    for name, module in modules.items():
        captured = Capture(data, 5, SpillAllocator(2**30)).inputs(model, module)
        assert equal(captured.tensors, [data.t, *joined(inputs[name])])
        # and the unit can be called again with them; their strides differ, and with them the order of summation
        again = call_unit(module, model.context, captured.structure([tensor[:5] for tensor in captured.tensors]))
        torch.testing.assert_close(tensors_of(again), outputs[name][0], atol=5e-6, rtol=0)
        returned = run_unit(module, model.context, captured, 5, SpillAllocator(2**30))
        torch.testing.assert_close(returned.tensors, joined(outputs[name]), atol=5e-6, rtol=0)


@pytest.mark.parametrize("with_inputs", [False, True])
def test_what_the_float_network_does_is_what_a_whole_forward_does(network: nn.Module, with_inputs: bool) -> None:
    data, parts = calibration(network, each=3), structure(network)
    units = Blockwise()(parts, frozenset(parts.layers))
    modules = {unit.name: unit.module(network) for unit in units}
    views = Capture(data, 5, SpillAllocator(2**30)).activations(network, units, with_inputs=with_inputs)
    inputs, outputs = recorded(network, modules, data, 5)
    sizes = sample_bytes(network, units, data, with_inputs=with_inputs, form="float32")
    assert set(views) == set(modules)
    for name, view in views.items():
        expected = joined(inputs[name]) if with_inputs else []
        assert equal(view.outputs.tensors, joined(outputs[name]))
        assert equal(view.inputs["float"].tensors if view.inputs else [], [data.t, *expected] if with_inputs else [])
        assert sizes[name] * len(data) == sum(tensor.nbytes for tensor in [*view.outputs.tensors, *expected])


def test_capture_stops_where_everything_was_seen(network: nn.Module) -> None:
    data, parts = calibration(network, each=1), structure(network)
    units = [unit for unit in Blockwise()(parts, frozenset(parts.layers)) if unit.name.startswith("down_blocks")]
    beyond: list[int] = []
    handle = network.mid_block.register_forward_hook(lambda *_: beyond.append(1))
    Capture(data, 2, SpillAllocator(2**30)).inputs(network, units[-1].module(network))
    Capture(data, 2, SpillAllocator(2**30)).activations(network, units, with_inputs=True)
    handle.remove()
    assert units
    assert not beyond


def test_no_data_is_refused(tiny_unet: nn.Module) -> None:
    with pytest.raises(ValueError, match="no calibration data"):
        Capture(calibration(tiny_unet)[slice(0, 0)], 2, SpillAllocator(2**30)).inputs(tiny_unet, tiny_unet.conv_in)


def test_groups_are_consecutive_and_within_the_budget() -> None:
    sizes = {"a": 4, "b": 4, "c": 5, "d": 20, "e": 1, "f": 9}
    groups = groups_within(sizes, 10)
    assert groups == [["a", "b"], ["c"], ["d"], ["e", "f"]]


def test_replayed_units_feed_later_ones_the_same_numbers(network: nn.Module) -> None:
    data, model = calibration(network, each=3), calibrated(quantizable(network, weight=3, activation=None))
    units = Blockwise()(structure(network), frozenset(model.weight_layers()))
    replay = OutputReplay(2**30)
    different = []
    for unit in units:
        module = unit.module(model.network)
        run_as_usual = Capture(data, 5, SpillAllocator(2**30)).inputs(model, module)
        with replay.active(5):
            replayed = Capture(data, 5, SpillAllocator(2**30)).inputs(model, module)
        different += [] if all(map(torch.equal, replayed.tensors, run_as_usual.tensors)) else [unit.name]
        replay.add(module, run_unit(module, model.context, replayed, 5, SpillAllocator(2**30)))
    assert len(replay.outputs) == len(units)
    assert not different


def test_the_oldest_outputs_make_room_for_new_ones() -> None:
    units = [nn.Linear(1, 1) for _ in range(4)]
    replay = OutputReplay(budget=100)
    kept = []
    for unit, size in zip(units, (10, 10, 10, 26), strict=True):  # floats
        replay.add(unit, TensorTree(torch.zeros(size)))
        kept.append([units.index(other) for other in replay.outputs])
    assert kept == [[0], [0, 1], [1, 2], []]


def test_units_compute_again_after_a_replay() -> None:
    unit, x = nn.Linear(1, 1), torch.ones(3, 1)
    outputs = torch.arange(5.0)[:, None]
    replay, expected = OutputReplay(budget=100), unit(x)
    replay.add(unit, TensorTree(outputs))
    for _ in range(2):
        with replay.active(3):
            assert torch.equal(torch.cat([unit(x), unit(x[:2])]), outputs)
        assert torch.equal(unit(x), expected)
    with pytest.raises(RuntimeError, match="inside"), replay.active(3):
        raise RuntimeError("inside")
    assert torch.equal(unit(x), expected)
