"""LSUN as it is published: a database of encoded images (arXiv 1506.03365)."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import lmdb
from jaxtyping import UInt8
from torch import Tensor

from tfmq_exp.data.decoding import decode, describe, in_order, stacked
from tfmq_exp.data.hashes import hash_file
from tfmq_exp.data.preparation import CropThenResize, Pixels, Preparation


class LSUN:
    """The images of an LMDB folder, whose values are WebP or JPEG files, in the order of their keys.

    A database can be open once in a process, so its batches are read by one reader at a time. `size` is that of a side after
    preparation, which is latent-diffusion's by default; `origin` is where the data set is published.
    """

    def __init__(
        self, path: str, size: int, preparation: Preparation | None = None, origin: str = "https://github.com/fyu/lsun"
    ) -> None:
        self.path, self.preparation = Path(path), preparation or CropThenResize()
        if not (self.path / "data.mdb").is_file():
            raise FileNotFoundError(
                f"no LMDB at {path}: expected a folder such as church_outdoor_train_lmdb, with data.mdb in it, from {origin} "
                "(nothing is downloaded); for a folder of image files set data=image_folder"
            )
        with open_database(self.path) as database:
            self.count = database.stat()["entries"]
        if not self.count:
            raise ValueError(f"the LMDB at {path} is empty")
        self.shape = (3, size, size)
        self.identity: Mapping[str, Any] = {
            "database": self.path.resolve().name,
            "images": self.count,
            "sha256": hash_file(self.path / "data.mdb"),
            "size": size,
            "preparation": describe(self.preparation),
        }

    def __len__(self) -> int:
        return self.count

    def batches(self, size: int) -> Iterator[UInt8[Tensor, "batch 3 height width"]]:
        """Read all images, `size` at a time; ValueError with the key of one that cannot be read."""
        return stacked(self._images(), size)

    def _images(self) -> Iterator[Pixels]:
        def decoded(entry: tuple[bytes, bytes]) -> Pixels:
            return decode(f"{self.path}: {entry[0]!r}", entry[1], self.shape[1], self.preparation)

        with open_database(self.path) as database, database.begin() as transaction:
            yield from in_order(decoded, transaction.cursor())


def open_database(path: Path) -> lmdb.Environment:
    """Open a database read-only and without a lock file, so that it may lie on a read-only disk."""
    try:
        return lmdb.open(str(path), readonly=True, lock=False, create=False, readahead=False)
    except lmdb.Error as error:
        raise ValueError(f"cannot open the LMDB at {path}: {error}") from error
