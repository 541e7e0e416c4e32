"""Networks of pipelines: what diffusers' own reader gives, and what is refused before it takes time or memory."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.helpers.pipelines import GOLDENS, NAMES, copied, edit
from tfmq_exp.denoisers.loading.network_folder import build_outline, load_network, without_weights
from tfmq_exp.denoisers.pipelines.pipeline_classes import AUTOENCODERS, DENOISERS

WEIGHTS = "diffusion_pytorch_model.safetensors"
TABLES = {"dit": "pos_embed.pos_embed", "pixart": "pos_embed.pos_embed", "wan": "rope.freqs_cos"}  # in no file


def tensors_of(network: Any) -> dict[str, Tensor]:
    return {**network.state_dict(), **dict(network.named_buffers())}


@pytest.mark.parametrize("name", NAMES)
def test_networks_are_those_of_diffusers_own_reader(name: str) -> None:
    folder = GOLDENS / name / "transformer"
    ours = load_network(folder)
    kind = getattr(diffusers, json.loads((folder / "config.json").read_text())["_class_name"])
    if kind._keep_in_fp32_modules:  # its own reader needs another package for that
        expected = kind.from_config(kind.load_config(folder))
        expected.load_state_dict({key: value.float() for key, value in load_file(folder / WEIGHTS).items()})
    else:
        expected = kind.from_pretrained(folder, local_files_only=True, low_cpu_mem_usage=False)
    found, wanted = tensors_of(ours), tensors_of(expected)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert all(value.dtype == torch.float32 for value in ours.state_dict().values())
    assert not ours.training
    assert not any(parameter.requires_grad for parameter in ours.parameters())
    if name in TABLES:
        assert TABLES[name] in found.keys() - load_file(folder / WEIGHTS).keys()


def test_shards_are_the_whole(tmp_path: Path) -> None:
    folder = copied("dit", tmp_path) / "transformer"
    state = state_of(folder)
    (folder / WEIGHTS).unlink()
    names = list(state)
    for i in range(2):
        save_file({key: state[key] for key in names[i::2]}, folder / f"part{i}.safetensors")
    places = {key: f"part{i % 2}.safetensors" for i, key in enumerate(names)}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"weight_map": places}))
    found = load_network(folder).state_dict()
    assert all(torch.equal(found[key], value) for key, value in state.items())


def test_outlines_have_no_weights() -> None:
    network = build_outline(GOLDENS / "pixart/transformer", DENOISERS)
    assert all(value.is_meta for value in network.parameters())
    assert torch.equal(network.pos_embed.pos_embed, load_network(GOLDENS / "pixart/transformer").pos_embed.pos_embed)


def test_only_parameters_are_left_out() -> None:
    with without_weights(10):
        norm = torch.nn.BatchNorm1d(3)
    assert norm.weight.is_meta
    assert norm.running_mean is not None
    assert torch.equal(norm.running_mean, torch.zeros(3))
    assert not torch.nn.Linear(2, 2).weight.is_meta


def state_of(folder: Path) -> dict[str, Tensor]:
    """Weights apart from their file, which can then be written over."""
    return {name: value.clone() for name, value in load_file(folder / WEIGHTS).items()}


def replace(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    state = state_of(folder)
    change(state)
    save_file(state, folder / WEIGHTS)


def shards_outside(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder.parent / "elsewhere.safetensors")
    places = {"weight_map": {"a": "../elsewhere.safetensors"}}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(places))


def pickled(folder: Path) -> None:
    torch.save(state_of(folder), folder / "diffusion_pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def disguised(folder: Path) -> None:
    torch.save(state_of(folder), folder / WEIGHTS)


def setting(**changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "config.json", lambda config: config.update(changes))


FIRST = "transformer_blocks.0.attn1.to_q.weight"
DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing weight": (lambda folder: replace(folder, lambda state: state.pop(FIRST)), f"1 missing, first {FIRST}"),
    "another weight": (
        lambda folder: replace(folder, lambda s: s.update(more=torch.ones(1))),
        "not in the architecture",
    ),
    "another shape": (lambda folder: replace(folder, lambda s: s.update({FIRST: torch.ones(3)})), "of another shape"),
    "not a number": (lambda folder: replace(folder, lambda s: s[FIRST].fill_(torch.nan)), "not finite"),
    "integers": (lambda folder: replace(folder, lambda s: s.update({FIRST: s[FIRST].to(torch.int8)})), "quantized"),
    "shards outside": (shards_outside, "in the same folder"),
    "pickle": (pickled, "expected safetensors"),
    "pickle with another name": (disguised, "expected safetensors"),
    "adapter": (lambda folder: (folder / "adapter_config.json").write_text("{}"), "adapters"),
    "auto_map": (setting(auto_map={"AutoModel": "evil.Model"}), "auto_map"),
    "quantization": (setting(quantization_config={"quant_method": "x"}), "quantization_config"),
    "private setting": (setting(_module="os"), "_module"),
    "unknown class": (setting(_class_name="OsSystem"), "'OsSystem'; expected"),
    "class of another part": (setting(_class_name="AutoencoderKL"), "'AutoencoderKL'; expected"),
    "no class": (setting(_class_name=None), "None; expected"),
    "unknown setting": (setting(secret_sauce=3), "no setting 'secret_sauce'"),
    "many layers": (setting(num_layers=10**6), "more than 10000 layers"),
    "wide": (setting(attention_head_dim=2**19), "more than .* weights"),
    "a large table": (setting(sample_size=2**20 - 1, patch_size=1), "numbers in tables"),
    "huge numbers": (setting(num_attention_heads=10**12), "num_attention_heads=1000000000000 cannot be"),
    "text for a number": (setting(num_layers="all"), "can be built of it"),
}


@pytest.mark.bad_input
@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_and_hostile_folders_are_refused_at_once(damage: str, tmp_path: Path) -> None:
    folder = copied("dit", tmp_path) / "transformer"
    make, named = DAMAGES[damage]
    make(folder)
    start = time.monotonic()
    with pytest.raises(ValueError, match=named) as error:
        load_network(folder)
    assert str(folder) in str(error.value)
    assert time.monotonic() - start < 10


@pytest.mark.bad_input
@pytest.mark.parametrize("lacking", ["config.json", WEIGHTS])
def test_missing_files_are_named(lacking: str, tmp_path: Path) -> None:
    folder = copied("dit", tmp_path) / "transformer"
    (folder / lacking).unlink()
    with pytest.raises(FileNotFoundError, match=lacking.partition(".")[0]):
        load_network(folder)


@pytest.mark.parametrize("name", sorted(DENOISERS | AUTOENCODERS))
def test_every_class_can_be_built_without_its_weights(name: str) -> None:
    """At the size of its default settings, some of which are those of published networks."""
    kind = getattr(diffusers, name)
    settings = {"in_channels": 4, "patch_size": 2} if name == "HunyuanDiT2DModel" else {}  # it has no defaults of these
    with without_weights(2**40), torch.device("meta"):
        network = kind(**settings)
    assert all(value.is_meta for value in network.parameters())
