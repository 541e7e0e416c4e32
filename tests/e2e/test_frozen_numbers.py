"""Random streams, tensors, images and scores of three small runs are those that were recorded."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RECORDED = ROOT / "tests/goldens/frozen_numbers.json"


def shapes(tensors: list[str]) -> list[str]:
    return [line.rpartition(" ")[0] for line in tensors]


def test_a_change_of_structure_changes_no_number(tmp_path: Path) -> None:
    """In a process of its own: what other tests have computed and kept in memory draws from no stream again."""
    recorded, target = json.loads(RECORDED.read_text(encoding="utf-8")), tmp_path / "numbers.json"
    names = [name for name in recorded if name != "machine"]
    command = [sys.executable, ROOT / "scripts/frozen_numbers.py", target, "--only", *names]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run(command, check=True, cwd=tmp_path, env=environment, capture_output=True, timeout=300)
    found: dict[str, Any] = json.loads(target.read_text(encoding="utf-8"))
    assert len(names) == 3
    for name in names:
        assert found[name]["streams"] == recorded[name]["streams"], name
        assert shapes(found[name]["model"]) == shapes(recorded[name]["model"]), name
        if found["machine"] == recorded["machine"]:  # sums of another processor differ in the last bits
            assert found[name] == recorded[name], name
