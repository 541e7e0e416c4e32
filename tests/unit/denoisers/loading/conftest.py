"""A vocabulary for the stored text model."""

import json
from pathlib import Path

import pytest

from tests.helpers.originals import word


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    """A folder with a vocabulary of 97 words of two letters, start 97 and end 98: the text model of `sd_v1`."""
    folder = tmp_path / "words"
    folder.mkdir()
    vocabulary = {f"{word(token)}</w>": token for token in range(97)}
    vocabulary |= {"<|startoftext|>": 97, "<|endoftext|>": 98}
    for letter in "abcdefghij":
        vocabulary |= {letter: len(vocabulary), f"{letter}</w>": len(vocabulary) + 1}
    merges = [f"{word(token)[0]} {word(token)[1]}</w>" for token in range(97)]
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    return folder
