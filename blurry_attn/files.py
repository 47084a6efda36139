"""Files that are whole or not there, in folders that one process at a time keeps to itself."""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

# A file is tried to be made so often in a folder that other processes remove.
ATTEMPTS = 100


def write_whole(path: Path, write: Callable[[Path], Any]) -> None:
    """Lets ``write`` fill a new file beside ``path``, of a name that nobody else has, and moves it there when whole.

    No link is followed, and the file has the permissions of any new file. After an error the old file is as it was.

    Raises:
        OSError: the file cannot be written; the error names ``path``.
    """
    partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial{path.suffix}")
    with naming(path, instead_of=partial):
        partial.touch(exist_ok=False)
        try:
            write(partial)
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def naming(path: Path, instead_of: Path | None = None) -> Iterator[None]:
    """An OSError from in here that names no file, or the one ``instead_of``, names ``path``."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and (error.filename is None or Path(error.filename) == instead_of):
            error.filename, error.filename2 = str(path), None
        raise


@contextmanager
def claimed(folder: Path, *names: str) -> Iterator[None]:
    """Keeps the files ``names`` of ``folder`` to this process: another one that claims the first of them is refused.

    The folder is made, and what killed writers left of the files goes. A claim ends with its process at the latest.
    Folders that were made here, and are empty at the end, go again.

    Raises:
        BlockingIOError: another process has the claim.
        OSError: the folder cannot be made or written. Either error names ``folder``.
    """
    with naming(folder):
        made = [place for place in (folder, *folder.parents) if not place.exists()]
    lock = folder / f".{names[0]}.lock"
    descriptor = _locked(lock)
    try:
        for name in names:
            for partial in folder.glob(f".{name}.*.partial*"):
                with suppress(OSError):
                    partial.unlink()
        yield
    finally:
        with suppress(OSError):
            lock.unlink()
        os.close(descriptor)
        with suppress(OSError):
            for place in made:
                place.rmdir()


def _locked(lock: Path) -> int:
    """A descriptor that holds the lock: of the file that has this name now, as file and folder go with a claim."""
    folder = lock.parent
    for attempt in count(1):
        with naming(folder, instead_of=lock):
            try:
                folder.mkdir(parents=True, exist_ok=True)
                descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
            except (FileNotFoundError, FileExistsError):
                if attempt == ATTEMPTS:
                    raise
                continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise BlockingIOError(errno.EWOULDBLOCK, "another process is writing there", str(folder)) from error
        # Not every network's file system has locks.
        except OSError as error:
            warnings.warn(
                f"{folder}: cannot be locked ({error.strerror}); let no other process write there", stacklevel=4
            )
            break
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), lock.stat()):
                break
        os.close(descriptor)
    return descriptor
