"""Files that are whole or absent: nothing is half-written when a process dies, and nothing that it finished is lost."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

ASIDE = ".kvenv-partial"
"""What ends the name of a file that is not yet whole: nobody else's, for what is left of such is removed."""

DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)
"""What a write meets on a disk that is full, broken or read-only."""


def write_atomic(path: str | os.PathLike[str], data: bytes | str) -> None:
    """Write ``data`` to ``path`` so that readers see the old file or the new one, never a part.

    Written aside in the same directory, fsynced, renamed, and the directory is fsynced. Missing parent directories are
    made. What a killed process leaves aside has a name that nothing reads, see :func:`remove_leftovers`.

    Parameters
    ----------
    path : path-like
        The file to write.
    data : bytes or str
        Its whole content; str is encoded as UTF-8.

    Raises
    ------
    OSError
        If it can't be written (a full disk, a read-only directory), with the file's name; the old file is there still.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    payload = data.encode() if isinstance(data, str) else data
    descriptor, aside = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=ASIDE)
    try:
        with naming(target):
            with os.fdopen(descriptor, "wb") as file:
                file.write(payload)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(aside, 0o644)
            os.replace(aside, target)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise
    _sync_directory(target.parent)


def remove_leftovers(directory: Path) -> None:
    """Remove what killed calls of :func:`write_atomic` left aside; for who knows that nobody else writes there."""
    for left in directory.glob(f".*{ASIDE}"):
        left.unlink(missing_ok=True)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Say which file a disk had no room for: a failed write knows a descriptor only."""
    try:
        yield
    except OSError as error:
        if error.errno in DISK_ERRORS and error.filename is None:
            error.filename = os.fspath(path)
        raise


def check_writable(directory: Path) -> None:
    """Make a directory, and find out now whether files can be written there.

    Raises
    ------
    OSError
        If not.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with naming(directory), tempfile.TemporaryFile(dir=directory):
        pass


def append_line(path: Path, record: Any) -> None:
    """Add a JSON line to a file; when this returns it is on disk, whatever happens to the process then.

    A torn line that a killed process or a full disk left at the end is cut off first. Missing parent directories are
    made.

    Raises
    ------
    OSError
        If it can't be written, or is a link to somewhere else, with the file's name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with naming(path), open(path, "a+b", buffering=0, opener=_open_no_link) as file:
        if _is_torn(file):
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
        line = json.dumps(record).encode() + b"\n"
        # A raw file may take less than all of it, on a disk that is nearly full.
        while line:
            line = line[file.write(line) :]
        os.fsync(file.fileno())
    if new:
        _sync_directory(path.parent)


def read_lines(path: Path) -> list[Any]:
    """Return the records of a file of JSON lines, none where there is no file; a torn last line is none.

    Raises
    ------
    ValueError
        If another line is damaged, with its number.
    """
    whole = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [_parse(line, f"{path}:{number}", "a JSON line") for number, line in enumerate(whole, start=1)]


def read_json(path: Path, what: str) -> Any:
    """Return what a JSON file holds that should be ``what``.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it isn't JSON.
    """
    return _parse(path.read_bytes(), str(path), what)


def parse_line(line: str, place: str) -> Any:
    """Return what a line of somebody's JSON lines says.

    Raises
    ------
    ValueError
        If it isn't JSON, with the place and, where there is one, the column.
    """
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: not JSON ({error.msg} at column {error.colno})") from error
    except (ValueError, RecursionError) as error:  # a number of too many digits, too deep
        raise ValueError(f"{place}: not JSON ({error})") from error


def sealed(content: dict[str, Any]) -> dict[str, Any]:
    """Return a JSON object with the SHA-256 of what it says, for files that nobody edits by hand."""
    return content | {"seal": _seal(content)}


def unsealed(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return what :func:`sealed` was given, read from a file; what has no seal, being older than seals, is let pass.

    Raises
    ------
    ValueError
        If it was changed since.
    """
    bare = {name: value for name, value in content.items() if name != "seal"}
    if "seal" in content and content["seal"] != _seal(bare):
        raise ValueError(f"{path} is damaged, or was changed by hand: its digest differs")
    return bare


def digest(path: Path) -> str:
    """Return the SHA-256 of a file, or of the files in a directory, by name."""
    digested = hashlib.sha256()
    if path.is_dir():
        for file in sorted(file for file in path.iterdir() if file.is_file()):
            digested.update(os.fsencode(file.name) + b"\0" + bytes.fromhex(digest(file)))
        return digested.hexdigest()
    with path.open("rb") as opened:
        while part := opened.read(1 << 20):  # data of gigabytes are never held whole
            digested.update(part)
    return digested.hexdigest()


def _seal(content: dict[str, Any]) -> str:
    """Return the SHA-256 of a JSON object, which is the same when it was written and read."""
    return hashlib.sha256(json.dumps(json.loads(json.dumps(content)), sort_keys=True).encode()).hexdigest()


def _parse(data: bytes, place: str, what: str) -> Any:
    """Return what JSON says."""
    try:
        return json.loads(data.decode())
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, a number of too many digits, too deep
        raise ValueError(f"{place} is not {what}: {error}") from error


def _open_no_link(path: str, flags: int) -> int:
    """Open a file, but not what a link in its place points to, which is somebody else's."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0), 0o666)  # Windows has no such flag


def _is_torn(file: IO[bytes]) -> bool:
    """Return whether a file's last line has no end."""
    if not file.seek(0, os.SEEK_END):
        return False
    file.seek(-1, os.SEEK_END)
    return file.read() != b"\n"


def _sync_directory(directory: Path) -> None:
    """Make a rename, or a new file, outlive a power cut."""
    if os.name != "posix":  # elsewhere a directory can't be opened
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
