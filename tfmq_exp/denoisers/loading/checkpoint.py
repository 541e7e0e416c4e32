"""Checkpoint files: the named tensors of safetensors or of `torch.save`, whichever the bytes are; and weights into a network."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Self

from safetensors import safe_open
from torch import Tensor, nn

from tfmq_exp.core.file_kind import is_safetensors, kind_of, why_missing, why_unreadable
from tfmq_exp.denoisers.loading.torch_checkpoint import build_tensors, open_torch
from tfmq_exp.denoisers.loading.torch_pickle import RefusedError, TensorRecord

EMA = "model_ema."


class Checkpoint:
    """A file of named tensors, opened once; what is not asked for is not read.

        with Checkpoint(path) as file:
            unet = file.read("model.diffusion_model.", ema=True)

    Everything that is not a tensor of the state dict is left out. EMA copies in the list of the DDIM program are named as LDM
    does: `model_ema.` + name without dots.

    Raises:
        FileNotFoundError: on entering, no such file.
        ValueError: damaged, another kind of file, without tensors, or a pickle that names anything but parts of tensors and
            classes of known training libraries; the message names the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._files = ExitStack()

    def __enter__(self) -> Self:
        if not self.path.exists():
            raise FileNotFoundError(f"no file at {self.path}{why_missing(self.path)}")
        if kind := kind_of(self.path):
            raise ValueError(f"{self.path}: {kind}")
        with self._naming(), ExitStack() as files:
            if is_safetensors(self.path):
                stored = files.enter_context(safe_open(self.path, framework="pt"))
                self._names = list(stored.keys())
                self._read = lambda names: {name: stored.get_tensor(name) for name in names}
            else:
                root, read = open_torch(files.enter_context(self.path.open("rb")))
                records, length = state_of(root), self.path.stat().st_size
                self._names = list(records)
                self._read = lambda names: build_tensors({name: records[name] for name in names}, read, length)
            if not self._names:
                raise RefusedError("holds no weights: expected tensors by name, bare or below 'state_dict'")
            self._files = files.pop_all()
        return self

    def __exit__(self, *_error: object) -> None:
        self._files.close()

    def names(self) -> list[str]:
        """The names of all tensors, in the order of the file."""
        return self._names

    def tensors(self, names: Collection[str] | None = None) -> dict[str, Tensor]:
        """Read tensors by their names, all by default: plain, on the CPU and without gradients."""
        with self._naming():
            return self._read(self._names if names is None else names)

    def read(self, prefix: str = "", *, ema: bool = False) -> dict[str, Tensor]:
        """Read the weights of one network by their names below a prefix, with `ema` the averages; ValueError without them."""
        with self._naming():
            sources = select_names(self._names, prefix, ema)
            tensors = self._read(sources.values())
        return {name: tensors[source] for name, source in sources.items()}

    @contextmanager
    def _naming(self) -> Iterator[None]:
        """Turn errors of reading into one ValueError that names the file and its kind."""
        try:
            yield
        except RefusedError as error:
            raise ValueError(f"{self.path}: {error}") from error
        except Exception as error:  # damaged bytes fail in any way
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            damaged = f"is damaged or no checkpoint of torch.save or safetensors ({reason})"
            raise ValueError(f"{self.path}: {why_unreadable(self.path) or damaged}") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file; errors are those of `Checkpoint`."""
    with Checkpoint(path) as file:
        return file.tensors()


def state_of(root: Any) -> dict[str, TensorRecord]:
    """The tensors of Lightning's state dict, a bare one, or DDIM's list: state, optimizer, epoch, step (, EMA copies)."""
    if not isinstance(root, list):
        return tensors_of(root["state_dict"] if isinstance(root, dict) and "state_dict" in root else root)
    state, averages = (tensors_of(root[place] if place < len(root) else None) for place in (0, 4))
    copies = ema_names(averages)
    return {**state, **{copies[name]: value for name, value in averages.items()}}


def tensors_of(state: Any) -> dict[str, TensorRecord]:
    """The named tensors of a dict, without the `module.` of DataParallel; none of anything else."""
    items = state.items() if isinstance(state, dict) else ()
    named = {name: value for name, value in items if isinstance(name, str) and isinstance(value, TensorRecord)}
    parallel = all(name.startswith("module.") for name in named)
    return {name.removeprefix("module.") if parallel else name: value for name, value in named.items()}


def ema_names(names: Iterable[str]) -> dict[str, str]:
    """LDM's name for the EMA copy of each parameter; RefusedError if two would have the same."""
    copies = {name: EMA + name.removeprefix("model.").replace(".", "") for name in names}
    if len(set(copies.values())) < len(copies):
        raise RefusedError("two parameters have the same name without dots, so their EMA copies cannot be told apart")
    return copies


def select_names(present: Collection[str], prefix: str, ema: bool) -> dict[str, str]:
    """Map the names below a prefix to names in the file; RefusedError if there are none, or no EMA copies of them."""
    names = [name for name in present if name.startswith(prefix) and (prefix or not name.startswith(EMA))]
    if not names:
        tops = sorted({name.partition(".")[0] + "." for name in present if "." in name})
        raise RefusedError(f"no weights below {prefix!r}; the prefixes in this checkpoint are {', '.join(tops[:12])}")
    sources = ema_names(names) if ema else {name: name for name in names}
    found = set(present)
    if missing := [name for name in names if sources[name] not in found]:
        lacking = f"{len(missing)} of {len(names)} weights below {prefix!r}, such as {missing[0]!r}"
        raise RefusedError(f"no EMA copy ({EMA}*) of {lacking}; set ema=false for the weights themselves")
    return {name.removeprefix(prefix): sources[name] for name in names}


def differences(network: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """The reasons why a state dict is not this network's: names that are missing or unknown, and other shapes."""
    expected = network.state_dict()
    shapes = {name: (tuple(state[name].shape), tuple(expected[name].shape)) for name in expected if name in state}
    kinds = {
        "missing": [name for name in expected if name not in state],
        "not in the architecture": [name for name in state if name not in expected],
        "of another shape": [
            f"{name} {given} instead of {own}" for name, (given, own) in shapes.items() if given != own
        ],
    }
    return [f"{len(names)} {kind}, first {names[0]}" for kind, names in kinds.items() if names]


def assign_weights(network: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Make these tensors a network's own, as float32; it may have been built on the meta device.

    They are taken over, not copied, where they are contiguous float32 already. The network is left in evaluation mode and
    without gradients.

    Raises:
        ValueError: the tensors are not exactly those of the architecture, or no real numbers: integers of a quantized
            file mean nothing without its scales.
    """
    if problems := differences(network, state):
        raise ValueError(f"the weights do not fit the architecture: {'; '.join(problems)}")
    expected = network.state_dict()
    if wrong := [n for n in expected if expected[n].is_floating_point() and not state[n].is_floating_point()]:
        kind = str(state[wrong[0]].dtype).removeprefix("torch.")
        found = f"{len(wrong)} weights are no floating point numbers, first {wrong[0]} ({kind})"
        raise ValueError(f"{found}: quantized by others?")
    network.load_state_dict({name: value.float().contiguous() for name, value in state.items()}, assign=True)
    network.eval().requires_grad_(False)
