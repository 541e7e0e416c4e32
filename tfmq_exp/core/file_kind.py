"""The kind of a file by its first bytes, whatever its name says, and what to do where it is not the expected one."""

import re
from pathlib import Path

HEAD = 512  # bytes that are read
AGAIN = "download it again"
UNPACK = "unpack it, and give the file inside"
PICTURE = "is a picture"
CONVERT = "convert it with the program that it belongs to, or take the publisher's safetensors"
ARCHIVES = {
    **{b"\x1f\x8b": "a gzip", b"BZh": "a bzip2", b"\xfd7zXZ\x00": "an xz", b"\x28\xb5\x2f\xfd": "a zstd"},
    **{b"\x04\x22\x4d\x18": "an lz4", b"7z\xbc\xaf\x27\x1c": "a 7z", b"Rar!\x1a\x07": "a rar"},
}
# (offset, bytes, what the file is, what to do)
SIGNATURES: tuple[tuple[int, bytes, str, str], ...] = (
    (0, b"version https://git-lfs", "is a pointer of Git LFS, not the file itself", "fetch it with `git lfs pull`"),
    (0, b"version https://hawser", "is a pointer of Git LFS, not the file itself", "fetch it with `git lfs pull`"),
    (0, b"# xet version", "is a pointer of Xet, not the file itself", AGAIN),
    (0, b"/annex/objects/", "is a pointer of git-annex, not the file itself", "fetch it with `git annex get`"),
    (0, b"PK\x05\x06", "is an empty zip archive", AGAIN),
    *((0, mark, f"is {name} archive", UNPACK) for mark, name in ARCHIVES.items()),
    (257, b"ustar", "is a tar archive", UNPACK),
    (0, b"\x93NUMPY", "is a .npy file of NumPy, which holds one array", ""),
    (0, b"GGUF", "is a GGUF file of llama.cpp's family", CONVERT),
    (0, b"\x89HDF\r\n\x1a\n", "is an HDF5 file, as Keras writes (.h5)", CONVERT),
    (4, b"TFL3", "is a model of TensorFlow Lite", CONVERT),
    (0, b"PTMF", "is a mobile program of PyTorch", CONVERT),
    (0, b"%PDF-", "is a PDF", AGAIN),
    (0, b"%!PS", "is PostScript, which is a program", ""),
    *((0, mark, PICTURE, "") for mark in (b"\x89PNG\r\n", b"\xff\xd8\xff", b"GIF8")),
    *((0, mark, "is a program", "") for mark in (b"\x7fELF", b"MZ\x90\x00")),
)
# The end of names of files without a signature of their own.
NAMES: tuple[tuple[str, str, str], ...] = (
    (
        r"\.(part|partial|crdownload|incomplete|download|opdownload|aria2|!ut)$",
        "is a download that has not ended",
        AGAIN,
    ),
    (r"\.(msgpack)$", "holds weights of Flax", CONVERT),
    (r"\.(onnx)$", "is a model of ONNX", CONVERT),
    (r"\.index$|\.data-\d+-of-\d+$|\.meta$", "is a part of a checkpoint of TensorFlow", CONVERT),
    (r"\.index(\.\w+)?\.json$", "is the index of a model in several files", "give the folder that it is in"),
)
# Two or three bytes, which texts may begin with, too.
WEAK = (
    (rb"\x08[\x01-\x14]\x12", f"is a model of ONNX: {CONVERT}"),  # its version, then the program that wrote it
    (rb"[\x81-\x8f][\xa1-\xbf\xd9]", f"holds weights of Flax (msgpack): {CONVERT}"),  # a map whose first key is text
)
TORCH = (b"PK\x03\x04", b"\x80\x02\x8a\x0a")  # zip files, which others are too, and what came before them
LEVEL_DB = b"\x57\xfb\x80\x8b\x24\x75\x47\xdb"  # the end of TensorFlow's .index
UNFINISHED = (".part", ".partial", ".crdownload", ".incomplete", ".download", ".aria2")


def read_head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(HEAD)


def is_safetensors(path: Path) -> bool:
    """Whether a file begins as safetensors do: the length of a header, then the header's brace."""
    head = read_head(path)
    return len(head) > 8 and head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") <= 100_000_000


def kind_of(path: Path) -> str | None:
    """A sentence on what a path is and what to do, where it is certainly no file of tensors; None where it may be one."""
    if path.is_dir():
        return "is a folder; expected a file"
    if not path.is_file():
        return "is no regular file; expected a checkpoint"
    if path.stat().st_size == 0:
        return f"is empty; expected a checkpoint: {AGAIN}"
    head = read_head(path)
    if is_safetensors(path) or head.startswith(TORCH):
        return None
    return by_signature(head) or by_name(path) or markup(head) or by_weak_signature(head)


