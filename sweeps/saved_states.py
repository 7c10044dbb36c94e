"""The saved states of a run in Tune's storage, whether that is a folder or a URI such as s3://bucket/folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

STATE_FILE = "run.pt"  # as MethodTrainable names it, whose module imports Ray


def saved_states(storage: str, key: str) -> list[str]:
    """The saved states of a run, the newest first: by attempt and number, as clocks of several machines, or one that
    was set back, put files in another order.

    Args:
        storage: Tune's `storage_path`.
        key: of the run.

    Returns:
        Paths, or URIs where the storage is one.

    Raises:
        OSError, ValueError, NotImplementedError: the storage cannot be read, or pyarrow knows no such URI.
    """

    def age(path: str) -> tuple[int, int]:
        trial, number = path.split("/")[-3:-1]
        return int(trial.rpartition("-")[2]), int(number.rpartition("_")[2])

    if "://" in storage:
        return sorted(_in_uri(storage, key), key=lambda uri: age(uri.partition("?")[0]), reverse=True)
    found = Path(storage).glob(f"*/{key}-*/checkpoint_*/{STATE_FILE}")
    return sorted((path.as_posix() for path in found), key=age, reverse=True)


def _in_uri(storage: str, key: str) -> Iterator[str]:
    """URIs of the same files, by the file system with which Tune writes there; each listing is one request or two."""
    from pyarrow.fs import FileSelector, FileSystem, FileType

    system, root = FileSystem.from_uri(storage)
    root = root.rstrip("/")
    before, question, options = storage.partition("?")

    def below(folder: str) -> Iterator[str]:
        for info in system.get_file_info(FileSelector(folder, allow_not_found=True)):
            if info.type == FileType.Directory:
                yield info.base_name

    for experiment in below(root):
        for trial in (name for name in below(f"{root}/{experiment}") if name.startswith(f"{key}-")):
            for saved in (name for name in below(f"{root}/{experiment}/{trial}") if name.startswith("checkpoint_")):
                inside = f"{experiment}/{trial}/{saved}/{STATE_FILE}"
                if system.get_file_info(f"{root}/{inside}").type == FileType.File:
                    yield f"{before.rstrip('/')}/{inside}{question}{options}"
