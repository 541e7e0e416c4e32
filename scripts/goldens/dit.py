"""All that the `dit` goldens hold, compared: original DiT networks, their features and trajectories, and full-size keys."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from goldens.architectures import in_precision
from goldens.comparing import EXACT, DamagedError, Group, Record, coverage, reading
from goldens.dit_trajectories import end_to_end, timestep_lists
from goldens.families import read_json, read_recorded
from tfmq_exp.denoisers.originals.dit_checkpoint import DEFAULTS, load_dit, published, read_dit
from tfmq_exp.denoisers.read_structure import read_structure
from tfmq_exp.denoisers.temporal import TemporalInformationBlock, temporal_pairs

PRECISIONS = {"": torch.float32, "_f64": torch.float64}
OUTPUTS = {"": 3e-5, "_f64": 1e-12}
FEATURES = {"": 1e-5, "_f64": 1e-12}
ROUNDING = 1e-5  # of statistics
MANIFESTS = "fullsize_key_manifests.json.gz"


@dataclass(frozen=True)
class DiT:
    """One network of the original program.

    Args:
        name: of the files and in the index.
        settings: those of the index.
        network: that of diffusers with its weights, in single and double precision, by suffix.
        recorded: inputs and outputs by name.
    """

    name: str
    settings: Record
    network: Mapping[str, Any]
    recorded: Record


def read_case(folder: Path, name: str, settings: Record) -> DiT:
    """One entry of the index.

    Raises:
        DamagedError: a file is missing, or the weights are not those of the architecture.
    """
    path = folder / f"{name}.model.safetensors"
    with reading(path):
        network = read_dit(path, dict(settings["constructor"]))
    networks = {suffix: in_precision(network, dtype) for suffix, dtype in PRECISIONS.items()}
    return DiT(name, settings, networks, read_recorded(folder / f"{name}.io.safetensors"))


def outputs(case: DiT) -> Iterator[Group]:
    """Outputs at x, at small x, and at fractional timesteps."""
    recorded = case.recorded
    for suffix, dtype in PRECISIONS.items():
        for kind, x, t in (("", "x", "t"), ("_x_small", "x_small", "t"), ("_t_fractional", "x", "t_fractional")):
            group = Group(f"dit {case.name}: out{kind}{suffix}", OUTPUTS[suffix], absolute=True)
            with torch.no_grad():
                ours = case.network[suffix](recorded[x].to(dtype), recorded[t], recorded["y"]).sample
            group.compare(ours, recorded[f"out{kind}{suffix}"])
            yield group
            if not (kind or suffix):
                scale = Group(f"dit {case.name}: scale of out", ROUNDING)
                scale.compare([float(ours.std()), float(ours.abs().max())], [*case.settings["scale"].values()])
                yield scale


def our_layer(module: str) -> str:
    """The layer that returns a feature, by the place of the original's modulation.

    Raises:
        DamagedError: another module.
    """
    if module == "final_layer":
        return "proj_out_1"
    if not module.startswith("blocks."):
        raise DamagedError(f"there is no modulation in {module!r}")
    return f"transformer_{module}.norm1.linear"


def temporal_features(case: DiT) -> Iterator[Group]:
    """Both embeddings, and the modulations of every pair of timestep and class."""
    recorded = case.recorded
    t, y = recorded["tib.t"], recorded["tib.y"]
    example = {"hidden_states": recorded["x"][:1], "timestep": t[:1], "class_labels": y[:1]}
    structure = read_structure(case.network[""], example)
    pairs, given = temporal_pairs(t, {"class_labels": y})
    for suffix, dtype in PRECISIONS.items():
        network = case.network[suffix]
        group = Group(f"dit {case.name}: temporal features{suffix}", FEATURES[suffix], absolute=True)
        with torch.no_grad():
            features = TemporalInformationBlock(network, structure).features(pairs, given)
            for block in network.transformer_blocks:
                embed = block.norm1.emb
                group.compare(
                    embed.timestep_embedder(embed.time_proj(t).to(dtype)), recorded[f"tib.t_embedder{suffix}"]
                )
                group.compare(embed.class_embedder(y), recorded[f"tib.y_embedder{suffix}"])
        end = f".adaLN_modulation{suffix}"
        for key in [key for key in recorded if key.startswith("tib.") and key.endswith(end)]:
            ours = features.pop(our_layer(key.removeprefix("tib.").removesuffix(end)), torch.empty(0))
            group.compare(ours, recorded[key])
        group.compare(len(features), 0)
        yield group


def own_parameters(network: nn.Module) -> int:
    """Parameters as the original counts them: one embedder for all blocks, and the table of positions."""
    net: Any = network
    embedders = [sum(p.numel() for p in block.norm1.emb.parameters()) for block in net.transformer_blocks]
    return sum(p.numel() for p in network.parameters()) - sum(embedders[1:]) + net.pos_embed.pos_embed.numel()


def full_size(folder: Path) -> Iterator[Group]:
    """The published networks by the names and shapes of their parameters alone."""
    for name, manifest in read_json(folder / MANIFESTS).items():
        group = Group(f"dit full size {name}: keys, parameters", EXACT)
        size, _, pixels = name.rpartition(" ")
        keys: Mapping[str, list[int]] = manifest["keys"]
        try:
            state = {key: torch.empty(shape, device="meta") for key, shape in keys.items()}
            group.compare(own_parameters(load_dit(published(size, int(pixels)), state)), manifest["parameters"])
            group.note = f"{len(keys)} keys"
        except ValueError as error:
            group.compare(0, 1)
            group.note = str(error)
        yield group


def training_schedule(betas: str) -> dict[str, Any]:
    """The noise of the index, `linspace(first, last, count)`, as arguments of diffusers' schedulers.

    Raises:
        DamagedError: another kind.
    """
    found = re.match(r"linspace\((.+?), (.+?), (\d+)\)", betas)
    if found is None:
        raise DamagedError(f"expected betas as linspace(first, last, count), got {betas!r}")
    ends = {"beta_start": float(found[1]), "beta_end": float(found[2])}
    return {"num_train_timesteps": int(found[3]), **ends, "beta_schedule": "linear"}


def check_case(case: DiT, schedule: Mapping[str, Any]) -> Iterator[Group]:
    """Everything that is recorded of one network."""
    count = Group(f"dit {case.name}: parameters", EXACT)
    count.compare(own_parameters(case.network[""]), case.settings["parameters"])
    yield count
    yield from outputs(case)
    yield from temporal_features(case)
    learned = case.settings["constructor"].get("learn_sigma", DEFAULTS["learn_sigma"])
    for tag, run in case.settings["runs"].items():
        yield from end_to_end(
            f"dit {case.name}: {tag}", f"e2e.{tag}", run, case.recorded, case.network, schedule, learned
        )


def check_dit(folder: Path) -> list[Group]:
    """Every comparison of a folder of the `dit` layout, and whether every tensor took part.

    Raises:
        DamagedError: something is missing or cannot be read.
    """
    index = read_json(folder / "index.json")
    schedule, lists = training_schedule(index["betas"]), index["timestep_lists"]
    groups, present, read = [timestep_lists(lists, schedule)], set[str](), set[str]()
    for name in index.keys() - {"betas", "timestep_lists"}:
        case = read_case(folder, name, index[name])
        groups += check_case(case, schedule)
        present |= {f"{name}: {key}" for key in case.recorded}
        read |= {f"{name}: {key}" for key in case.recorded.read}
    return [*groups, *full_size(folder), coverage("dit: tensors read", present, read)]
