"""Images of a finished run, as the store has them."""

import json
from collections.abc import Iterator
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from tfmq_exp.pipeline.store import Entry


class StoredImages:
    """Images of one network of a run, in the order of their indices; the files are checked against their hashes.

    Args:
        run: folder of the run.
        name: of the stage: `images`, `float images`, or one with an engine's name.

    Raises:
        FileNotFoundError: the run has no such images, or the store no longer has them.
        ValueError: damaged files.
    """

    def __init__(self, run: Path, name: str) -> None:
        record = run / "artifacts.json"
        if not record.is_file():
            raise FileNotFoundError(f"{run} is no folder of a finished run: there is no {record.name}")
        hits = json.loads(record.read_text(encoding="utf-8"))
        if name not in hits:
            raise FileNotFoundError(
                f"{run} has no {name}: run it with until=images or until=scores; it has {', '.join(hits)}"
            )
        stored = Path(hits[name]["path"])  # relative to where the run was started, which is above the run's folder
        places = [parent / stored for parent in (Path(), *run.resolve().parents)]
        entries = [Entry("images", hits[name]["key"], place, {}) for place in places]
        found = next((entry for entry in entries if entry.done), None)
        if found is None:
            raise FileNotFoundError(f"the {name} of {run} are no longer in the store: {stored}; run it again")
        found.verify()
        self.key, self.shards = found.key, sorted(found.path.glob("images-*.safetensors"))
        self.count, self.shape = 0, (0, 0, 0)
        for shard in self.shards:
            with safe_open(shard, framework="pt") as file:
                images, channels, height, width = file.get_slice("images").get_shape()
            self.count, self.shape = self.count + images, (channels, height, width)

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Tensor]:
        """The images, a file at a time, uint8."""
        for shard in self.shards:
            yield load_file(shard)["images"]
