"""Tensors of original checkpoint files by name, read without running anything the files ask for."""

from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from tfmq_exp.core.file_kind import is_safetensors, kind_of, why_missing, why_unreadable
from tfmq_exp.denoisers.torch_file import build, opened
from tfmq_exp.denoisers.unpickling import RefusedError, TensorRecord

EMA = "model_ema."


def tensors_of(state: Any) -> dict[str, TensorRecord]:
    """The named tensors of a dict, without the `module.` of DataParallel; nothing of anything else."""
    # by the method of dict itself: a pickle may give an OrderedDict another one
    items = dict.items(state) if isinstance(state, dict) else ()
    named = {name: value for name, value in items if isinstance(name, str) and isinstance(value, TensorRecord)}
    parallel = all(name.startswith("module.") for name in named)
    return {name.removeprefix("module.") if parallel else name: value for name, value in named.items()}


def state_of(root: Any) -> dict[str, TensorRecord]:
    """The tensors of Lightning's state dict, a bare one, or DDIM's list: state, optimizer, epoch, step (, EMA copies)."""
    if not isinstance(root, list):
        return tensors_of(root["state_dict"] if isinstance(root, dict) and "state_dict" in root else root)
    state, averages = (tensors_of(root[place] if place < len(root) else None) for place in (0, 4))
    copies = ema_names(averages)
    return {**state, **{copies[name]: value for name, value in averages.items()}}


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Errors of reading a file, as one ValueError that names it and what it is; FileNotFoundError if it is not there."""
    if not path.exists():
        raise FileNotFoundError(f"no file at {path}{why_missing(path)}")
    if kind := kind_of(path):
        raise ValueError(f"{path}: {kind}")
    try:
        yield
    except RefusedError as error:
        raise ValueError(f"{path}: {error}") from error
    except Exception as error:  # damaged bytes fail in whatever way they lead to
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        damaged = f"is damaged or no checkpoint of torch.save or safetensors ({reason})"
        raise ValueError(f"{path}: {why_unreadable(path) or damaged}") from error


def tensor_names(path: Path) -> list[str]:
    """The names of what `read_tensors` would read, in the order of the file, with its errors; no weights are read."""
    with naming(path):
        if is_safetensors(path):
            with safe_open(path, framework="pt") as file:
                names = list(file.keys())
        else:
            with opened(path) as (root, _):
                names = list(state_of(root))
    if not names:
        raise ValueError(f"{path}: holds no weights: expected tensors by name, bare or below 'state_dict'")
    return names


def read_tensors(path: Path, names: Collection[str] | None = None) -> dict[str, Tensor]:
    """The flat state dict of a file of safetensors or of `torch.save`, whichever its bytes are; its suffix says nothing.

    Plain tensors on the CPU without gradients. Optimizer states, settings and everything else that is not a tensor of the
    state dict are dropped; their bytes are not read. EMA copies in the list of the DDIM program are named as LDM does:
    `model_ema.` + name without dots.

    Args:
        path: the file.
        names: of the tensors to read, all by default.

    Raises:
        FileNotFoundError: no such file.
        ValueError: damaged, something else than a checkpoint, without tensors, or a pickle that names anything but parts of tensors and
            classes of known training libraries; the message says which.
    """
    wanted = tensor_names(path) if names is None else names
    with naming(path):
        if is_safetensors(path):
            with safe_open(path, framework="pt") as file:
                return {name: file.get_tensor(name) for name in wanted}
        with opened(path) as (root, read):
            records = state_of(root)
            return build({name: records[name] for name in wanted}, read, path.stat().st_size)


def ema_names(names: Iterable[str]) -> dict[str, str]:
    """LDM's name for the EMA copy of each parameter; RefusedError if two would have the same."""
    copies = {name: EMA + name.removeprefix("model.").replace(".", "") for name in names}
    if len(set(copies.values())) < len(copies):
        raise RefusedError("two parameters have the same name without dots, so their EMA copies cannot be told apart")
    return copies


def select_names(present: Collection[str], prefix: str, ema: bool) -> dict[str, str]:
    """The parameters of one network in a checkpoint: names below a prefix -> names in the file.

    Args:
        present: of `tensor_names`.
        prefix: such as `model.diffusion_model.`; empty for a checkpoint of one network alone.
        ema: the EMA copies that training kept, instead of the last weights.

    Raises:
        RefusedError: nothing below the prefix, or no EMA copies of what is there.
    """
    names = [name for name in present if name.startswith(prefix) and (prefix or not name.startswith(EMA))]
    if not names:
        tops = sorted({name.partition(".")[0] + "." for name in present if "." in name})
        raise RefusedError(f"no weights below {prefix!r}; the prefixes in this checkpoint are {', '.join(tops[:12])}")
    sources = ema_names(names) if ema else {name: name for name in names}
    there = set(present)
    missing = [name for name in names if sources[name] not in there]
    if missing:
        raise RefusedError(
            f"no EMA copy ({EMA}*) of {len(missing)} of {len(names)} weights below {prefix!r}, such as {missing[0]!r}; "
            "set ema=false for the weights themselves"
        )
    return {name.removeprefix(prefix): sources[name] for name in names}


def read_weights(path: Path, prefix: str, ema: bool) -> dict[str, Tensor]:
    """The weights of one network in a file by their names below a prefix; nothing else of the file is read.

    Raises:
        FileNotFoundError: no such file.
        ValueError: as `read_tensors` and `select_names`; the message names the file.
    """
    present = tensor_names(path)
    with naming(path):
        chosen = select_names(present, prefix, ema)
    tensors = read_tensors(path, chosen.values())
    return {name: tensors[source] for name, source in chosen.items()}
