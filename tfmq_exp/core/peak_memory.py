"""Peak memory of a computation, from the tensors that it makes."""

import weakref
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode


class PeakMemory(TorchDispatchMode):
    """Peak bytes of the tensors made inside the block; workspaces of kernels are not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        leaves = [[x for x in pytree.tree_leaves(tree) if isinstance(x, Tensor)] for tree in ((args, kwargs), out)]
        given, made = ({x.untyped_storage()._cdata: x.untyped_storage() for x in some} for some in leaves)
        for name in made.keys() - given.keys() - self.alive.keys():
            self.alive[name] = made[name].nbytes()
            weakref.finalize(made[name], self.alive.pop, name, None)
        self.bytes = max(self.bytes, sum(self.alive.values()))
        return out
