"""Original checkpoints that are refused, and why."""

import copy
import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.originals import Original, read_original
from tfmq_exp.denoisers.loading.pretrained import load_denoiser


def refusal(name: str, original: Original, folder: Path, tokenizer: Path | None = None, ema: bool = False) -> str:
    path = original.save(folder / "model.ckpt")
    with pytest.raises(ValueError, match=r"\S") as caught:
        load_denoiser(name, path, original.config, ema, tokenizer)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert message.count(str(path)) == 1
    return message


def test_a_checkpoint_of_another_model(tmp_path: Path) -> None:
    beds, churches, classes = (read_original(f"ldm_{n}") for n in ("lsun_beds", "lsun_churches", "cin256_v2"))
    message = refusal("x", churches._replace(config=beds.config), tmp_path)
    assert "0.0155" in message
    assert "the architecture says (1000, 0.0015, 0.0195)" in message
    message = refusal("x", classes._replace(config=beds.config), tmp_path)
    missing = (
        r"\d+ missing, first down_blocks\.1\.attentions\.0\.group_norm\.weight; \d+ not in the architecture, first \S+"
    )
    assert re.search(missing, message)
    message = refusal("x", read_original("ddim_cifar10")._replace(config=beds.config), tmp_path)
    assert "no weights below 'first_stage_model.'; the prefixes in this checkpoint are conv_in." in message
    wide = copy.deepcopy(beds.config)
    wide["model"]["params"]["unet_config"]["params"]["model_channels"] = 64
    message = refusal("x", beds._replace(config=wide), tmp_path)
    assert "of another shape, first conv_in.weight (32, 3, 3, 3) instead of (64, 3, 3, 3)" in message


def test_a_file_without_averages_or_scale(tmp_path: Path) -> None:
    assert "set ema=false" in refusal("x", read_original("ldm_lsun_beds"), tmp_path, ema=True)
    churches = read_original("ldm_lsun_churches")
    del churches.state["scale_factor"]
    assert "scale_factor" in refusal("x", churches, tmp_path)


Change = Callable[[dict[str, Any]], Any]

CHANGES: dict[str, tuple[str, Change]] = {
    "beta_schedule must be linear, got 'cosine'": ("ldm_cin256_v2", lambda p: p.update(beta_schedule="cosine")),
    "parameterization must be eps, got 'v'": ("ldm_cin256_v2", lambda p: p.update(parameterization="v")),
    "got 'BERTEmbedder'": ("ldm_cin256_v2", lambda p: p["cond_stage_config"].update(target="ldm.x.BERTEmbedder")),
    "shape (12, 24), got (11, 24)": ("ldm_cin256_v2", lambda p: p["cond_stage_config"]["params"].update(n_classes=12)),
    "no 'first_stage_config'": ("ldm_cin256_v2", lambda p: p.pop("first_stage_config")),
    "got 'ldm.Identity'": ("ldm_cin256_v2", lambda p: p["first_stage_config"].update(target="ldm.Identity")),
    "lacks 'n_embed'": ("ldm_cin256_v2", lambda p: p["first_stage_config"]["params"].pop("n_embed")),
    "embed_dim=8": ("ldm_lsun_churches", lambda p: p["first_stage_config"]["params"].update(embed_dim=8)),
    "lacks 'channel_mult'": ("ldm_cin256_v2", lambda p: p["unet_config"]["params"].pop("channel_mult")),
    "use_new_attention_order": (
        "ldm_lsun_beds",
        lambda p: p["unet_config"]["params"].update(use_new_attention_order=True),
    ),
}


@pytest.mark.parametrize("message", CHANGES)
def test_architectures_that_are_not_supported(message: str, tmp_path: Path) -> None:
    name, change = CHANGES[message]
    original = read_original(name)
    change(original.config["model"]["params"])
    assert message in refusal("x", original, tmp_path)


def test_files_that_are_not_there(tmp_path: Path, tokenizer: Path) -> None:
    path = tmp_path / "no.ckpt"
    with pytest.raises(FileNotFoundError, match=r"at .*no\.ckpt: expected sd-v1-4\.ckpt, published at .*downloaded"):
        load_denoiser("sd_v1_4", path, {}, False)
    with pytest.raises(FileNotFoundError, match=r"no\.ckpt: give .*docs/checkpoints\.md"):
        load_denoiser("mine", path, {}, False)
    original = read_original("sd_v1")
    path = original.save(tmp_path / "sd.ckpt")
    for folder in (None, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match=r"vocab\.json and merges\.txt .*got .*docs/checkpoints\.md"):
            load_denoiser("sd_v1_4", path, original.config, False, folder)
    (tokenizer / "merges.txt").unlink()
    with pytest.raises(FileNotFoundError, match=r"expected merges\.txt in"):
        load_denoiser("sd_v1_4", path, original.config, False, tokenizer)
    with pytest.raises(FileNotFoundError, match=r"no architecture at .*no\.yaml"):
        load_denoiser("sd_v1_4", path, tmp_path / "no.yaml", False)


def test_files_that_are_something_else(tmp_path: Path) -> None:
    config, _, _ = original = read_original("ddim_cifar10")
    path = original.save(tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match=r"model\.ckpt is one file: `config`"):
        load_denoiser("x", path, None, False)
    with pytest.raises(ValueError, match=rf"has sha256 {hashlib.sha256(path.read_bytes()).hexdigest()}, expected 00"):
        load_denoiser("x", path, config, False, sha256="0" * 64)
    for text, message in (("a: [", "not YAML"), ("text", "holds no architecture"), ("a: 1", "no 'model.params'")):
        (tmp_path / "a.yaml").write_text(text)
        with pytest.raises(ValueError, match=message):
            load_denoiser("x", path, tmp_path / "a.yaml", False)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=rf"^{path}: .*damaged"):
        load_denoiser("x", path, config, False)


class Evil:
    """Makes a file as soon as it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return exec, (f"open({str(self.marker)!r}, 'w').close()",)


def test_a_program_in_a_checkpoint_does_not_run(tmp_path: Path) -> None:
    config, state, _ = read_original("ddim_cifar10")
    torch.save({"state_dict": state, "callbacks": Evil(tmp_path / "marker")}, tmp_path / "model.ckpt")
    with pytest.raises(ValueError, match=r"refuses to load 'builtins\.exec'"):
        load_denoiser("x", tmp_path / "model.ckpt", config, False)
    assert not (tmp_path / "marker").exists()
