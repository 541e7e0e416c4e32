"""Maps of attention to words, against attention that is written out from the modules' own layers."""

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers.diagnosis import Subject, subject_of
from tfmq_exp.core.seeds import Stream
from tfmq_exp.diagnostics.attention_maps import AttentionMaps, grid, probabilities
from tfmq_exp.diagnostics.block_similarity import BlockSimilarity
from tfmq_exp.diagnostics.sensitivity import THIRDS, float_units, quantized_units

PLACES = {"cat": {0: [1, 2]}, "sea": {0: [3], 2: [0]}}


def recorded(subject: Subject, batch: int = 2) -> AttentionMaps:
    maps = AttentionMaps(PLACES, (4, 8, 8), 4)
    given = subject.model, subject.denoiser, subject.structure, subject.sampling
    BlockSimilarity(*given, seed=0).measure(3, batch, maps)
    return maps


@pytest.fixture(scope="module", params=[True, False], ids=["quantized operands", "float operands"])
def conditional(request: pytest.FixtureRequest, tiny_conditional_unet: nn.Module) -> Subject:
    return subject_of(tiny_conditional_unet, **({} if request.param else {"attention": None}))


def written_out(subject: Subject, image: int, tokens: list[int]) -> list[Tensor]:
    """Share of the float network's attention at every call, mean over heads, blocks and positions kept as [64 or 16]."""
    found: list[list[Tensor]] = []

    def attend(module: Any, _args: Any, given: dict[str, Any], _out: Any, x: Tensor | None = None) -> None:
        if given.get("encoder_hidden_states") is None:
            return
        q, k = module.to_q(_args[0])[-3:], module.to_k(given["encoder_hidden_states"])[-3:]
        heads = [part.unflatten(-1, (module.heads, -1)).transpose(1, 2)[image] for part in (q, k)]
        scores = torch.einsum("hpd,htd->hpt", *heads) / heads[0].shape[-1] ** 0.5
        found[-1].append(scores.softmax(-1)[..., tokens].sum(-1).mean(0))

    modules = [m for name, m in subject.network.named_modules() if name.endswith("attn2")]
    handles = [m.register_forward_hook(partial(attend), with_kwargs=True) for m in modules]
    predict = subject.sampling.predictor(subject.network)
    where = {"seed": 0, "stream": Stream.DIAGNOSTICS, "indices": range(3)}
    found.append([])
    for _ in subject.sampling.trajectory(predict, subject.denoiser, **where):
        found.append([])
    for handle in handles:
        handle.remove()
    return [torch.stack(own).mean(0) for own in found if own]


def test_maps_are_means_over_heads_blocks_and_steps(conditional: Subject) -> None:
    maps = recorded(conditional).maps()
    (positions,) = {key[-1] for key in maps}
    assert {key[:2] for key in maps} == {("cat", 0), ("sea", 0), ("sea", 2)}
    for word, image in (("cat", 0), ("sea", 2)):
        calls = torch.stack(written_out(conditional, image, PLACES[word][image])).double()
        own = maps[word, image, positions][0].flatten(1)
        expected = torch.stack([calls[:2].mean(0), calls[2], calls[3]])  # of four calls, the third is 0, 0, 1, 2
        assert torch.allclose(own, expected, atol=1e-6)


def test_the_quantized_network_differs_and_the_float_one_from_itself_does_not(conditional: Subject) -> None:
    quantized = recorded(conditional).rows()
    assert {row["third"] for row in quantized} == set(THIRDS)
    assert all(row["correlation"] < 1 - 1e-6 for row in quantized)
    assert {row["word"]: row["images"] for row in quantized} == {"cat": 1, "sea": 2}
    units = quantized_units(conditional.model, conditional.network, conditional.structure)
    with float_units(conditional.model, conditional.network, units):
        rows = recorded(conditional).rows()
    for row in rows:
        assert row["correlation"] == pytest.approx(1, abs=1e-5)
        assert row["quantized"] == pytest.approx(row["float"], abs=1e-6)
        assert 0 < row["float"] < 1


def test_batches_make_no_difference_and_nothing_is_left(conditional: Subject) -> None:
    apart, together = (recorded(conditional, batch).maps() for batch in (2, 3))
    assert all(torch.allclose(apart[key], together[key], atol=1e-5) for key in together)
    for network in (conditional.network, conditional.model.network):
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())


def test_all_words_together_have_all_attention(conditional: Subject) -> None:
    maps = AttentionMaps({"all": {1: range(5)}}, (4, 8, 8), 4)
    given = conditional.model, conditional.denoiser, conditional.structure, conditional.sampling
    BlockSimilarity(*given, seed=0).measure(3, 3, maps)
    (own,) = maps.shown().values()
    assert torch.allclose(own, torch.ones_like(own), atol=1e-6)
    assert all(row["float"] == pytest.approx(1, abs=1e-6) for row in maps.rows())


@pytest.mark.parametrize("kind", ["none", "added", "boolean"])
def test_probabilities_are_those_of_torch(kind: str) -> None:
    """Attention to values that are unit vectors is the matrix of probabilities itself."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, 3, n, 8, generator=generator) for n in (7, 5))
    hidden = torch.tensor([[0, 0, 0, 1, 1], [0, 0, 0, 0, 1]]).bool()[:, None, None]
    mask = {"none": None, "added": torch.where(hidden, -1e4, 0.0), "boolean": ~hidden}[kind]
    value = torch.eye(5).expand(2, 3, 5, 5)
    expected = nn.functional.scaled_dot_product_attention(q, k, value, attn_mask=mask, scale=0.3)
    for row in (0, -1):
        found = probabilities({"query": q, "key": k, "attn_mask": mask, "scale": 0.3}, row)
        assert torch.allclose(found, expected[row], atol=1e-6)


def test_positions_are_a_grid_of_the_sample() -> None:
    assert [grid(n, (4, 64, 96)) for n in (6144, 1536, 24)] == [(64, 96), (32, 48), (4, 6)]
    assert grid(9, (3, 5, 5)) == (3, 3)  # strided convolutions round up
    with pytest.raises(ValueError, match="attention of 77 positions is no map"):
        grid(77, (4, 64, 64))
