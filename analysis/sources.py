"""From a source as the user names it to files, and from files to batches of parsed lines."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from analysis import columns
from analysis.errors import ReportError
from analysis.migrations import migrated

PATTERNS = ("records*.jsonl", "records*.jsonl.gz")
BLOCK_BYTES = 1 << 18  # small: the parsed lines of a block stay in the processor's cache


@dataclass(frozen=True)
class File:
    """A records file.

    Attributes:
        name: short, as it is called in the report.
        tracked: tracking URI and experiment id, where it came from MLflow.
    """

    path: Path
    name: str
    tracked: tuple[str, str] | None = None


@dataclass(frozen=True)
class Batch:
    """Consecutive lines of one file; the lists are parallel.

    Attributes:
        numbers: of the lines, from 1.
        lines: as they stand in the file, without the newline; of an older schema as migrated.
        records: parsed, of a known kind, of this schema.
        kinds: indices of the records by their kind.
    """

    file: File
    numbers: list[int]
    lines: list[bytes]
    records: list[dict[str, Any]]
    kinds: dict[str, list[int]]

    def where(self, index: int) -> str:
        return f"{self.file.path}:{self.numbers[index]}"


@contextmanager
def found_files(sources: Iterable[str | Path], tracking_uri: str | None, problems: list[str]) -> Iterator[list[File]]:
    """The files of all sources, each once, in an order that does not depend on the order of the sources.

    Args:
        sources: folders (recursively, `records*.jsonl` and `records*.jsonl.gz`), files, `mlflow:EXPERIMENT` or
            `mlflow:EXPERIMENT@URI`.
        tracking_uri: of the experiments named without one.
        problems: gets a sentence for what is missing but can be done without.

    Raises:
        ReportError: a source does not exist or has no records.
    """
    sources = list(sources)
    files: dict[Path, File] = {}
    with ExitStack() as stack:
        for source in sources:
            if str(source).startswith("mlflow:"):
                from analysis.mlflow_source import downloaded_records

                experiment = str(source).removeprefix("mlflow:")
                found = stack.enter_context(downloaded_records(experiment, tracking_uri, problems))
            else:
                found = _local_files(Path(source), several=len(sources) > 1)
            for found_file in found:
                files.setdefault(found_file.path.resolve(), found_file)
        yield [file for _, file in sorted(files.items(), key=lambda item: (item[1].name, item[0]))]


def _local_files(source: Path, *, several: bool) -> Iterator[File]:
    """The files of a path; with several sources their folders tell equal names apart."""
    try:
        if source.is_file():
            prefix = f"{source.parent.name}/" if several and source.parent.name else ""
            yield File(source, prefix + source.name)
            return
        if not source.is_dir():
            raise ReportError(f"{source}: no such file or folder (a tracked experiment is given as mlflow:NAME)")
        found = sorted({file for pattern in PATTERNS for file in source.rglob(pattern) if file.is_file()})
    except (OSError, ValueError) as error:
        raise ReportError(f"{str(source)!r}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    if not found:
        hint = "give the records that the report was made from" if (source / "report.html").exists() else ""
        raise ReportError(
            f"{source}: the folder has no file records*.jsonl; {hint or 'give the folder that a sweep wrote'}"
        )
    prefix = f"{source.resolve().name}/" if several else ""
    for file in found:
        yield File(file, prefix + file.relative_to(source).as_posix())


def batches(file: File, problems: list[str]) -> Iterator[Batch]:
    """The lines of a file, batch by batch.

    A last line without newline that is not JSON was cut short by a crash: it is left out and reported.

    Raises:
        ReportError: the file cannot be read, or a line is not a record; the message has file and line.
    """
    number = 1
    for lines, is_last in _blocks(file, problems):
        numbers = list(range(number, number + len(lines)))
        number += len(lines)
        kept = [i for i, line in enumerate(lines) if line.strip()]
        if len(kept) < len(lines):
            numbers, lines = [numbers[i] for i in kept], [lines[i] for i in kept]
        records = _parsed(lines)
        if records is None:
            records = _parsed_one_by_one(file, lines, numbers, problems, number - 1 if is_last else 0)
            lines, numbers = lines[: len(records)], numbers[: len(records)]
        kinds = _check(file, numbers, lines, records)
        if records:
            yield Batch(file, numbers, lines, records, kinds)


def _blocks(file: File, problems: list[str]) -> Iterator[tuple[list[bytes], bool]]:
    """Whole lines, and whether they end the file."""
    tail: list[bytes] = []  # of a line that goes on in the next block
    try:
        with file.path.open("rb") as stream:
            packed = stream.read(2) == b"\x1f\x8b"
            stream.seek(0)
            plain = iter(lambda: stream.read(BLOCK_BYTES), b"")
            for block in _unpacked(plain, file, problems) if packed else plain:
                first, *lines = block.split(b"\n")
                tail.append(first)
                if lines:
                    lines.insert(0, b"".join(tail))
                    tail = [lines.pop()]
                    yield lines, False
    except zlib.error as error:
        raise ReportError(f"{file.path}: the compressed file is damaged ({error}); copy it again") from error
    except OSError as error:
        raise ReportError(f"{file.path}: cannot be read ({error.strerror})") from error
    yield [b"".join(tail)], True


def _unpacked(blocks: Iterable[bytes], file: File, problems: list[str]) -> Iterator[bytes]:
    """What gzip packed, in as many members as there are; of one that was cut short all there is.

    `gzip` itself gives nothing of a block in which the file ends too early.
    """
    member, is_open = zlib.decompressobj(31), False
    for packed in blocks:
        while packed:
            yield member.decompress(packed)
            packed, is_open = member.unused_data, not member.eof
            if member.eof:
                member = zlib.decompressobj(31)
    if is_open:
        problems.append(f"{file.name}: the compressed file was cut short; what can be unpacked is used")


def _parsed(lines: list[bytes]) -> list[Any] | None:
    """All lines in one call of the parser; None where they are not one value each."""
    together = b"[" + b",".join(lines) + b"]"
    try:
        records = orjson.loads(together)
    except ValueError:  # also what it does not take and json does: NaN, infinity, half a surrogate pair
        try:
            records = json.loads(together.decode())
        except (ValueError, RecursionError):
            return None
    return records if len(records) == len(lines) else None


def _parsed_one_by_one(
    file: File, lines: list[bytes], numbers: list[int], problems: list[str], last: int
) -> list[dict[str, Any]]:
    """Line by line, to name the one that is wrong; the number `last` may be cut short."""
    records = []
    for line, number in zip(lines, numbers, strict=True):
        try:
            records.append(json.loads(line.decode()))
        except (ValueError, RecursionError) as error:
            if number == last:
                problems.append(f"{file.name}:{number}: the last line was cut short and is left out")
                break
            raise ReportError(f"{file.path}:{number}: not a line of JSON; repair or remove the line") from error
    return records


def _check(file: File, numbers: list[int], lines: list[bytes], records: list[dict[str, Any]]) -> dict[str, list[int]]:
    """Every record is of a known kind, and is brought to this schema in place; returns the indices by kind."""
    kinds: dict[str, list[int]] = {kind: [] for kind in columns.READ}
    for i, data in enumerate(records):
        kind = data.get("kind") if isinstance(data, dict) else None
        if not isinstance(kind, str) or kind not in kinds:
            raise ReportError(f"{file.path}:{numbers[i]}: record of kind {kind!r:.80}; expected run, epoch or sweep")
        kinds[kind].append(i)
        if data.get("schema_version") != columns.SCHEMA_VERSION or data["schema_version"] is True:
            records[i] = migrated(data, f"{file.path}:{numbers[i]}")
            lines[i] = json.dumps(records[i], sort_keys=True).encode()
    return kinds


_ODD_ESCAPE = re.compile(rb"\\u(?:[dD][89a-fA-F]|00[01])")


def has_odd_characters(line: bytes) -> bool:
    """Whether strings of the line may hold halves of characters or control characters."""
    return _ODD_ESCAPE.search(line) is not None


_CONTROL = re.compile("[\x00-\x08\x0b-\x1f]")


def printable(value: Any) -> Any:
    """The value with what no file format can hold, in any string, replaced by the replacement character."""
    if isinstance(value, str):
        return _CONTROL.sub("\ufffd", value.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace"))
    if isinstance(value, dict):
        return {printable(key): printable(item) for key, item in value.items()}
    return [printable(item) for item in value] if isinstance(value, list) else value
