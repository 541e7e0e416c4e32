"""Warnings of other packages about themselves are dropped; others of the same loggers are not."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize("name", ["torch.utils._pytree", "diffusers.quantizers.torchao.torchao_quantizer"])
def test_other_messages_are_shown(name: str, caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger(name)
    record = logger.makeRecord(name, logging.WARNING, "", 0, "%s is an Enum subclass and more", ("x",), None)
    other = logger.makeRecord(name, logging.WARNING, "", 0, "something else", (), None)
    assert bool(logger.filter(record)) == (name != "torch.utils._pytree")
    assert logger.filter(other)


@pytest.mark.slow
def test_networks_are_imported_silently() -> None:
    code = "import tfmq_exp.denoisers.digits, tfmq_exp.surgery.quantized_network"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert (said.stdout, said.stderr) == ("", "")
