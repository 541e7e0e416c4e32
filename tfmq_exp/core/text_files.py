"""Text files of any origin, read line by line."""

import codecs
from pathlib import Path

from tfmq_exp.core.file_kind import HEAD, by_signature, instead_of_lines

# the longer marks first: UTF-32's begins with UTF-16's
MARKS = {
    codecs.BOM_UTF8: "utf-8",
    **{codecs.BOM_UTF32_LE: "utf-32-le", codecs.BOM_UTF32_BE: "utf-32-be"},
    **{codecs.BOM_UTF16_LE: "utf-16-le", codecs.BOM_UTF16_BE: "utf-16-be"},
}


def decode_text(path: Path) -> str:
    """Read a text in UTF-8, or in the encoding that its byte order mark says; the mark is no part of it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no file, a pointer or a web page in its place, another encoding, or NUL characters.
    """
    if not path.exists():
        raise FileNotFoundError(f"no file at {path}")
    if not path.is_file():
        raise ValueError(f"{path} is {'a folder' if path.is_dir() else 'no file'}; expected a text file")
    data = path.read_bytes()
    mark, encoding = next(((mark, name) for mark, name in MARKS.items() if data.startswith(mark)), (b"", "utf-8"))
    if what := instead_of_lines(data[:HEAD]):
        raise ValueError(f"{path} {what}")
    try:
        text = data[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        if what := by_signature(data[:HEAD]):
            raise ValueError(f"{path} {what}; expected a text file") from error
        line = data.count(b"\n", 0, len(mark) + error.start) + 1
        found = f"byte 0x{error.object[error.start]:02x} in line {line}"
        raise ValueError(f"{path} is not {encoding.upper()}: {found}; save it as UTF-8") from error
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        cause = "UTF-16 without a byte order mark, or no text; save it as UTF-8"
        raise ValueError(f"{path} has a NUL character in line {line}: {cause}")
    return text


def read_lines(path: Path) -> list[str]:
    r"""Read the lines of a text file, without their ends and without spaces around them; blank ones are lines, too.

    Lines end with \n or \r\n, or all of them with \r; the last may lack its end. What else Unicode calls separators stays
    inside. Byte order marks before a line, as where files were joined, are no part of it.

    Raises:
        FileNotFoundError: no such file.
        ValueError: as `decode_text`, or a \r inside a line, which may or may not end one.
    """
    text = decode_text(path).replace("\r\n", "\n")
    lines = text.split("\n") if "\n" in text else text.split("\r")
    if inside := [number for number, line in enumerate(lines, 1) if "\r" in line]:
        raise ValueError(f"{path} has a carriage return inside line {inside[0]}: end every line with \\n or \\r\\n")
    return [line.lstrip("\ufeff").strip() for line in (lines if lines[-1] else lines[:-1])]
