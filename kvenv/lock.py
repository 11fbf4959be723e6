"""One writer per directory: whoever comes second is told who came first."""

from __future__ import annotations

import os
import platform
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kvenv.files import naming, remove_leftovers

try:
    import fcntl
except ImportError:  # Windows: there nobody is kept out
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"
"""The file that is locked, and says by whom."""


@contextmanager
def hold(directory: Path) -> Iterator[None]:
    """Be the only one who writes in a directory; readers ask nobody.

    The directory is made if it isn't there, and removed again if nothing was put into it. What killed writers left
    half-written is removed. A link in the place of the lock is refused: what it points to is somebody else's.

    The lock is the kernel's (flock on ``.lock``): it ends with the process, however that ends, so that none is ever
    stale. On NFS Linux turns it into a byte-range lock, which holds between machines where the server has a lock
    service; on a file system without locks (Lustre by default) a warning says that nobody is kept out.

    Parameters
    ----------
    directory : Path
        Where is written.

    Raises
    ------
    ValueError
        If another process holds it, with its id and its machine.
    OSError
        If nothing can be written there.
    """
    made = not directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    path = directory / LOCK
    descriptor = _open_and_lock(directory)
    try:
        with naming(path):
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {platform.node()}".encode())
        remove_leftovers(directory)
        yield
    finally:
        # Removed while it is held: who opened it meanwhile sees that it is gone, and makes another. If the directory
        # was deleted and made anew meanwhile, the lock there is another one's.
        if _is_open(descriptor, path):
            path.unlink()
        os.close(descriptor)
        if made and directory.exists() and not any(directory.iterdir()):
            directory.rmdir()


def _open_and_lock(directory: Path) -> int:
    """Return a descriptor of the locked file."""
    path = directory / LOCK
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        try:
            _lock(descriptor, directory)
            if _is_open(descriptor, path):
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _is_open(descriptor: int, path: Path) -> bool:
    """Return whether a path is that of an open file, which may have been removed or replaced."""
    return path.exists() and os.path.samestat(os.fstat(descriptor), path.stat())


def _lock(descriptor: int, directory: Path) -> None:
    """Lock an open file, or say who has."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(descriptor, 1000).decode(errors="replace") or "another process"
        raise ValueError(
            f"{directory} is being written by {holder}: wait until it ends, or choose another directory"
        ) from None
    except OSError as error:
        warnings.warn(
            f"{directory} can't be locked ({error.strerror}): see that nobody else writes there", stacklevel=4
        )
