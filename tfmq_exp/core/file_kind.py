"""The kind of a file by its first bytes, whatever its name says, and what to do where it is not the expected one."""

import re
from pathlib import Path

from tfmq_exp.core.safetensors_header import AGAIN, header_fault

HEAD = 512  # bytes that are read
UNPACK = "unpack it, and give the file inside"
PICTURE = "is a picture"
CONVERT = "convert it with the program that it belongs to, or take the publisher's safetensors"
LFS = "is a pointer of Git LFS, not the file itself: fetch it with `git lfs pull`"
ARCHIVES = {
    **{b"\x1f\x8b": "a gzip", b"BZh": "a bzip2", b"\xfd7zXZ\x00": "an xz", b"\x28\xb5\x2f\xfd": "a zstd"},
    **{b"\x04\x22\x4d\x18": "an lz4", b"7z\xbc\xaf\x27\x1c": "a 7z", b"Rar!\x1a\x07": "a rar"},
}
# First bytes -> what the file is, and what to do.
SIGNATURES = {
    **{b"version https://git-lfs": LFS, b"version https://hawser": LFS},
    b"# xet version": f"is a pointer of Xet, not the file itself: {AGAIN}",
    b"/annex/objects/": "is a pointer of git-annex, not the file itself: fetch it with `git annex get`",
    b"PK\x05\x06": f"is an empty zip archive: {AGAIN}",
    **{mark: f"is {name} archive: {UNPACK}" for mark, name in ARCHIVES.items()},
    b"\x93NUMPY": "is a .npy file of NumPy, which holds one array",
    b"GGUF": f"is a GGUF file of llama.cpp's family: {CONVERT}",
    b"\x89HDF\r\n\x1a\n": f"is an HDF5 file, as Keras writes (.h5): {CONVERT}",
    b"PTMF": f"is a mobile program of PyTorch: {CONVERT}",
    b"%PDF-": f"is a PDF: {AGAIN}",
    b"%!PS": "is PostScript, which is a program",
    **dict.fromkeys((b"\x89PNG\r\n", b"\xff\xd8\xff", b"GIF8"), PICTURE),
    **dict.fromkeys((b"\x7fELF", b"MZ\x90\x00"), "is a program"),
}
LATER = {(257, b"ustar"): f"is a tar archive: {UNPACK}", (4, b"TFL3"): f"is a model of TensorFlow Lite: {CONVERT}"}
UNFINISHED = (".part", ".partial", ".crdownload", ".incomplete", ".download", ".aria2")
# The end of names of files without a signature of their own.
NAMES = {
    rf"({'|'.join(map(re.escape, UNFINISHED))}|\.opdownload|\.!ut)$": f"is a download that has not ended: {AGAIN}",
    r"\.msgpack$": f"holds weights of Flax: {CONVERT}",
    r"\.onnx$": f"is a model of ONNX: {CONVERT}",
    r"\.index$|\.data-\d+-of-\d+$|\.meta$": f"is a part of a checkpoint of TensorFlow: {CONVERT}",
    r"\.index(\.\w+)?\.json$": "is the index of a model in several files: give the folder that it is in",
}
# Two or three bytes, which texts may begin with, too.
WEAK = {
    rb"\x08[\x01-\x14]\x12": f"is a model of ONNX: {CONVERT}",  # its version, then the program that wrote it
    rb"[\x81-\x8f][\xa1-\xbf\xd9]": f"holds weights of Flax (msgpack): {CONVERT}",  # a map whose first key is text
}
TORCH = (b"PK\x03\x04", b"\x80\x02\x8a\x0a")  # zip files, which others are too, and what came before them
LEVEL_DB = b"\x57\xfb\x80\x8b\x24\x75\x47\xdb"  # the end of TensorFlow's .index


def read_head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(HEAD)


def is_safetensors(path: Path) -> bool:
    """Whether a file begins as safetensors do: the length of a header, then the header's brace."""
    head = read_head(path)
    return len(head) > 8 and head[7:9] == b"\0{" and int.from_bytes(head[:8], "little") >= 2  # no text has that zero


