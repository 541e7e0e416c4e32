"""The penalty of trained ranges, and how ranges and their networks start."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from tests.conftest import TIMESTEPS, example_inputs
from tests.properties.test_trained import FORMS, TDQ, begun, qat_network, trained
from tfmq_exp.core.records import decode, encode
from tfmq_exp.qat.model import observe, penalty, ready
from tfmq_exp.quant.observers import AbsMax
from tfmq_exp.quant.qat_functions import Lsq, Nipq, Pact
from tfmq_exp.quant.quantizers import Mode
from tfmq_exp.quant.scales.dynamic import DynamicConfig
from tfmq_exp.quant.scales.observed_ranges import EMARange, PerStepConfig, StaticConfig
from tfmq_exp.quant.spec import IntRangeKind, QuantSpec, Scheme
from tfmq_exp.quant.timestep_context import TimestepContext
from tfmq_exp.surgery.config import (
    AttentionBits,
)
from tfmq_exp.surgery.resolve import STORED, ActivationConfig


def test_penalty_of_static_clip_values_by_hand(tiny_unet: nn.Module) -> None:
    model = begun(qat_network(tiny_unet, Pact(decay=0.25), StaticConfig(), weights=Lsq()))
    clips = [float(q.scale_provider.scale.detach()) * 3 for q in model.activation_quantizers().values()]  # type: ignore[arg-type]
    assert penalty(model).item() == pytest.approx(0.25 * sum(clip**2 for clip in clips), rel=1e-5)
    penalty(model).backward()
    for quantizer in model.activation_quantizers().values():
        expected = 0.25 * 2 * 9 * float(quantizer.scale_provider.scale.detach())  # type: ignore[arg-type]
        assert float(quantizer.scale_provider.scale.grad) == pytest.approx(expected, rel=1e-5)  # type: ignore[arg-type, union-attr]


def test_penalty_of_generated_clip_values_is_their_mean_over_the_finite_set(tiny_unet: nn.Module) -> None:
    model = trained(begun(qat_network(tiny_unet, Pact(decay=0.25), TDQ, weights=Lsq()))).eval()
    tables = [q.scale_provider.table().scale for q in model.activation_quantizers().values()]  # type: ignore[operator]
    by_hand = sum(0.25 * (3 * table).double().square().mean().item() for table in tables)
    assert penalty(model).item() == pytest.approx(by_hand, rel=1e-5)
    assert penalty(model).requires_grad


def test_layers_that_are_one_in_the_original_are_penalised_once(tiny_unet: nn.Module) -> None:
    """q, k and v with one clip value: its gradient is that of one quantizer, static or of a network."""
    for scale in (StaticConfig(), TDQ):
        tied, free = (
            begun(qat_network(tiny_unet, Pact(decay=0.25), scale, weights=Lsq(), further={"tie_qkv": tie}))
            for tie in (True, False)
        )
        quantizers = free.activation_quantizers()
        sources: list[Any] = [
            q.scale_provider for name, q in quantizers.items() if not {"to_k", "to_v"} & set(name.split("."))
        ]
        assert len(sources) < len(quantizers)
        clips = [float((s.table().scale if scale is TDQ else s.scale).detach().square().mean()) for s in sources]
        assert penalty(tied).item() == pytest.approx(0.25 * 9 * sum(clips), rel=1e-5)


def test_every_network_starts_on_its_own(tiny_unet: nn.Module) -> None:
    """And all of them as the seed says."""
    first, again, other = (
        begun(qat_network(tiny_unet, Lsq(), replace(TDQ, seed=seed), attention=AttentionBits(3, 4)))
        for seed in (0, 0, 1)
    )
    starts = [
        [q.scale_provider.mlp[0].weight.detach() for q in model.activation_quantizers().values()]  # type: ignore[index, union-attr]
        for model in (first, again, other)
    ]
    assert all(torch.equal(a, b) for a, b in zip(starts[0], starts[1], strict=True))
    different = [start.sum().item() for start in (*starts[0], *starts[2])]
    assert len(set(different)) == len(different)


@pytest.mark.parametrize("kind", ["full", "narrow", "tdq_release"])
@pytest.mark.parametrize(("scheme", "bits"), [("symmetric", 3), ("symmetric", 4), ("unsigned", 3), ("unsigned", 4)])
def test_ranges_at_run_time_keep_their_largest_value(kind: IntRangeKind, scheme: Scheme, bits: int) -> None:
    config = DynamicConfig("sample").for_qat(AbsMax(), kind).tabulated()
    line = decode(
        encode(ActivationConfig((QuantSpec(bits, scheme),), config, Lsq(kind)), STORED), ActivationConfig, STORED
    )
    quantizer: Any = line.quantizer(TimestepContext(TIMESTEPS))
    quantizer.mode = Mode.QUANTIZE
    x = torch.rand(3, 40, generator=torch.Generator().manual_seed(0)) + 0.1
    torch.testing.assert_close(quantizer.eval()(x).amax(dim=1), x.amax(dim=1))
    assert quantizer(x).unique().numel() > 3


def test_other_forms_have_no_penalty(tiny_unet: nn.Module) -> None:
    assert all(FORMS[form].decay == 0 for form in FORMS if form != "pact")
    assert penalty(begun(qat_network(tiny_unet, Nipq(), TDQ))).item() == 0


def test_ranges_without_data_start_as_the_nearest(tiny_unet: nn.Module) -> None:
    model = qat_network(tiny_unet, Lsq(), PerStepConfig())
    observe(model)
    with torch.no_grad():
        model(**example_inputs(tiny_unet, (740, 20)), outside="nearest")  # nearest to the first and the last step
    source = model.activation_quantizers()["conv_in.input_quantizer"].scale_provider
    assert isinstance(source, EMARange)
    assert source.scale.isnan().tolist() == [False, True, True, False]
    first, last = float(source.scale[0]), float(source.scale[3])
    ready(model)
    assert source.scale.tolist() == [first, first, last, last]


def test_an_unobserved_network_is_not_ready(tiny_unet: nn.Module) -> None:
    with pytest.raises(RuntimeError, match="has seen no calibration data"):
        ready(qat_network(tiny_unet, Lsq(), StaticConfig()))
