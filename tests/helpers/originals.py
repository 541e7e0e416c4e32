"""Small networks of the original programs, as files that those programs would write."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

GOLDENS = Path(__file__).parents[1] / "goldens" / "compvis"
STORED = (torch.float8_e4m3fn, torch.float16)  # the weights are exact in these types


class Original(NamedTuple):
    """Architecture, state dict with the original names, recorded inputs and outputs."""

    config: dict[str, Any]
    state: dict[str, Tensor]
    recorded: dict[str, Tensor]

    def save(self, path: Path) -> Path:
        """As Lightning saves it."""
        torch.save({"state_dict": self.state, "global_step": 3}, path)
        return path


def read_original(name: str) -> Original:
    """One of the stored networks."""
    state = load_file(GOLDENS / f"{name}.model.safetensors")
    return Original(
        yaml.safe_load((GOLDENS / f"{name}.config.yaml").read_text()),
        {key: value.float() if value.dtype in STORED else value for key, value in state.items()},
        load_file(GOLDENS / f"{name}.io.safetensors"),
    )


def word(token: int) -> str:
    """The word that is token 0 .. 96 of `tokenizer`."""
    return "abcdefghij"[token // 10] + "abcdefghij"[token % 10]


def caption(ids: Tensor) -> str:
    """The caption whose tokens these are, between start and end."""
    return " ".join(word(token) for token in ids.tolist() if token < 97)
