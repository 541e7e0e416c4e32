"""Index ranges of consecutive batches."""


def batches(count: int, size: int) -> list[range]:
    """The indices 0 .. count - 1 in ranges of `size`; the last may be shorter."""
    return [range(start, min(start + size, count)) for start in range(0, count, size)]
