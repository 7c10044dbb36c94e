"""The lines that a records file gained since it was last read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from fastbp.record import Record, from_dict

MARK_BYTES = 256  # before the place where reading stopped: they tell whether it is still the same file


class RecordTail:
    """Reads a growing records file once, however often it is asked.

    A last line without its end, as a writer at work or a crash leaves it, waits for the next time. A file that is
    not a continuation of what was read is noticed by `replaced`.

    Attributes:
        bytes_read: bytes parsed so far, over all readings.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self.bytes_read = 0
        self.rewind()

    def rewind(self) -> None:
        """Read from the beginning next time."""
        self._offset, self._number, self._mark = 0, 0, b""

    def replaced(self) -> bool:
        """Whether the file no longer begins with what was read: cut, rewritten, or another file.

        Raises:
            OSError: the file cannot be read.
        """
        with self.path.open("rb") as file:
            file.seek(self._offset - len(self._mark))
            return file.read(len(self._mark)) != self._mark

    def news(self) -> Iterator[Record]:
        """The records that were completed since the last reading, in order.

        Raises:
            ValueError: a line is not a record; the message has file and line number, and the line is read again next
                time.
            OSError: the file cannot be read.
        """
        with self.path.open("rb") as file:
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                record = self._parsed(line)
                self.bytes_read += len(line)
                self._offset += len(line)
                self._number += 1
                self._mark = (self._mark + line)[-MARK_BYTES:]
                if record is not None:
                    yield record

    def _parsed(self, line: bytes) -> Record | None:
        text = line.decode("utf-8", errors="replace")
        try:
            return from_dict(json.loads(text)) if text.strip() else None
        except json.JSONDecodeError as error:
            raise ValueError(f"{self.path}:{self._number + 1}: not JSON ({error.msg})") from error
        except (ValueError, TypeError) as error:
            raise ValueError(f"{self.path}:{self._number + 1}: {error}") from error
