"""Memory that a reconstruction takes where the network is not in memory, and what becomes of it when it is killed."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "scripts" / "bench_blocks.py"
MIB = 2**20


def test_killed_reconstruction_goes_on_with_the_same_bits_in_little_memory(tmp_path: Path) -> None:
    """A small network; `python scripts/bench_blocks.py check FOLDER` does the same with one of a GiB, in minutes."""
    size = "--width", "128", "--blocks", "5", "--kill-after", "5", "--rest-mib", "200"
    done = subprocess.run([sys.executable, str(SCRIPT), "check", str(tmp_path), *size], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["whole"]["units"] == {"restored": 0, "learned": 9}
    assert found["resumed"]["units"] == {"restored": 5, "learned": 4}
    # the check can fail
    assert found["whole"]["peak"] > 2 * found["whole"]["block"] + found["whole"]["streams"]
