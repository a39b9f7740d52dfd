"""Files that appear complete or not at all, also when the process or the machine dies; and folders with one owner."""

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
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)  # of Lustre and NFS as they may be mounted


@contextlib.contextmanager
def owner_writes_alone() -> Iterator[None]:
    """Whatever the umask: files that are made meanwhile are 0644 or tighter, folders 0755 or tighter, of child processes too."""
    before = os.umask(0o022)
    os.umask(before | 0o022)
    try:
        yield
    finally:
        os.umask(before)


def usual_mode() -> int:
    """The mode of a new file by the umask, never more than 0644: for files of libraries that make them 0600."""
    mask = os.umask(0o077)
    os.umask(mask)
    return 0o644 & ~mask


def read_object(file: Path, refuse: Callable[[str], UserError]) -> dict[str, Any]:
    """The object in a JSON file of a folder that a user named. Raises what `refuse` makes of why it cannot be had."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise refuse(f"{file.name} cannot be read ({error}); fetch it again") from error
    if not isinstance(values, dict):
        raise refuse(f"{file.name} is not a JSON object; fetch it again")
    return values


def sync(path: Path) -> None:
    """Have the disk hold this file's content, or this folder's entries."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def identity(file: Path) -> dict[str, Any]:
    """By which its content is known again: bytes and sha256."""
    with file.open("rb") as opened:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(opened, "sha256").hexdigest()}


def replace(path: Path, text: str) -> None:
    """Write `path` under another name and give it its own at once. Raises OSError and leaves what was there before."""
    with whole_file(path) as file:
        file.write(text)


@contextlib.contextmanager
def whole_file(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """A file to fill, of another name ("w": UTF-8 text with line ends as written, "wb": bytes); once the block is done it takes
    the place of `path`. On an error it goes again."""
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    with whole_path(path) as unfinished, unfinished.open(mode, **text) as file:  # type: ignore[call-overload]
        yield file


@contextlib.contextmanager
def whole_path(path: Path) -> Iterator[Path]:
    """The same for what writes files by their names."""
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
    """A folder to fill, of another name; once the block is done it takes the place of `folder`. On an error it goes again.

    At no time is anything but a whole folder under that name. Its files have the usual mode, at any depth.
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
    """Remove a folder: gone at once by name, so that none is ever found half removed. Raises OSError."""
    shutil.rmtree(_aside(folder), ignore_errors=True)


def _aside(folder: Path) -> Path:
    """Where a folder, if there is one, has gone to be removed."""
    leaving = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(leaving, ignore_errors=True)
    if folder.exists():
        folder.rename(leaving)
    return leaving


class OwnedFolder:
    """A folder that no other live run may write to, from construction to `release`.

    The lock is the kernel's: it ends with the process however that ends, so that nothing is ever stale. A folder that had
    to be made and is still empty at the end goes again. Raises UserError where it cannot be written or is taken; a file system
    without locks is told of, and nothing more can be done.
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
                    "see to it yourself that no other run writes there",
                    file=sys.stderr,
                )
            with contextlib.suppress(OSError):
                if os.path.samestat(os.fstat(self.descriptor), os.stat(self.path)):
                    break
            os.close(self.descriptor)  # its last owner took the file away between our two calls
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        os.ftruncate(self.descriptor, 0)
        os.write(self.descriptor, json.dumps(owner).encode())

    def _taken(self) -> str:
        try:
            owner = json.loads(self.path.read_text())
            who = f"process {owner['pid']} on {owner['host']}, since {owner['since']}"
        except (OSError, ValueError, KeyError, TypeError):
            who = "another process"
        return f"another run is writing there ({who}); wait for it, end it, or name another folder"

    def release(self) -> None:
        self.path.unlink(missing_ok=True)
        os.close(self.descriptor)
        self._remove_empty()

    def _remove_empty(self) -> None:
        with contextlib.suppress(OSError):
            for folder in reversed(self.made):
                folder.rmdir()
