"""Files that are there whole, or not at all, whenever a process dies."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file under a temporary name and move it into place."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        write(partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, data: Any) -> None:
    """JSON in UTF-8, whatever the locale; a name of a file that is no text keeps its bytes, in JSON's own notation."""
    text = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
    write_atomically(path, lambda p: p.write_text(text, encoding="utf-8", errors="backslashreplace"))
