"""An Inception network with random weights, as files."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.helpers.inception import random_weights


@pytest.fixture(scope="session")
def inception_state() -> dict[str, Tensor]:
    return random_weights(0)


@pytest.fixture(scope="session")
def inception_file(inception_state: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The same weights as `.pth`; and as `.safetensors`."""
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(inception_state, path)
    save_file(inception_state, path.with_suffix(".safetensors"))
    yield path
    path.unlink()
    path.with_suffix(".safetensors").unlink()
