"""What an engine is: it makes files of a finished quantized model, and of files a denoiser that really computes in integers."""

import json
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from tfmq_exp.surgery.quantized_unet import QuantizedUNet

MANIFEST = "deployed.json"


class Prediction(NamedTuple):
    """What a diffusers UNet returns, in the one part that samplers read."""

    sample: Tensor


class Engine(Protocol):
    """A way of executing integers."""

    @property
    def name(self) -> str:
        """What the row of a table is called after."""
        ...

    @property
    def identity(self) -> Mapping[str, Any]:
        """All that its results depend on, beside the model."""
        ...

    def export(self, model: QuantizedUNet, example: Mapping[str, Tensor], folder: Path) -> None:
        """Fill a folder; its manifest has a row for every layer in `sites`: where it is executed, and why not in integers.

        Args:
            model: finished.
            example: keyword arguments of a forward pass.
            folder: empty, or with what an interrupted attempt has left.
        """
        ...

    def open(self, model: QuantizedUNet, folder: Path, *, batch: int) -> nn.Module:
        """What `export` made, called like the UNet that it came from.

        Args:
            model: the same.
            folder: the filled one.
            batch: rows that go through it together.
        """
        ...


def write_manifest(folder: Path, content: Mapping[str, Any]) -> None:
    """What the folder says about itself."""
    (folder / MANIFEST).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, Any]:
    """What `write_manifest` wrote."""
    return json.loads((folder / MANIFEST).read_text(encoding="utf-8"))


def rows_by_step(model: QuantizedUNet, t: Tensor) -> list[tuple[int, Tensor]]:
    """The steps of a batch, each with the rows that are at it: engines take one step at a time."""
    steps = model.context.step_indices(t)
    return [(int(step), torch.nonzero(steps == step)[:, 0]) for step in steps.unique()]


def require(package: str, extra: str) -> None:
    """Raise ValueError unless a package of an extra is installed."""
    try:
        version(package)
    except PackageNotFoundError:
        raise ValueError(
            f"this engine needs {package}, which is not installed: pip install 'tfmq_exp[{extra}]'"
        ) from None


def openvino(threads: int | None, rest: str, halves: bool | None) -> Engine:
    """`OpenVINO`, imported when it is asked for."""
    require("openvino", "openvino")
    from tfmq_exp.deploy.openvino_engine import OpenVINO

    return OpenVINO(threads, rest, halves)


def onednn() -> Engine:
    """`OneDNN`, imported when it is asked for."""
    from tfmq_exp.deploy.onednn_engine import OneDNN

    return OneDNN()


def torchao(form: str) -> Engine:
    """`TorchAO` on the GPU, imported when it is asked for.

    Raises:
        ValueError: no GPU, or the package is not installed.
    """
    if not torch.cuda.is_available():
        raise ValueError(
            f"engine=torchao needs a CUDA device, and torch {torch.__version__} finds none; "
            "on a CPU integers are executed by engine=openvino or engine=onednn"
        )
    require("torchao", "torchao")
    from tfmq_exp.deploy.torchao_engine import TorchAO

    return TorchAO(form)
