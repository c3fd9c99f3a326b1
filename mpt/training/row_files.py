"""Read the rows of one file, one at a time and in little memory: JSON lines, JSON, CSV, Parquet, and plain text, whose
rows are documents; from gzip and zstd too.

A row that can't be read comes out as a `BadRow` with its place and what to do, and reading goes on after it; who calls
(`mpt.training.row_tables`, `mpt.training.corpus`) decides how many are too many. A file that can't be read at all is an
MptError.
"""

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from mpt.errors import MptError
from mpt.recipe.sources import kind_of

TEXT = "text"
# A plain text file longer than this becomes several documents, cut at the ends of lines: nobody holds a gigabyte.
DOCUMENT_BYTES = 1 << 20
PARQUET_ROWS = 1000
HALF_A_PAIR = re.compile(rb"\\u[dD][89a-fA-F]")  # an escape that is half of a UTF-16 surrogate pair


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that can't be used: why, and what mends it."""

    problem: str
    remedy: str


# (file:line or file: row N, what stands there)
Rows = Iterator[tuple[str, dict[str, Any] | BadRow]]


def read_file(path: Path, *, max_row_bytes: int) -> Rows:
    """Yield the place and the content of each row of a file, by the suffix of its name.

    Raises MptError for a file that can't be opened or is broken as a whole.
    """
    read: dict[str, Callable[[Path, int], Rows]] = {
        ".txt": _text,
        ".md": _text,
        ".jsonl": _json_lines,
        ".json": _json,
        ".csv": _csv,
        ".parquet": _parquet,
    }
    try:
        yield from read[kind_of(path)](path, max_row_bytes)
    except (gzip.BadGzipFile, zlib.error, EOFError, pa.ArrowInvalid) as error:
        raise _broken(path, error) from error
    except OSError as error:
        if error.errno is None:  # pyarrow's word for what it can't unpack
            raise _broken(path, error) from error
        raise MptError(
            f"{path} can't be read: {error.strerror}", remedy="Check the path, its permissions and disk."
        ) from error


def _broken(path: Path, error: BaseException) -> MptError:
    return MptError(
        f"{path} can't be read: {' '.join(str(error).split())[:300]}",
        remedy="The file is torn or of another kind than its name says: write or download it anew.",
    )


def open_file(path: Path) -> Any:
    """Open a file for its bytes, buffered, unpacked where its name ends in .gz or .zst."""
    if path.suffix.lower() == ".gz":
        return gzip.open(path)
    if path.suffix.lower() == ".zst":
        return io.BufferedReader(pa.input_stream(str(path), compression="zstd"))
    return path.open("rb")


@dataclass(frozen=True, slots=True)
class _Line:
    number: int
    offset: int
    """Where it begins, in bytes."""
    content: bytes | None
    """With its end; None where it is longer than allowed."""


def _lines(file: BinaryIO, longest: int) -> Iterator[_Line]:
    """Split into lines at b"\\n"; of one that is too long no more than `longest` bytes are ever held."""
    number = offset = 0
    while content := file.readline(longest + 1):
        number += 1
        start, offset = offset, offset + len(content)
        is_long = len(content) > longest and not content.endswith(b"\n")
        while is_long and not content.endswith(b"\n") and (content := file.readline(longest)):
            offset += len(content)
        yield _Line(number, start, None if is_long else content)


def _too_long(longest: int) -> BadRow:
    return BadRow(f"longer than {size(longest)}", "Divide it, or set data.max_row_bytes higher.")


def size(count: int) -> str:
    """Write bytes for people.

    >>> size(1 << 24), size(1000)
    ('16 MiB', '1000 bytes')
    """
    return f"{count >> 20} MiB" if count % (1 << 20) == 0 and count else f"{count} bytes"


class _NotUtf8Error(Exception):
    """A byte that is no UTF-8, with its offset in the file."""

    def __init__(self, byte: int, offset: int) -> None:
        super().__init__(f"not UTF-8 (byte 0x{byte:02x} at offset {offset})")
        self.offset = offset
        # UTF-16 begins with a mark of these two bytes.
        self.likely = "utf-16" if offset == 0 and byte in (0xFE, 0xFF) else "latin1"

    def row(self, path: Path) -> BadRow:
        kind = kind_of(path)
        return BadRow(str(self), f"Convert it, for example: iconv -f {self.likely} -t utf-8 old{kind} > new{kind}")


