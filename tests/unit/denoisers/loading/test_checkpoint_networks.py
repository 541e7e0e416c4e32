"""Which networks of a checkpoint are read: averages, states, names."""

import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.checkpoints import FORMATS, equal, read_weights, save, tensor_names
from tfmq_exp.denoisers.loading.checkpoint import Checkpoint, read_tensors, select_names

GOLDENS = Path(__file__).parents[3] / "goldens"


@FORMATS
def test_files_of_the_ddim_program(is_zip: bool, tmp_path: Path) -> None:
    state = {"conv_in.weight": torch.ones(2, 3), "down.0.block.0.norm1.bias": torch.zeros(4)}
    averages = {name: value + 0.5 for name, value in state.items()}
    parallel = OrderedDict((f"module.{name}", value) for name, value in state.items())
    optimizer = {"state": {0: {"exp_avg": torch.ones(9)}}}
    path = save([parallel, optimizer, 3, 1000, averages], tmp_path / "ckpt.pth", is_zip)
    for ema, expected in ((False, state), (True, averages)):
        selected = read_weights(path, "", ema)
        assert list(selected) == list(expected)
        assert all(equal(selected[name], value) for name, value in expected.items())
    without = read_tensors(save([parallel, optimizer, 3, 1000], path, is_zip))
    assert list(without) == list(state)
    with pytest.raises(ValueError, match=r"ckpt\.pth: .*ema=false"):
        read_weights(path, "", ema=True)


def test_ema_copies_of_an_ldm_model(tmp_path: Path) -> None:
    """The names of a real model, with EMA copies by the rule that LDM follows."""
    tensors = load_file(GOLDENS / "compvis" / "ldm_lsun_beds.model.safetensors")
    prefix = "model.diffusion_model."
    names = [name for name in tensors if name.startswith(prefix)]
    copies = {"model_ema." + name[len("model.") :].replace(".", ""): tensors[name].float() + 1 for name in names}
    everything = {
        **tensors,
        **copies,
        "model_ema.decay": torch.tensor(0.9999),
        "model_ema.num_updates": torch.tensor(1),
    }
    assert "model_ema.diffusion_modelout2bias" in everything
    path = save({"state_dict": everything}, tmp_path / "a.ckpt")
    raw, averaged = (read_weights(path, prefix, ema) for ema in (False, True))
    assert list(raw) == list(averaged) == [name.removeprefix(prefix) for name in names]
    assert all(equal(raw[name], tensors[prefix + name]) for name in raw)
    assert all(equal(averaged[name], raw[name].float() + 1) for name in raw)
    with pytest.raises(ValueError, match=f"of {len(names)} of {len(names)} weights below '{prefix}'.*ema=false"):
        select_names(tensors, prefix, ema=True)
    del everything["model_ema.diffusion_modelout2bias"]
    with pytest.raises(ValueError, match=r"of 1 of .*diffusion_model\.out\.2\.bias"):
        select_names(everything, prefix, ema=True)
    with pytest.raises(ValueError, match=r"below 'model\.unet\.'.*first_stage_model\., model\.$"):
        select_names(tensors, "model.unet.", ema=False)


@pytest.mark.parametrize("suffix", ["ckpt", "safetensors"])
def test_weights_that_nobody_asked_for_are_not_read(suffix: str, tmp_path: Path) -> None:
    state = {"model.a": torch.arange(3.0), "model_ema.a": torch.full((50_000,), 2.0)}
    path = tmp_path / f"a.{suffix}"
    (save if suffix == "ckpt" else save_file)(state, path)
    assert sorted(tensor_names(path)) == sorted(state)
    if suffix == "ckpt":  # their bytes may be missing altogether
        with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "b.ckpt", "w") as new:
            for name in old.namelist():
                if old.getinfo(name).file_size < 200_000:
                    new.writestr(name, old.read(name))
        path = tmp_path / "b.ckpt"
    assert equal(read_weights(path, "model.", ema=False)["a"], state["model.a"])
    with Checkpoint(path) as file:
        assert list(file.tensors(["model.a"])) == ["model.a"]


def test_ema_copies_that_cannot_be_told_apart() -> None:
    tensors = {"a.1.1": torch.ones(1), "a.11": torch.ones(1), "model_ema.a11": torch.ones(1)}
    with pytest.raises(ValueError, match="told apart"):
        select_names(tensors, "", ema=True)
