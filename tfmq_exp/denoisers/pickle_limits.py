"""Whether a pickle can be read in little time and memory, seen from its instructions, none of which is carried out.

An unpickler does what a few bytes say: it makes room for a memo of 2^31 places, and hashes a key of tuples within tuples
within tuples by visiting every path through them, as deep as they go. Checkpoints have a few instructions for each tensor, keys
that are text or numbers, and memo places in their order.
"""

import io
import pickletools
from collections.abc import Mapping, Sequence
from typing import Any

LONGEST_PICKLE = 2**25  # bytes; checkpoints have some hundred for each of some thousand tensors
MOST_INSTRUCTIONS = 400_000  # checkpoints have thirty for each tensor
LARGEST_NUMBER, LARGEST_KEY = 4096, 60  # bits; the hashes of integers of more than 60 can all be made equal
HEAVIEST_KEY = 100  # parts of a key that is neither text nor a number
MOST_KEYS = 10_000  # such keys
UNHASHABLE = (
    "APPEND",
    "APPENDS",
    "LIST",
    "EMPTY_LIST",
    "DICT",
    "EMPTY_DICT",
    "SETITEM",
    "SETITEMS",
    "EMPTY_SET",
    "ADDITEMS",
)
PUTS = ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE")
GETS = ("GET", "BINGET", "LONG_BINGET")


class RefusedError(ValueError):
    """Something in the file that is understood, and not accepted."""


def check_limits(file: io.BytesIO) -> None:
    """Go through one pickle, from the present position of a file to its end.

    The stack of the unpickler is followed with weights in the place of objects: how many parts the hash of one visits.

    Raises:
        RefusedError: it has more instructions than any checkpoint's, or such a memo, number or key.
        Exception: any, of a damaged one.
    """
    stack: list[int] = []
    marks: list[int] = []  # how long the stack was at each mark that is still open
    memo: dict[int, int] = {}
    keys = 0
    for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        name = opcode.name
        if count > MOST_INSTRUCTIONS:
            raise RefusedError(f"has a pickle of more than {MOST_INSTRUCTIONS} instructions")
        if name in PUTS:
            memo[place_of(name, argument, memo, count)] = stack[-1]
        elif name in GETS:
            stack.append(memo[int(argument or 0)])
        elif name == "DUP":
            stack.append(stack[-1])
        elif name == "MARK":
            marks.append(len(stack))
        elif name == "POP" and marks and marks[-1] == len(stack):
            marks.pop()
        else:
            taken = take(stack, marks, opcode) if opcode.stack_before else ()
            heavy = [weight for weight in keys_among(name, taken) if weight > 1] if taken else ()
            keys += len(heavy)
            if keys > MOST_KEYS or max(heavy, default=0) > HEAVIEST_KEY:
                raise RefusedError("has keys of tuples within tuples, of very large numbers, or too many such keys")
            if opcode.stack_after:
                stack.append(weight_of(name, argument, taken))


def place_of(name: str, argument: Any, memo: Mapping[int, int], count: int) -> int:
    """Where an instruction puts something in the memo; RefusedError for a place that is not among the next ones."""
    place: int = len(memo) if name == "MEMOIZE" else argument
    if place > count:
        raise RefusedError(f"has a memo of {place} places after {count} instructions")
    return place


def weight_of(name: str, argument: Any, taken: Sequence[int]) -> int:
    """The parts of what an instruction makes of what it takes; `HEAVIEST_KEY` + 1 stands for all that is more.

    Raises:
        RefusedError: a very large number.
    """
    if name in UNHASHABLE:
        return 1
    if type(argument) is int and argument.bit_length() > LARGEST_KEY:
        if argument.bit_length() > LARGEST_NUMBER:
            raise RefusedError(f"holds a number of {argument.bit_length()} bits")
        return HEAVIEST_KEY + 1
    return min(1 + sum(taken), HEAVIEST_KEY + 1)


def take(stack: list[int], marks: list[int], opcode: pickletools.OpcodeInfo) -> list[int]:
    """Remove from the stack what an instruction takes: some objects, and where it asks for a mark all above that, too."""
    before = opcode.stack_before
    top = len(stack)
    if pickletools.markobject in before:
        top = marks.pop()
        before = before[: before.index(pickletools.markobject)]
    start = top - len(before)
    if start < (marks[-1] if marks else 0):
        raise ValueError(f"{opcode.name} takes more than there is")
    taken = stack[start:]
    del stack[start:]
    return taken


def keys_among(name: str, taken: Sequence[int]) -> Sequence[int]:
    """What an instruction hashes of what it takes: every second one for dicts, all for sets."""
    match name:
        case "SETITEM" | "SETITEMS":
            return taken[1::2]
        case "DICT":
            return taken[::2]
        case "ADDITEMS":
            return taken[1:]
        case "FROZENSET":
            return taken
        case _:
            return ()