def _decode(content: bytes, offset: int) -> str:
    """Decode a part of a file that begins at `offset`; a byte order mark at the very beginning is left out."""
    skipped = 3 if offset == 0 and content.startswith(b"\xef\xbb\xbf") else 0
    try:
        return content[skipped:].decode("utf-8")
    except UnicodeDecodeError as error:
        at = skipped + error.start
        raise _NotUtf8Error(content[at], offset + at) from None


def _text(path: Path, longest: int) -> Rows:
    """Give the file as a document, or several where it is long. What is no UTF-8 costs the document that it is in."""
    line, offset = 1, 0
    with open_file(path) as file:
        while piece := file.read(DOCUMENT_BYTES):
            if len(piece) == DOCUMENT_BYTES:
                piece += file.readline(DOCUMENT_BYTES)
                while (ahead := file.peek(1)[:1]) and ahead[0] & 0xC0 == 0x80:  # amid a character: no end of a line
                    piece += file.read(1)
            try:
                yield f"{path}:{line}", {TEXT: _decode(piece, offset)}
            except _NotUtf8Error as error:
                above = piece.count(b"\n", 0, error.offset - offset)
                yield f"{path}:{line + above}", error.row(path)
            line += piece.count(b"\n")
            offset += len(piece)


def _json_lines(path: Path, longest: int) -> Rows:
    with open_file(path) as file:
        for line in _lines(file, longest):
            row = _too_long(longest) if line.content is None else _json_line(path, line)
            if row is not None:
                yield f"{path}:{line.number}", row


def _json_line(path: Path, line: _Line) -> dict[str, Any] | BadRow | None:
    assert line.content is not None
    try:
        text = _decode(line.content, line.offset).rstrip()
        if not text:
            return None
        row = json.loads(text, parse_constant=_refuse_constant)
    except _NotUtf8Error as error:
        return error.row(path)
    except json.JSONDecodeError as error:
        return BadRow(
            f"not JSON: {error.msg} (column {error.colno})",
            "Mend or remove that line: JSON lines hold one object a line.",
        )
    except (RecursionError, ValueError) as error:  # nested a thousand deep; NaN; an integer of thousands of digits
        return BadRow(f"not JSON that can be read: {error}", "Mend or remove that line.")
    return _checked(row, may_hold_halves=HALF_A_PAIR.search(line.content) is not None)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _checked(row: Any, *, may_hold_halves: bool) -> dict[str, Any] | BadRow:
    if not isinstance(row, dict):
        return BadRow(f"not a JSON object but {json_kind(row)}", 'Each row is an object: {"text": "..."}.')
    if may_hold_halves:
        try:
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(error.object[error.start]):04x}"
            return BadRow(f"{half} is half of a surrogate pair, which is no text", "Write the character whole.")
    return row


def json_kind(value: Any) -> str:
    """Name what a JSON value is.

    >>> [json_kind(value) for value in (None, True, 7, 0.5, "a", [], {})]
    ['null', 'true or false', 'a number', 'a number', 'text', 'a list', 'an object']
    """
    if value is None:
        return "null"
    names = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def _json(path: Path, longest: int) -> Rows:
    """Read an array of objects, which stands in memory whole; JSON lines under this name are read as such."""
    with open_file(path) as file:
        first = next((line for line in _lines(file, longest) if line.content is None or line.content.strip()), None)
    head = b"" if first is None or first.content is None else first.content.removeprefix(b"\xef\xbb\xbf").strip()
    if head.startswith(b"{") and _is_json(head):
        yield from _json_lines(path, longest)
        return
    with open_file(path) as file:
        content = file.read()
    if not content.strip():
        return
    try:
        whole = json.loads(_decode(content, 0), parse_constant=_refuse_constant)
    except _NotUtf8Error as error:
        line = content.count(b"\n", 0, error.offset) + 1
        raise MptError(f"{path}:{line}: {error}", remedy=error.row(path).remedy) from error
    except json.JSONDecodeError as error:
        raise MptError(f"{path}:{error.lineno}: not JSON: {error.msg}", remedy="Mend that line.") from error
    except (RecursionError, ValueError) as error:
        raise MptError(f"{path}: not JSON that can be read: {error}", remedy="Mend the file.") from error
    may_hold_halves = HALF_A_PAIR.search(content) is not None
    for number, row in enumerate(whole if isinstance(whole, list) else [whole], 1):
        yield f"{path}: row {number}", _checked(row, may_hold_halves=may_hold_halves)