def kind_of(path: Path) -> str | None:
    """A sentence on what a path is and what to do, where it is certainly no file of tensors; None where it may be one."""
    if path.is_dir():
        return "is a folder; expected a file"
    if not path.is_file():
        return "is no regular file; expected a checkpoint"
    if not (head := read_head(path)):
        return f"is empty; expected a checkpoint: {AGAIN}"
    if is_safetensors(path) or head.startswith(TORCH):
        return None
    return by_signature(head) or by_name(path) or by_text(head)


def content_of(head: bytes) -> str | None:
    """A sentence on what a file is and what to do, from its first `HEAD` bytes; None where they do not say."""
    if not head:
        return f"is empty: {AGAIN}"
    if re.match(rb"\x80[\x02-\x05]", head):
        return "is a pickle, which is not read: a pickle is a program"
    if head.startswith(TORCH[0]):
        return f"is a zip archive: {UNPACK}"
    return by_signature(head) or by_text(head)


def by_signature(head: bytes) -> str | None:
    """The kind that the signature at the beginning of a file says."""
    found = [kind for mark, kind in SIGNATURES.items() if head.startswith(mark)]
    found += [kind for (offset, mark), kind in LATER.items() if head[offset:].startswith(mark)]
    return found[0] if found else None


def by_name(path: Path) -> str | None:
    return next((kind for end, kind in NAMES.items() if re.search(end, path.name, re.IGNORECASE)), None)


def by_text(head: bytes) -> str | None:
    """A page or a message that a server sent in the place of a file; or one of a signature that texts may have, too."""
    text = head.decode("utf-8", errors="replace").lstrip("\ufeff\0 \t\r\n")
    if re.match(r"<(!doctype html|html|head|body|script|meta)", text, re.IGNORECASE):
        return f"is a web page (HTML), not the file itself: {AGAIN}, by the link of the file and logged in where that is asked"
    for pattern, form in ((r"<[!?/a-zA-Z]", "XML"), (r'\{\s*"|\[\s*[{"\]]|\{\s*\}', "JSON")):
        if re.match(pattern, text):
            return f"is {form}, such as the message of a server ({quoted(text)}): {AGAIN}"
    return next((kind for pattern, kind in WEAK.items() if re.match(pattern, head)), None)


def instead_of_text(path: Path) -> str | None:
    """`kind_of` a file that should be a configuration or a vocabulary; None where it may be one."""
    kind = kind_of(path)
    return None if kind is None or kind.startswith("is JSON") else kind


def instead_of_lines(head: bytes) -> str | None:
    """A pointer to a file or a web page, which have lines of text, too; None where it is neither."""
    found = by_signature(head) or by_text(head)
    return found if found and re.match(r"is a (pointer|web page)", found) else None


def quoted(text: str) -> str:
    return repr(" ".join(text.split())[:60])


def why_unreadable(path: Path) -> str | None:
    """The fault of a file that looked like tensors and could not be read, where its bytes say it; None otherwise."""
    if is_safetensors(path):
        return header_fault(path)
    size, head = path.stat().st_size, read_head(path)
    with path.open("rb") as file:
        file.seek(max(0, size - 8))
        end = file.read()
    if kind := by_name(path):
        return kind
    if not head.strip(b"\0"):
        return f"begins with zeros; expected a checkpoint: a download that has not ended? {AGAIN}"
    if end == LEVEL_DB:
        return f"is a part of a checkpoint of TensorFlow: {CONVERT}"
    text = head.decode("utf-8", errors="replace")
    if re.sub(r"[\n\r\t]", "", text.rstrip("\ufffd")).isprintable():
        return f"is text, no checkpoint: it begins {quoted(text)}"
    return None


def unreadable(path: Path, error: Exception) -> str:
    """A sentence on a file that could not be read as safetensors, by its bytes where they say it."""
    fault = (kind_of(path) or why_unreadable(path)) if path.exists() else None
    return fault or f"is not readable (damaged or truncated?): {error}"


def why_missing(path: Path) -> str:
    """A link that leads nowhere, or a download that has not ended, in the place of a path that does not exist."""
    if path.is_symlink():
        return f" (it is a link to {path.readlink()}, which is not there)"
    parts = (path.with_name(path.name + ending) for ending in UNFINISHED)
    return next((f" (there is {part.name}, a download that has not ended)" for part in parts if part.exists()), "")
