"""Whether a pickle can be read in little time and memory, seen from its instructions, none of which is carried out.

An unpickler does what a few bytes say: it makes room for a memo of 2^31 places, and hashes a key of tuples within tuples
within tuples by visiting every path through them, as deep as they go. Checkpoints have a few instructions for each tensor, keys
that are text or numbers, and memo places in their order.
"""

import io
import pickletools
from collections.abc import Sequence

LONGEST_PICKLE = 2**25  # bytes; the largest known checkpoints have some hundred bytes for each of some thousand tensors
MOST_INSTRUCTIONS = 600_000
LARGEST_INTEGER = 2**60  # as a key: the hashes of larger ones can all be made equal
MOST_BITS = 4096  # of any integer
HEAVIEST_KEY, MOST_KEYS = (
    100,
    10_000,
)  # parts of one key that is no text and no number, and how many there may be of these
UNHASHABLE = frozenset("APPEND APPENDS LIST EMPTY_LIST DICT EMPTY_DICT SETITEM SETITEMS EMPTY_SET ADDITEMS".split())
PUTS = frozenset(("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"))
GETS = frozenset(("GET", "BINGET", "LONG_BINGET"))


class RefusedError(ValueError):
    """Something in the file that is understood, and not accepted."""


def check_limits(file: io.BytesIO) -> None:
    """Go through one pickle, from the present position of a file to its end.

    The stack of the unpickler is followed with weights in the place of objects: how many parts the hash of one visits.

    Raises:
        RefusedError: it is longer than any checkpoint's, or has such a memo, number or key.
        Exception: any, of a damaged one.
    """
    stack: list[int] = []
    marks: list[int] = []  # how long the stack was at each mark that is still open
    memo: dict[int, int] = {}
    keys = 0
    for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        name = opcode.name
        if count > MOST_INSTRUCTIONS or file.tell() > LONGEST_PICKLE:
            raise RefusedError(f"has a pickle of more than {MOST_INSTRUCTIONS} instructions or {LONGEST_PICKLE} bytes")
        if type(argument) is int and argument.bit_length() > MOST_BITS:
            raise RefusedError(f"holds a number of {argument.bit_length()} bits")
        if name in PUTS:
            place = len(memo) if name == "MEMOIZE" else argument
            if place > count:
                raise RefusedError(f"has a memo of {place} places after {count} instructions")
            memo[place] = stack[-1]
        elif name in GETS:
            stack.append(memo[argument])
        elif name == "DUP":
            stack.append(stack[-1])
        elif name == "MARK":
            marks.append(len(stack))
        elif name == "POP" and marks and marks[-1] == len(stack):
            marks.pop()
        else:
            taken = take(stack, marks, opcode)
            for weight in keys_among(name, taken):
                keys += weight > 1
                if weight > HEAVIEST_KEY or keys > MOST_KEYS:
                    raise RefusedError("has keys of tuples within tuples, of very large numbers, or too many such keys")
            if opcode.stack_after:
                large = type(argument) is int and abs(argument) >= LARGEST_INTEGER
                parts = 0 if name in UNHASHABLE else HEAVIEST_KEY if large else sum(taken)
                stack.append(min(1 + parts, HEAVIEST_KEY + 1))


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
