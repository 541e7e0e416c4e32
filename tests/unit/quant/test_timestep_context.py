import pytest
import torch

from tfmq_exp.quant.timestep_context import TimestepContext


def test_every_timestep_finds_its_step():
    context = TimestepContext((751, 501, 251, 1))
    assert context.num_steps == 4
    with context.at(torch.tensor([1, 751, 251, 251])):
        assert context.index.tolist() == [3, 0, 2, 2]


@pytest.mark.parametrize("wrong", [0, 2, 500, 752, 100_000, -1, -250, 501.5])
def test_a_timestep_outside_the_set_is_named(wrong):
    context = TimestepContext((751, 501, 251, 1))
    with (
        pytest.raises(ValueError, match=rf"timestep {wrong} is outside .* 4 timesteps \(1 \.\. 751\)"),
        context.at(torch.tensor([751, wrong])),
    ):
        pass


def test_nearest_reads_the_closest_step():
    context = TimestepContext((751, 501, 251, 1))
    assert context.step_indices(torch.tensor([999, 740, 627, 625, 0, 251]), "nearest").tolist() == [
        0,
        0,
        0,
        1,
        3,
        2,
    ]


@pytest.mark.parametrize(("t", "nearest"), [(625, 501), (626, 751), (627, 751), (376, 501), (375, 251)])
def test_of_two_equally_near_timesteps_the_noisier_is_read(t, nearest):
    context = TimestepContext((751, 501, 251, 1))
    assert context.timesteps[int(context.step_indices(torch.tensor([t]), "nearest"))] == nearest


def test_an_unknown_choice_is_refused():
    with pytest.raises(ValueError, match="outside must be error, nearest or unchecked, got 'closest'"):
        TimestepContext((1,)).step_indices(torch.tensor([1]), "closest")


def test_an_unchecked_timestep_outside_the_set_reads_no_scale():
    context, scales = TimestepContext((751, 501, 251, 1)), torch.ones(4)
    steps = context.step_indices(torch.tensor([751, 500]), "unchecked")
    assert steps[0] == 0
    with pytest.raises(IndexError):
        _ = scales[steps]


def test_a_timestep_visited_twice_keeps_its_first_step():
    assert TimestepContext((9, 5, 5, 0, 0)).step_indices(torch.tensor([9, 5, 0])).tolist() == [0, 1, 3]


def test_reading_an_unset_context_raises():
    context = TimestepContext((1,))
    with pytest.raises(RuntimeError, match="not set"):
        _ = context.index
    with context.at(torch.tensor([1])):
        pass
    with pytest.raises(RuntimeError, match="not set"):
        _ = context.index


def test_blocks_nest_and_survive_exceptions():
    context = TimestepContext((3, 2, 1))
    with context.at(torch.tensor([3])):
        with context.at(torch.tensor([1])):
            assert context.index.tolist() == [2]
        assert context.index.tolist() == [0]
        with pytest.raises(KeyError), context.at(torch.tensor([1])):
            raise KeyError
        assert context.index.tolist() == [0]


def test_an_empty_set_raises():
    with pytest.raises(ValueError, match="at least one"):
        TimestepContext(())


def test_its_tables_follow_the_model_and_are_no_state():
    context = TimestepContext((3, 1))
    assert {name for name, _ in context.named_buffers()} == {"visited"}
    assert not context.state_dict()


def test_timesteps_that_were_checked_before_are_looked_up_alone():
    context = TimestepContext((751, 501, 251, 1))
    context.require((1, 501))
    with pytest.raises(ValueError, match="timestep 2 is outside"):
        context.require((1, 2))
    assert context.step_indices(torch.tensor([1, 501]), "unchecked").tolist() == [3, 1]