def content_of(head: bytes) -> str | None:
    """A sentence on what a file is and what to do, from its first `HEAD` bytes; None where they do not say."""
    if not head:
        return f"is empty: {AGAIN}"
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "is a pickle, which is not read: a pickle is a program"
    if head.startswith(TORCH[0]):
        return f"is a zip archive: {UNPACK}"
    return by_signature(head) or markup(head) or by_weak_signature(head)


def by_signature(head: bytes) -> str | None:
    """The kind that the signature at the beginning of a file says."""
    found = ((kind, advice) for offset, mark, kind, advice in SIGNATURES if head[offset:].startswith(mark))
    return next((f"{kind}: {advice}" if advice else kind for kind, advice in found), None)


def by_weak_signature(head: bytes) -> str | None:
    return next((kind for pattern, kind in WEAK if re.match(pattern, head)), None)


def by_name(path: Path) -> str | None:
    found = (f"{kind}: {advice}" for end, kind, advice in NAMES if re.search(end, path.name, re.IGNORECASE))
    return next(found, None)


def markup(head: bytes) -> str | None:
    """A page or a message that a server sent in the place of a file."""
    text = head.decode("utf-8", errors="replace").lstrip("\ufeff\0 \t\r\n")
    if re.match(r"<(!doctype html|html|head|body|script|meta)", text, re.IGNORECASE):
        return f"is a web page (HTML), not the file itself: {AGAIN}, by the link of the file and logged in where that is asked"
    if text.startswith("<") and re.match(r"<[!?/a-zA-Z]", text):
        return f"is XML, such as the message of a server ({quoted(text)}): {AGAIN}"
    if re.match(r'\{\s*"|\[\s*[{"\]]|\{\s*\}', text):
        return f"is JSON, such as the message of a server ({quoted(text)}): {AGAIN}"
    return None


def instead_of_text(path: Path) -> str | None:
    """`kind_of` a file that should be a configuration or a vocabulary; None where it may be one."""
    kind = kind_of(path)
    return None if kind is None or kind.startswith("is JSON") else kind


def instead_of_lines(head: bytes) -> str | None:
    """A pointer to a file or a web page, which have lines of text, too; None where it is neither."""
    found = by_signature(head) or markup(head)
    return found if found and re.match(r"is a (pointer|web page)", found) else None


def quoted(text: str) -> str:
    """The beginning of a text, in one line of printable characters."""
    return repr(" ".join(text.split())[:60])


def why_unreadable(path: Path) -> str | None:
    """The fault of a file that looked like tensors and could not be read, where its bytes say it; None otherwise."""
    size, head = path.stat().st_size, read_head(path)
    if is_safetensors(path):
        return truncated_safetensors(path, size)
    if kind := by_name(path):
        return kind
    if not head.strip(b"\0"):
        return f"begins with zeros; expected a checkpoint: a download that has not ended? {AGAIN}"
    with path.open("rb") as file:
        file.seek(max(0, size - 8))
        if file.read() == LEVEL_DB:
            return f"is a part of a checkpoint of TensorFlow: {CONVERT}"
    text = head.decode("utf-8", errors="replace")
    if re.sub(r"[\n\r\t]", "", text.rstrip("\ufffd")).isprintable():
        return f"is text, no checkpoint: it begins {quoted(text)}"
    return None


def truncated_safetensors(path: Path, size: int) -> str | None:
    """The size that the header of safetensors implies, where the file is smaller."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = file.read(length)
    ends = [int(end) for end in re.findall(rb'"data_offsets":\s*\[\s*\d{1,18}\s*,\s*(\d{1,18})\s*\]', header)]
    expected = 8 + length + max(ends, default=0)
    if expected <= size:
        return None
    least = "" if len(header) == length else "at least "
    return f"is truncated: it begins as safetensors of {least}{expected} bytes and has {size}: {AGAIN}"


def why_missing(path: Path) -> str:
    """A link that leads nowhere, or a download that has not ended, in the place of a path that does not exist."""
    if path.is_symlink():
        return f" (it is a link to {path.readlink()}, which is not there)"
    parts = (path.with_name(path.name + ending) for ending in UNFINISHED)
    return next((f" (there is {part.name}, a download that has not ended)" for part in parts if part.exists()), "")
