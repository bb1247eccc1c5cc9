"""Directories, on disk and in buckets, and who holds them."""

import contextlib
import datetime
import errno
import filecmp
import json
import os
import pathlib
import socket

import jax
from absl import logging
from etils import epath

from livo_jax.processes import ending_together

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what the system says of a full disk


def resolve_directory(path: str | os.PathLike) -> epath.Path:
    """An absolute path: on disk, where ~ is a home, or in a bucket.

    Raises:
        ValueError: a bucket that Orbax cannot write to; or a path that would be misread: Orbax collects the parts of a
            checkpoint by a glob in which the whole path stands, and a backslash becomes a separator.
    """
    remote = is_remote(path)
    if remote and not os.fspath(path).startswith("gs://"):
        raise ValueError(f"workdir {path}: checkpoints can be written to a disk or to gs://BUCKET/... alone")
    found = epath.Path(path) if remote else epath.Path(os.path.expanduser(path)).absolute()
    if wrong := [character for character in "[*?\\" if character in os.fspath(found)]:
        raise ValueError(f"{found}: what is saved there could not be read: choose a path without {' '.join(wrong)}")
    return found


def is_remote(path: str | os.PathLike) -> bool:
    return "://" in os.fspath(path)


@contextlib.contextmanager
def replacing(path):
    """Gives a path beside this one to write to; what is written takes the place of `path`, whole or not at all.

    Raises OSError, which names `path`, where the disk is full.
    """
    scratch = path.with_name(f".{path.name}.{os.getpid()}")  # of processes that write the same each has its own
    try:
        yield scratch
        scratch.replace(path)
    except OSError as error:
        if error.errno in FULL and not error.filename:  # of a write, which does not say to what
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
        raise
    finally:
        scratch.unlink(missing_ok=True)


def write_json(file, content):
    """Writes JSON that people read too, indented."""
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def is_hidden(name: str) -> bool:
    """Whether a file or folder is one that a system or an editor keeps for itself, as .ipynb_checkpoints or ._1.png."""
    return name.startswith(".") or name == "__MACOSX"


def is_moved(theirs: str, ours: str) -> bool:
    """Whether two paths are of one file or folder in two places, as of two checkouts.

    They have one name and, where both are here, the same files in them. One that is here no more is told in the log.
    """
    there, here = (pathlib.Path(path).expanduser() for path in (theirs, ours))
    if there.name != here.name or not there.is_absolute() or not here.exists():
        return False
    if not there.exists():
        logging.warning("%s is not here: %s, of the same name, is taken for it", there, here)
        return True
    if there.is_file() or here.is_file():
        return there.is_file() and here.is_file() and filecmp.cmp(there, here, shallow=False)
    names = [{file.relative_to(root) for file in root.rglob("*") if file.is_file()} for root in (there, here)]
    _, other, unread = filecmp.cmpfiles(there, here, names[1], shallow=False)
    return names[0] == names[1] and not other and not unread


@contextlib.contextmanager
def held(directory, does: str = "writes to"):
    """Makes a folder where it is not there, and keeps other commands that hold it out until this one has ended.

    The lock is the operating system's: it ends with the process that has it, even if that is killed. Of several
    processes of a run the first has it for all. A bucket has none: there a file tells of a run that has not ended.

    Args:
        does: what this command does in the folder, as others are told.

    Raises:
        FileExistsError: another process holds it, and which.
        OSError: it cannot be written.
        RuntimeError: in further processes of the run, with the same words.
    """
    file = directory / "lock"
    since = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
    holder = f"{does} {directory}: PID {os.getpid()} on {socket.gethostname()}, since {since}"
    with contextlib.ExitStack() as stack:
        with ending_together():
            if jax.process_index() == 0:
                directory.mkdir(parents=True, exist_ok=True)
                if is_remote(directory):
                    if file.exists():
                        told = "a process that has not ended, or was killed, %s: never run two"
                        logging.warning(told, file.read_text(encoding="utf-8"))
                    file.write_text(holder, encoding="utf-8")
                    stack.callback(file.unlink, missing_ok=True)
                else:
                    lock = stack.enter_context(open(file, "a+", encoding="utf-8"))
                    if not locked(lock):
                        lock.seek(0)
                        other = lock.read() or f"{does} {directory}"
                        raise FileExistsError(f"another process {other}: wait until it has ended")
                    lock.truncate(0)
                    lock.write(holder)
                    lock.flush()
        yield


def locked(file) -> bool:
    """Locks an open file, until it is closed, unless another process has it locked."""
    import fcntl  # Windows has none

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:  # of a file system without locks
        logging.warning("%s cannot be locked (%s): see that no other process writes there", file.name, error.strerror)
    return True
