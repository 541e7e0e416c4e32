"""What a file is by its first bytes, where it is not what was expected."""

STARTS = {
    b"version https://git-lfs": "a pointer of Git LFS: the file itself was not fetched (git lfs pull)",
    b"%!PS": "PostScript",
    b"%PDF": "a PDF",
    b"\x1f\x8b": "compressed by gzip: unpack it first",
    b"PK\x03\x04": "a zip archive",
    b"\x93NUMPY": "a .npy file, which holds one array",
    b"\x89HDF": "an HDF5 file",
}
PAGES = (b"<!doctype html", b"<html", b"<head")
HEAD = 64  # bytes that are enough to tell


def describe_content(head: bytes) -> str | None:
    """What a file is, in words; None for what is not known.

    Args:
        head: its first `HEAD` bytes, or all of them.
    """
    if not head:
        return "an empty file"
    text = head.lstrip().lower()
    if text.startswith(PAGES):
        return "an HTML page: a download was answered by a web site, not by the file"
    if text.startswith((b"<?xml", b"<svg")):
        return "XML or SVG"
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "a pickle, which is not read: a pickle is a program"
    return next((words for start, words in STARTS.items() if head.startswith(start)), None)
