"""The header of a safetensors file, and what is wrong with a damaged one."""

import json
import math
from pathlib import Path
from typing import Any

LONGEST = 100_000_000  # bytes of a header, as the library has it
AGAIN = "download it again"


def header_fault(path: Path) -> str | None:
    """A sentence on what is wrong with the header of a file that begins as safetensors; None where it holds together."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > LONGEST:
            return (
                f"is damaged: its header says that it has {length} bytes, and at most {LONGEST} are possible: {AGAIN}"
            )
        if 8 + length > size:
            return f"is truncated: it begins as safetensors of at least {8 + length} bytes and has {size}: {AGAIN}"
        text = file.read(length)
    try:
        entries = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())[:80]
        return f"is damaged: its header is not JSON ({reason}): {AGAIN}"
    if not isinstance(entries, dict):
        return f"is damaged: its header is no object of JSON: {AGAIN}"
    ends = [8 + length]
    for name, entry in entries.items():
        if name != "__metadata__":
            if (end := end_of(entry)) is None:
                return (
                    f"is damaged: its header has no dtype, shape and place for {name!r:.60}, but {entry!r:.80}: {AGAIN}"
                )
            ends.append(8 + length + end)
    if max(ends) > size:
        return f"is truncated: it begins as safetensors of {max(ends)} bytes and has {size}: {AGAIN}"
    return None


def end_of(entry: Any) -> int | None:
    """End of a tensor, counted from where the first one begins; None for an entry that describes no tensor."""
    if not isinstance(entry, dict) or not isinstance(entry.get("dtype"), str):
        return None
    shape, place = sizes_of(entry.get("shape")), sizes_of(entry.get("data_offsets"))
    if shape is None or place is None:
        return None
    if len(place) != 2 or place[0] > place[1] or (math.prod(shape) > 0) != (place[0] < place[1]):
        return None
    return place[1]


def sizes_of(value: Any) -> list[int] | None:
    """A list of whole numbers that are not negative; None for anything else."""
    return value if isinstance(value, list) and all(type(n) is int and n >= 0 for n in value) else None
