"""Weights and noise predictions that goldens give by a formula instead of storing them."""

import ast
import math
import operator
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from goldens.comparing import DamagedError

FNV_START, FNV_PRIME = 0xCBF29CE484222325, 0x100000001B3  # FNV-1a of 64 bits
STEP, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # SplitMix64
WORD = 2**64 - 1

FUNCTIONS = {"tanh": torch.tanh, "sin": torch.sin, "cos": torch.cos}
OPERATORS: dict[type[ast.operator], Any] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def hashed(text: str) -> int:
    """FNV-1a of a text's bytes."""
    found = FNV_START
    for byte in text.encode():
        found = (found ^ byte) * FNV_PRIME & WORD
    return found


def uniform(key: str, seed: int, count: int) -> np.ndarray:
    """Numbers of [-1, 1) with 24 bits each, in double precision: SplitMix64 from a start that key and seed give."""
    start = np.uint64(hashed(key) ^ (seed * STEP & WORD))
    z = start + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(STEP)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(FIRST)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(SECOND)
    z ^= z >> np.uint64(31)
    return 2 * ((z >> np.uint64(40)).astype(np.float64) / 2**24) - 1


def weight(key: str, shape: Sequence[int], seed: int) -> Tensor:
    """The parameter of this name, in single precision."""
    r = uniform(key, seed, math.prod(shape)).reshape(shape)
    if len(shape) < 2:
        values = 1 + 0.4 * r if key.endswith(".weight") else 0.2 * r
    elif "embedding" in key:
        values = 1.2 * r
    else:
        values = math.sqrt(3 / math.prod(shape[1:])) * r
    return torch.from_numpy(values.astype(np.float32))


def evaluate(formula: str, names: Mapping[str, Tensor]) -> Tensor:
    """The value of `eps = ...`: numbers, these names, the four operations, and functions of one argument.

    Raises:
        DamagedError: anything else.
    """

    def value(node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=float() | int() as number):
                return number
            case ast.Name(id=name) if name in names:
                return names[name]
            case ast.BinOp(left=left, op=operation, right=right) if type(operation) in OPERATORS:
                return OPERATORS[type(operation)](value(left), value(right))
            case ast.Call(func=ast.Name(id=name), args=[argument]) if name in FUNCTIONS:
                return FUNCTIONS[name](value(argument))
        raise DamagedError(f"{ast.unparse(node)!r} in {formula!r} is none of {', '.join([*names, *FUNCTIONS])}")

    try:
        tree = ast.parse(formula.partition("=")[2].strip(), mode="eval")
    except SyntaxError as error:
        raise DamagedError(f"{formula!r} is no formula: {error}") from error
    return value(tree.body)