def _is_json(content: bytes) -> bool:
    try:
        json.loads(content)
    except ValueError:
        return False
    return True


class _CsvLines:
    """The lines of a CSV file, as `csv` wants them. `refused` says what is wrong with a line of the row that is read;
    such a line is handed on all the same, so that a quoted cell goes on behind it.
    """

    def __init__(self, path: Path, file: BinaryIO, longest: int) -> None:
        self.path, self.longest = path, longest
        self.lines = _lines(file, longest)
        self.number = 0
        self.refused: BadRow | None = None

    def __iter__(self) -> "_CsvLines":
        return self

    def __next__(self) -> str:
        line = next(self.lines)
        self.number = line.number
        if line.content is None:
            self.refused = _too_long(self.longest)
            return "\n"
        try:
            return _decode(line.content, line.offset)
        except _NotUtf8Error as error:
            self.refused = error.row(self.path)
            return line.content.decode("utf-8", errors="replace")


def _csv(path: Path, longest: int) -> Rows:
    """Every cell is text, as it stands: no "NA" is taken for missing, no "7" for a number. A row's place is the line
    that it begins with."""
    csv.field_size_limit(max(longest, 1 << 17))
    with open_file(path) as file:
        lines = _CsvLines(path, file, longest)
        # Else a quote that is never closed would make the rest of the file one cell, without a word.
        reader = csv.reader(lines, strict=True)
        header: list[str] | None = None
        while True:
            place = f"{path}:{lines.number + 1}"
            bad: BadRow | None = None
            cells: list[str] = []
            lines.refused = None
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                bad = lines.refused or BadRow(
                    f"not CSV: {error}", "Look for a quote that is never closed, or stands alone in a quoted cell."
                )
            else:
                bad = lines.refused or _csv_fault(cells, header)
            if bad is not None:
                if header is None:
                    raise MptError(f"{place}: {bad.problem}", remedy=bad.remedy)
                yield place, bad
            elif cells and header is None:
                header = cells
            elif cells and header is not None:
                yield place, dict(zip(header, cells + [""] * len(header), strict=False))


def _csv_fault(cells: list[str], header: list[str] | None) -> BadRow | None:
    """Say what is wrong with the cells of a row, or with those of the header where there was none yet."""
    if header is None:
        twice = next((name for name in cells if name and cells.count(name) > 1), None)
        return None if twice is None else BadRow(f"two columns are named {twice}", "Give each a name of its own.")
    if len(cells) <= len(header):
        return None
    return BadRow(
        f"{len(cells)} cells, more cells than the header has ({len(header)})", "Quote cells that hold a comma."
    )


def _parquet(path: Path, longest: int) -> Rows:
    number = 0
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches(PARQUET_ROWS):
            try:
                rows = batch.to_pylist()
            except UnicodeDecodeError:
                rows = [_parquet_row(batch, index) for index in range(len(batch))]
            for row in rows:
                number += 1
                is_long = isinstance(row, dict) and any(
                    isinstance(cell, str) and len(cell) > longest for cell in row.values()
                )
                yield f"{path}: row {number}", _too_long(longest) if is_long else row


def _parquet_row(batch: pa.RecordBatch, index: int) -> dict[str, Any] | BadRow:
    row = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            row[name] = column[index].as_py()
        except UnicodeDecodeError:
            return BadRow(f"column {name} is not UTF-8", "Write the file anew with its text in UTF-8.")
    return row
