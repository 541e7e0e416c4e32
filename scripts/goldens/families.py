"""The networks of the `compvis` goldens: architecture, weights and recordings of each."""

import gzip
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from safetensors.torch import load_file, save_file

from goldens.comparing import DamagedError, Record, reading
from goldens.formula import weight
from tfmq_exp.denoisers.denoiser import DenoiserParts
from tfmq_exp.denoisers.loading.checkpoint import EMA, Checkpoint, ema_names
from tfmq_exp.denoisers.loading.condition_encoders import VIT_L_14, load_text_model
from tfmq_exp.denoisers.originals import compvis_checkpoint

UNET, FIRST_STAGE, CONDITIONS = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."
# of the noise, as LDM keeps them
SCHEDULE = (
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
)
AVERAGING = (f"{EMA}decay", f"{EMA}num_updates")  # settings of the averaging itself, not weights


def read_json(path: Path) -> Record:
    """A mapping from a file, packed or not; so are those inside it.

    Raises:
        DamagedError: missing, or something else.
    """
    with reading(path):
        content = path.read_bytes()
        found = json.loads(gzip.decompress(content) if path.suffix == ".gz" else content, object_hook=Record)
    if not isinstance(found, Record):
        raise DamagedError(f"{path} holds no names with values")
    return found


def read_recorded(path: Path) -> Record:
    """The tensors of a file by name."""
    with reading(path):
        return Record(load_file(path))


@dataclass(frozen=True)
class Family:
    """One network of an original program.

    Args:
        name: of the files and in the index.
        settings: those of the index.
        config: architecture in the original program's layout.
        weights: file of the weights by their original names.
        recorded: inputs and outputs by name.
    """

    name: str
    settings: Record
    config: Mapping[str, Any]
    weights: Path
    recorded: Record

    @property
    def ddim(self) -> bool:
        """Whether it is of the DDIM program: a network on pixels, and nothing else in the file."""
        return compvis_checkpoint.is_ddim(self.config)

    @property
    def captions(self) -> bool:
        """Whether it is conditioned on captions."""
        return "input_ids" in self.recorded

    @property
    def prefix(self) -> str:
        """Prefix of the names of the UNet's weights."""
        return "" if self.ddim else UNET

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of all tensors in the file of weights."""
        with Checkpoint(self.weights) as file:
            return tuple(file.names())

    @cached_property
    def schedule(self) -> Mapping[str, Any]:
        """The noise that the network was trained on."""
        with reading(self.weights):
            return compvis_checkpoint.training_schedule(self.config)

    def load(self, *, ema: bool = False) -> DenoiserParts:
        """The converted networks; what encodes captions is apart (`text_model`), for the goldens hold no vocabulary.

        Raises:
            DamagedError: weights that do not fit the architecture.
        """
        config = self.config
        if self.captions:
            params = {**config["model"]["params"], "cond_stage_config": compvis_checkpoint.UNCONDITIONAL}
            config = {**config, "model": {**config["model"], "params": params}}
        with reading(self.weights):
            return compvis_checkpoint.load_compvis(self.weights, config, ema=ema, tokenizer=None, decode_rows=8)

    def text_model(self) -> Any:
        """CLIP's text model with this file's weights."""
        with reading(self.weights):
            with Checkpoint(self.weights) as file:
                state = file.read(f"{CONDITIONS}transformer.")
            return load_text_model(self.config.get("clip_text_config", VIT_L_14), state)

    def placed(self) -> set[str]:
        """The weights that had to have a place for `recorded` to be compared: loading is strict."""
        parts = {self.prefix: True, FIRST_STAGE: "decoded" in self.recorded, CONDITIONS: "context" in self.recorded}
        prefixes = tuple(prefix for prefix, used in parts.items() if used)
        found = {name for name in self.names if name.startswith(prefixes) and not name.startswith(EMA)}
        if any(name.startswith("eps_ema") for name in self.recorded):
            found |= {*ema_names(name for name in found if name.startswith(self.prefix)).values(), *AVERAGING}
        return found | {*SCHEDULE, "scale_factor"}


def by_formula(folder: Path, name: str, config: Mapping[str, Any], recorded: Record, scratch: Path) -> Path:
    """Write the weights of a formula case to a file, as its original program would have named them."""
    parameters = read_json(folder / f"{name}.params.json.gz")
    seed = parameters["seed"]
    state = {key: weight(key, shape, seed) for key, shape in parameters["parameters"].items()}
    if not compvis_checkpoint.is_ddim(config) and compvis_checkpoint.at(config, "model.params").get("scale_by_std"):
        state["scale_factor"] = recorded["scale_factor"]  # measured in training, so not in the formula
    path = scratch / f"{name}.model.safetensors"
    save_file(state, path)
    return path


def read_family(folder: Path, name: str, settings: Record, scratch: Path) -> Family:
    """One entry of the index.

    Args:
        folder: of the goldens.
        name: of the entry.
        settings: what the index says about it.
        scratch: where weights that a formula gives may be written.

    Raises:
        DamagedError: a file that is missing or cannot be read, or a kind that is not known.
    """
    path = folder / f"{name}.config.yaml"
    with reading(path):
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
        if not isinstance(config, Mapping):
            raise DamagedError(f"{path} holds no architecture")
        recorded = read_recorded(folder / f"{name}.io.safetensors")
        kind = settings["kind"]
        if kind not in ("stored", "formula"):
            raise DamagedError(f"kind of {name} must be stored or formula, got {kind!r}")
        stored = folder / f"{name}.model.safetensors"
        weights = stored if kind == "stored" else by_formula(folder, name, config, recorded, scratch)
    return Family(name, settings, config, weights, recorded)
