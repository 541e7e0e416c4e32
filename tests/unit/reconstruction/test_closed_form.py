import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tfmq_exp.quant.layers import QUANT_LAYERS, QuantLayer
from tfmq_exp.quant.observers import MinMax
from tfmq_exp.quant.quantizers import Mode, SplitQuantizer, WeightQuantizer
from tfmq_exp.quant.spec import QuantSpec
from tfmq_exp.quant.timestep_context import TimestepContext
from tfmq_exp.reconstruction.activation_cache import TensorTree
from tfmq_exp.reconstruction.closed_form import GPTQConfig, drawn_vectors, round_layers, shared_inputs

SPEC = QuantSpec(3, "affine", axis=0)
CONTEXT = TimestepContext((1,))


def quantized(layer: nn.Module, split: int | None = None) -> QuantLayer:
    made = QUANT_LAYERS[type(layer)].from_float(layer)
    parts = made.weight.split([split, made.weight.shape[1] - split], dim=1) if split else (made.weight,)
    quantizers = [WeightQuantizer(part, SPEC, MinMax()) for part in parts]
    made.weight_quantizer = SplitQuantizer(quantizers, [p.shape[1] for p in parts]) if split else quantizers[0]
    for quantizer, part in made.weight_parts():
        quantizer.observe(part)
    return made


def stored(x: torch.Tensor) -> TensorTree:
    return TensorTree((torch.ones(len(x), dtype=torch.long), (x,), {}))


CONVOLUTIONS = [
    nn.Conv2d(8, 32, 3, padding=1),
    nn.Conv2d(8, 32, 3, padding=1, stride=2),
    nn.Conv2d(8, 32, 3, padding=2, dilation=2),
    nn.Conv2d(8, 32, 3, padding=1, groups=2),
    nn.Conv2d(8, 32, (1, 3), padding=(0, 1), groups=4),
    nn.Conv2d(8, 32, 1),
    nn.Conv2d(8, 32, 3, padding=1, padding_mode="reflect"),
]


@pytest.mark.parametrize("layer", CONVOLUTIONS, ids=str)
def test_vectors_of_convolutions_give_their_outputs(layer: nn.Conv2d) -> None:
    x = torch.randn(3, 8, 8, 8)
    (vectors,) = drawn_vectors(layer, x, 10**6, torch.Generator())
    weight = layer.weight.reshape(layer.groups, layer.out_channels // layer.groups, -1)
    outputs = (vectors @ weight.transpose(1, 2)).square().sum(dim=1).flatten()
    assert layer.bias is not None
    exact = (layer(x) - layer.bias[:, None, None]).square().sum(dim=(0, 2, 3))
    assert torch.allclose(outputs, exact, rtol=1e-4)


def test_vectors_are_drawn_evenly_and_in_parts() -> None:
    x = torch.arange(2 * 50.0).view(2, 50, 1).repeat(1, 1, 4)
    parts = list(drawn_vectors(nn.Linear(4, 3), x, 20, torch.Generator().manual_seed(0)))
    seen = torch.cat(parts, dim=1)[0, :, 0]
    assert len(seen.unique()) == 40
    assert int((seen < 50).sum()) == 20
    assert [
        part.shape for part in drawn_vectors(nn.Linear(2**20, 1), torch.randn(1, 40, 2**20), 40, torch.Generator())
    ] == [
        (1, 16, 2**20),
        (1, 16, 2**20),
        (1, 8, 2**20),
    ]


@pytest.mark.parametrize(
    ("layer", "split"),
    [*((layer, None) for layer in CONVOLUTIONS), (nn.Conv2d(8, 32, 3), 1), (nn.Linear(8, 32), None)],
    ids=str,
)
def test_a_layer_gets_less_error_than_by_rounding_to_nearest(layer: nn.Module, split: int | None) -> None:
    torch.manual_seed(0)
    x = torch.randn(16, 1, 8, 8) + 0.5 * torch.randn(16, 8, 8, 8)  # channels that say much the same
    x = x.movedim(1, -1).flatten(1, 2) if isinstance(layer, nn.Linear) else x
    nn.init.normal_(layer.weight)  # type: ignore[arg-type]
    made, exact = quantized(layer, split), layer(x)

    def error() -> float:
        for quantizer, _ in made.weight_parts():
            quantizer.mode = Mode.QUANTIZE
        return float((made(x) - exact).square().mean())

    before = error()
    module = nn.Sequential(made)
    round_layers(module, {"0": made}, CONTEXT, stored(x), GPTQConfig(), batch=5, seed=0)
    assert error() < before
    assert int(made.quantized_weight()[0].codes.max()) <= SPEC.qmax


def test_layers_that_read_one_tensor_share_their_moments_and_later_ones_see_rounded_weights() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.out = (quantized(nn.Linear(4, 4)) for _ in range(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.out(self.q(x) + F.silu(self.k(x)))

    module = Attention()
    layers = {"out": module.out, "k": module.k, "q": module.q}
    x = torch.randn(32, 5, 4)
    assert shared_inputs(module, layers, CONTEXT, stored(x)) == [["q", "k"], ["out"]]
    passes: list[int] = []
    module.q.register_forward_pre_hook(lambda _, args: passes.append(len(args[0])))
    round_layers(module, layers, CONTEXT, stored(x), GPTQConfig(), batch=32, seed=0)
    assert passes == [1, 32, 32]  # a probe, a pass for q and k, and one for the output
    assert all(layer.weight_parts()[0][0].rounding is not None for layer in layers.values())


def test_learning_starts_from_the_integers() -> None:
    layer = quantized(nn.Linear(6, 5))
    ((quantizer, weight),) = layer.weight_parts()
    codes = torch.randint(0, 8, (5, 6)).float()
    quantizer.round_to(weight, codes)
    assert (quantizer.codes(weight) == codes).all()
    rounding = quantizer.learn_rounding(weight)
    assert rounding.soft
    inside = (codes > 0) & (codes < 7)
    near = torch.minimum(rounding.h, 1 - rounding.h)
    assert torch.allclose(near[inside], torch.tensor(0.1), atol=1e-6)
    rounding.harden()
    assert (quantizer.codes(weight) == codes).all()
