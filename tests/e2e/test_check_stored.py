"""Memory of whole runs whose network stays in its files, and what becomes of them when they are killed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "check_stored.py"


@pytest.mark.long
def test_killed_run_goes_on_with_the_same_bits_in_little_memory(tmp_path: Path) -> None:
    """A small network; `python scripts/check_stored.py FOLDER` does the same with one of a GiB."""
    size = "--width", "256", "--blocks", "24", "--kill-after", "5", "--rest-mib", "60", "--iterations", "1"
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path / "check"), *size], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["block"] * 24 > 60 * 2**20  # the network itself is larger
