"""YAML with line numbers: what is wrong in a sweep file is reported as `file:line: sentence`."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

Key = tuple[str | int, ...]


class SweepError(Exception):
    """A sweep file or output folder that cannot be used; the text is what the user reads."""


class SweepStopped(SweepError):
    """A sweep that the world ended early, such as a full disk; the same command continues it."""


_PORT = r"\d{1,5}(?=[/?#])"
_USER = re.compile(
    r"://(?!/)(?:"
    rf"[^\s/:@'\"]*:(?!{_PORT})[^\s'\"]*"  # user:password, which may hold anything that should have been escaped
    r"|[^\s/:@'\"]*:[^\s?#'\"]*"  # host:port/path@, or a password of digits and a slash: better once too often
    r"|[^\s/'\"]*"  # user alone
    r")@"
)
_SECRET = re.compile(r"([?&;][\w.-]*(?:passw(?:or)?d|pwd|token|secret|api_?key)[\w.-]*=)[^&;#\s'\"]+", re.IGNORECASE)


def without_password(text: str) -> str:
    """The text with user and password taken out of every URL in it, and the values of parameters that hold a secret.

    >>> without_password("http://me:secret@host/path")
    'http://host/path'
    >>> without_password("http://me:p@s/s@host")
    'http://host'
    >>> without_password("postgresql://host/db?user=me&password=secret")
    'postgresql://host/db?user=me&password=***'
    """
    return _SECRET.sub(r"\1***", _USER.sub("://", text))


class _Loader(yaml.SafeLoader):
    """YAML's safe subset, with numbers such as 1e-5 read as numbers (YAML 1.1 wants 1.0e-5)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


@dataclass
class Source:
    """A parsed sweep file and where everything in it stands.

    Attributes:
        name: the path as the user wrote it, for messages.
        data: the document as plain dictionaries, lists and scalars.
        lines: the 1-based line of every key and list item, by path.
        problems: what is wrong so far, as (line, sentence).
    """

    name: str
    data: Any
    lines: dict[Key, int]
    problems: list[tuple[int, str]] = field(default_factory=list)

    def problem(self, key: Key, sentence: str) -> None:
        """Note a problem at the line of `key`, or of the nearest enclosing key that is in the file."""
        while key and key not in self.lines:
            key = key[:-1]
        self.problems.append((self.lines.get(key, 1), sentence))

    def check(self) -> None:
        """Raise what was noted so far.

        Raises:
            SweepError: all problems, one per line, in the order of the file.
        """
        if self.problems:
            found = sorted(dict.fromkeys(self.problems))
            raise SweepError("\n".join(f"{self.name}:{line}: {sentence}" for line, sentence in found))


def read_source(path: Path, name: str | None = None) -> Source:
    """Parse a YAML file; nothing in it is executed.

    Raises:
        SweepError: the file is missing, is not YAML, or has a key twice.
    """
    name = name or str(path)
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise SweepError(f"{name}: cannot be read ({error.strerror})") from error
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        source = Source(name, {}, {})
        if node is not None:
            _walk(node, (), source)
            source.check()
            source.data = loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise SweepError(f"{name}:{line}: not YAML: {error.problem or error.context}") from error
    finally:
        loader.dispose()
    return source


def _walk(node: yaml.Node, path: Key, source: Source) -> None:
    source.lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            _walk(item, (*path, index), source)
    elif isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if key.value in seen and key.value != "<<":
                source.problems.append((line, f"key {key.value!r} again; it is already on line {seen[key.value]}"))
            seen[key.value] = line
            source.lines[(*path, key.value)] = line
            _walk(value, (*path, key.value), source)
