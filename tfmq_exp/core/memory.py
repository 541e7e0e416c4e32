"""Memory that is free, and given back to the system."""

import ctypes
import gc


def give_back_memory() -> None:
    """Collect what refers to itself in circles, and have glibc return the pages that are free: it keeps them otherwise."""
    gc.collect()
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
