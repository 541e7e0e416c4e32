"""What OpenVINO's CPU plugin really executes, read from the compiled model: names and element types of the IR do not tell."""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

PRODUCTS = ("Convolution", "FullyConnected", "MatMul")
INTEGER = re.compile(r"_[iu]8$", re.IGNORECASE)  # jit_avx2_I8, brgconv_avx512_I8, jit_gemm_i8
BYTES = ("u8", "i8")


@dataclass(frozen=True)
class Executed:
    """A node of the execution graph: what of the model is in it, its kind, its kernel, and the types that it reads."""

    layers: tuple[str, ...]
    kind: str
    kernel: str
    reads: tuple[str, ...]

    @property
    def product(self) -> bool:
        """A convolution or a matrix product."""
        return self.kind in PRODUCTS

    @property
    def integer(self) -> bool:
        """A product of bytes by a kernel for bytes."""
        return self.product and bool(INTEGER.search(self.kernel)) and all(t in BYTES for t in self.reads[:2])


def executed(compiled: Any) -> list[Executed]:
    """The execution graph of a compiled model."""
    found: list[Executed] = []
    for op in compiled.get_runtime_model().get_ordered_ops():
        info = op.get_rt_info()
        texts = {name: info[name].astype(str) for name in ("originalLayersNames", "layerType", "primitiveType")}
        reads = tuple(op.get_input_element_type(i).get_type_name() for i in range(op.get_input_size()))
        layers = tuple(texts["originalLayersNames"].split(","))
        found.append(Executed(layers, texts["layerType"], texts["primitiveType"], reads))
    return found


def check_integer(graph: Sequence[Executed], products: Mapping[str, Sequence[str]]) -> None:
    """Compare what is executed with what was planned.

    Args:
        graph: the execution graph.
        products: names of the products in integers, by site.

    Raises:
        ValueError: a product that is executed in another way; names the site and the kernel.
    """
    # a fused node may go under the name of what stood behind the product
    of_layer = {layer.split("/Dequantization")[0]: node for node in graph if node.product for layer in node.layers}
    wrong: list[str] = []
    for site, names in products.items():
        for name in names:
            node = of_layer.get(name)
            if node is None:
                wrong.append(f"{site} (not found)")
            elif not node.integer:
                wrong.append(f"{site} ({node.kernel} of {' and '.join(node.reads[:2])})")
    if wrong:
        raise ValueError(f"{len(wrong)} products are not executed in integers: {', '.join(wrong[:8])}")


def counted(graph: Sequence[Executed]) -> dict[str, int]:
    """How many products each kernel executes."""
    return dict(Counter(f"{node.kind} {node.kernel}" for node in graph if node.product))
