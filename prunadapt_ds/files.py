"""Files and folders that appear complete or not at all, even if the process or the machine dies; and folders with one owner."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from prunadapt_ds.errors import Problem, UserError

LOCK_NAME = ".lock"
NOT_THERE = (FileNotFoundError, NotADirectoryError, IsADirectoryError)  # a failure to read for want of the file
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)  # from Lustre or NFS mounted without locking


@contextlib.contextmanager
def owner_writes_alone() -> Iterator[None]:
    """Within the block, create files with mode 0644 or tighter and folders with 0755 or tighter, whatever the umask.

    This includes those of child processes started in the block.
    """
    before = os.umask(0o022)
    os.umask(before | 0o022)
    try:
        yield
    finally:
        os.umask(before)


def usual_mode() -> int:
    """The mode that the umask gives a new file, at most 0644: for files that libraries create as 0600."""
    mask = os.umask(0o077)
    os.umask(mask)
    return 0o644 & ~mask


def read_object(file: Path, refuse: Callable[[str], UserError]) -> dict[str, Any]:
    """The object in a JSON file. Raises `refuse(reason)` if it cannot be read or is not an object."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise refuse(f"{file.name} cannot be read ({error}); fetch it again") from error
    if not isinstance(values, dict):
        raise refuse(f"{file.name} is not a JSON object; fetch it again")
    return values


def unless_damaged(file: Path) -> dict[str, Any]:
    """The object in a JSON file, or an empty one if the file is missing or damaged. Raises OSError if it cannot be read now."""
    with contextlib.suppress(*NOT_THERE, ValueError, RecursionError):
        found = json.loads(file.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    return {}


def sync(path: Path) -> None:
    """Flush a file's content, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def identity(file: Path) -> dict[str, Any]:
    """The file's size in bytes and its sha256, which identify its content."""
    with file.open("rb") as opened:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(opened, "sha256").hexdigest()}


def replace(path: Path, text: str) -> None:
    """Write `text` to `path` atomically. Raises OSError if that fails, and then leaves the old file as it was."""
    with whole_file(path) as file:
        file.write(text)


@contextlib.contextmanager
def whole_file(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a temporary file that replaces `path` when the block ends, or is removed if the block raises.

    mode: "w" for UTF-8 text with line ends as written, "wb" for bytes.
    """
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    with whole_path(path) as unfinished, unfinished.open(mode, **text) as file:  # type: ignore[call-overload]
        yield file


@contextlib.contextmanager
def whole_path(path: Path) -> Iterator[Path]:
    """Like `whole_file`, but yields the temporary file's path, for writers that open files themselves."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.tmp")
    try:
        yield unfinished
        sync(unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    sync(path.parent)


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Create a temporary folder that replaces `folder` when the block ends, or is removed if the block raises.

    Under the name `folder` there is never an incomplete one. Its files get the usual mode, at any depth.
    """
    unfinished = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        yield unfinished
        for path in unfinished.rglob("*"):
            if path.is_file():
                path.chmod(usual_mode())
            sync(path)
        sync(unfinished)
        leaving = _aside(folder)
        try:
            unfinished.rename(folder)
        except OSError:
            with contextlib.suppress(FileNotFoundError):  # there may have been none
                leaving.rename(folder)
            raise
        sync(folder.parent)
        shutil.rmtree(leaving, ignore_errors=True)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def discard(folder: Path) -> None:
    """Remove a folder. It is renamed first, so that it is never found half removed. Raises OSError if it cannot be renamed."""
    shutil.rmtree(_aside(folder), ignore_errors=True)


def _aside(folder: Path) -> Path:
    """Rename `folder`, if it exists, and return its new path, from which the caller removes it."""
    leaving = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(leaving, ignore_errors=True)
    if folder.exists():
        folder.rename(leaving)
    return leaving


class OwnedFolder:
    """A folder that no other live run may write to, from construction to `release`.

    The lock is a kernel lock: it ends with the process, however that ends, so it never goes stale. Folders that had to be
    created and are still empty on release are removed. Raises UserError if the folder cannot be written or another run holds
    it. If the file system has no locks, it prints a warning and goes on without.
    """

    def __init__(self, folder: Path):
        self.made: list[Path] = []
        self.path = folder / LOCK_NAME
        try:
            for missing in reversed([p for p in (folder, *folder.parents) if not p.exists()]):
                missing.mkdir(exist_ok=True)
                self.made.append(missing)
            self._lock()
        except OSError as error:
            self._remove_empty()
            remedy = f"cannot be written ({error.strerror}); name a folder where files can be made"
            raise UserError(Problem("output_dir", str(folder), remedy)) from error

    def __enter__(self) -> OwnedFolder:
        return self

    def __exit__(self, *error: object) -> None:
        self.release()

    def _lock(self) -> None:
        while True:
            self.descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(self.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                os.close(self.descriptor)
                raise UserError(Problem("output_dir", str(self.path.parent), self._taken())) from error
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                print(
                    f"{self.path.parent}: this file system has no locks ({error.strerror}); "
                    "make sure yourself that no other run writes there",
                    file=sys.stderr,
                )
            with contextlib.suppress(OSError):
                if os.path.samestat(os.fstat(self.descriptor), os.stat(self.path)):
                    break
            os.close(self.descriptor)  # the previous owner unlinked the file between our open and flock
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        os.ftruncate(self.descriptor, 0)
        os.write(self.descriptor, json.dumps(owner).encode())

    def _taken(self) -> str:
        try:
            owner = json.loads(self.path.read_text())
            who = f"process {owner['pid']} on {owner['host']}, since {owner['since']}"
        except (OSError, ValueError, KeyError, TypeError):
            who = "another process"
        return f"another run is writing there ({who}); wait for it, stop it, or name another folder"

    def release(self) -> None:
        self.path.unlink(missing_ok=True)
        os.close(self.descriptor)
        self._remove_empty()

    def _remove_empty(self) -> None:
        with contextlib.suppress(OSError):
            for folder in reversed(self.made):
                folder.rmdir()
