"""Pickles of other programs, read without running what they ask for.

A pickle is a program. Here it may use the names of a fixed table alone, and none is looked up in a real module. A few bytes may
also ask for unlimited work, such as the hash of a key of tuples within tuples (2^45 parts), so instructions and keys have limits.
`torch.load(weights_only=True)` has none: it hangs or crashes on such keys, and it refuses the sets and bytes of other programs.
"""

import pickle
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable, Iterable
from io import BytesIO
from itertools import islice
from typing import Any

MOST_INSTRUCTIONS = 400_000  # checkpoints have thirty for each tensor
HEAVIEST_KEY, MOST_HEAVY_KEYS = 100, 10_000  # parts of a key, and how many keys may have more than one
LARGEST_KEY = 60  # bits; the hashes of larger integers can all be made equal
PythonUnpickler: Any = pickle._Unpickler  # that of C hashes keys before they can be checked


class RefusedError(ValueError):
    """Something in a file that is understood, and not accepted."""


def parts_of(key: Any) -> int:
    """The number of objects that are visited to hash a key; `HEAVIEST_KEY` + 1 for all that is more."""
    waiting, count = [key], 0
    while waiting and count <= HEAVIEST_KEY:
        part = waiting.pop()
        count += 1
        if isinstance(part, tuple | frozenset):
            waiting += islice(part, HEAVIEST_KEY + 1)
        elif type(part) is int and part.bit_length() > LARGEST_KEY:
            return HEAVIEST_KEY + 1
    return count


class SafeUnpickler(PythonUnpickler):
    """An unpickler with limits and a fixed table of names.

    Args:
        content: the pickle, from its present position.
        encoding: of the strings of Python 2.
    """

    refusal = "it could run code"

    def __init__(self, content: BytesIO, encoding: str) -> None:
        super().__init__(content, encoding=encoding)
        self.instructions = self.heavy_keys = 0

    def known(self, name: str) -> Any:
        """The object by a name with its module, none of which may be changed by a pickle; None refuses the name."""
        raise NotImplementedError

    def find_class(self, module: str, name: str, /) -> Any:
        """Look a name up; RefusedError for one that is not known."""
        # protocols 0 to 2 write the names of Python 2
        full = ".".join(NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name)))
        if not all(part.isidentifier() for part in full.split(".")):
            raise pickle.UnpicklingError("not a name")  # text that happens to look like an instruction
        if (found := self.known(full)) is None:
            raise RefusedError(f"refuses to load {full[:100]!r}: {self.refusal}")
        return found

    def check(self, keys: Iterable[Any]) -> None:
        """Count an instruction and the keys that it hashes; RefusedError for more than any file has."""
        self.instructions += 1
        if self.instructions > MOST_INSTRUCTIONS:
            raise RefusedError(f"has a pickle of more than {MOST_INSTRUCTIONS} instructions")
        for key in keys:
            parts = parts_of(key)
            self.heavy_keys += parts > 1
            if parts > HEAVIEST_KEY or self.heavy_keys > MOST_HEAVY_KEYS:
                raise RefusedError("has keys of tuples within tuples, of very large numbers, or too many such keys")


ALL, PAIRS = slice(None), slice(None, None, 2)
# Where on the stack an instruction finds what it hashes.
HASHED = {
    pickle.SETITEM: slice(-2, -1),
    pickle.SETITEMS: PAIRS,
    pickle.DICT: PAIRS,
    pickle.ADDITEMS: ALL,
    pickle.FROZENSET: ALL,
}
REGISTERED = (pickle.EXT1, pickle.EXT2, pickle.EXT4)  # objects that other programs registered: never those of a file


def checked(code: bytes) -> Callable[[SafeUnpickler], None]:
    """An instruction of the unpickler that is checked before it runs."""
    # bytes in the place of a bytearray, whose memory is taken before its content is there
    run = PythonUnpickler.dispatch[(pickle.BINBYTES8 if code == pickle.BYTEARRAY8 else code)[0]]
    keys = HASHED.get(code, slice(0))

    def instruction(unpickler: SafeUnpickler) -> None:
        unpickler.check(unpickler.stack[keys])
        run(unpickler)

    return instruction


codes = (bytes([code]) for code in PythonUnpickler.dispatch)
SafeUnpickler.dispatch = {code[0]: checked(code) for code in codes if code not in REGISTERED}
