"""First stages: what they decode at a time, and attention where a configuration asks for it."""

from typing import Any

import pytest
import torch
from tfmq_exp.denoisers.loading.autoencoder import LatentDecoder

from tests.unit.denoisers.originals import read_original
from tfmq_exp.denoisers import first_stage

PREFIX = "first_stage_model."


def network(name: str) -> Any:
    config, state, _ = read_original(name)
    state = {k.removeprefix(PREFIX): v for k, v in state.items() if k.startswith(PREFIX)}
    return first_stage.load(config["model"]["params"]["first_stage_config"], state, 1.0)


@pytest.mark.parametrize("name", ["ldm_lsun_beds", "ldm_lsun_churches"])
def test_only_some_rows_are_decoded_at_a_time(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    z = torch.randn(5, 3 if name == "ldm_lsun_beds" else 4, 4, 4, generator=torch.Generator().manual_seed(0))
    vae = network(name)
    at_once = LatentDecoder(vae, 0.5, rows=8).decode(z)
    seen: list[int] = []
    inner = vae.decoder.forward
    monkeypatch.setattr(vae.decoder, "forward", lambda x, *rest, **more: seen.append(len(x)) or inner(x, *rest, **more))
    torch.testing.assert_close(LatentDecoder(vae, 0.5, rows=2).decode(z), at_once, atol=1e-5, rtol=0)
    assert seen == [2, 2, 1]
    assert not LatentDecoder(vae, 0.5).decode(z.requires_grad_()).requires_grad
    assert (LatentDecoder(vae, 0.25).decode(z) - at_once).abs().max() > 1e-2
    images = LatentDecoder(vae, 0.5, rows=2)
    torch.testing.assert_close(images.encode(at_once), LatentDecoder(vae, 1.0).encode(at_once) / 2, atol=1e-5, rtol=0)


def test_attention_stands_where_the_resolution_says() -> None:
    config = read_original("ldm_lsun_beds").config["model"]["params"]["first_stage_config"]
    config["params"]["ddconfig"] |= {"resolution": 32, "ch_mult": [1, 2, 2], "attn_resolutions": [16]}
    with torch.device("meta"):
        found = first_stage.build(config, 1.0)
    names = {name.rsplit(".to_q", 1)[0] for name, _ in found.named_parameters() if ".to_q." in name}
    down = {"encoder.down_blocks.1.attentions.0"}
    up = {f"decoder.up_blocks.1.attentions.{i}" for i in range(2)}
    assert names == down | up | {f"{side}.mid_block.attentions.0" for side in ("encoder", "decoder")}


@pytest.mark.parametrize(("scale", "rows"), [(0.0, 8), (-1.0, 8), (1.0, 0)])
def test_scale_and_rows_are_positive(scale: float, rows: int) -> None:
    with pytest.raises(ValueError, match=r"scale factor must be a number above 0, got|decode_rows must be .*, got 0"):
        LatentDecoder(network("ldm_lsun_beds"), scale, rows)


def test_weights_of_another_autoencoder() -> None:
    vq, kl = (read_original(name) for name in ("ldm_lsun_beds", "ldm_lsun_churches"))
    state = {k.removeprefix(PREFIX): v for k, v in kl.state.items() if k.startswith(PREFIX)}
    with pytest.raises(
        ValueError, match=r"1 missing, first quantize\.embedding\.weight; 28 not in .*; 7 of another shape"
    ):
        first_stage.load(vq.config["model"]["params"]["first_stage_config"], state, 1.0)
