"""Folders that are there when they are finished, and not before."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from errno import ENOTEMPTY
from glob import escape
from pathlib import Path

import psutil

from chatglm_ov.errors import ChatGLMError
from chatglm_ov.system.sizes import size


def check_disk(target: Path, nbytes: int, what: str) -> None:
    """Raises ChatGLMError where `target` will be on a disk with fewer free bytes."""
    parent = target.resolve().parent
    while not parent.exists():
        parent = parent.parent
    free = psutil.disk_usage(str(parent)).free
    if free < nbytes:
        raise ChatGLMError(target, "free disk space", size(free), f"{size(nbytes)} for {what}")


@contextmanager
def finished_or_nothing(target: Path, overwrite: bool, replace: bool = True) -> Iterator[Path]:
    """A folder beside `target` that takes its name on success and vanishes on any error. overwrite: `target` may be
    there and not empty; replace: it is removed then, with all that is in it, else it stays, with what is not written
    anew. Raises ChatGLMError for what the file system refuses."""
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with folder_beside(target) as partial:
            yield partial
            _put_in_place(partial, target, overwrite, replace)
    except OSError as error:
        said = error.strerror or error
        # Of a copy that fails the first name is what was read, whatever failed.
        places = [Path(os.fsdecode(name)) for name in (error.filename, error.filename2) if name is not None]
        if places and not any(_is_part(place, target) for place in places):
            raise ChatGLMError(error.filename, "file", f"not readable ({said})", "one that can be read") from error
        raise ChatGLMError(target, "output", f"not writable ({said})", "a folder on a disk with room") from error


def _is_part(path: Path, target: Path) -> bool:
    """Whether this is `target`, a folder that it is in, something in it, or in a folder that will take its name."""
    if path == target or path in target.parents or target in path.parents:
        return True
    return target.parent in path.parents and path.relative_to(target.parent).parts[0].startswith(
        f".{target.name}.partial-"
    )


@contextmanager
def folder_beside(target: Path, mode: int = 0o777) -> Iterator[Path]:
    """A new folder that is removed at the end, or, where this process is killed before, with the next one that is made
    for `target`. mode: who may look into it, as far as the umask lets them."""
    remove_leftovers(target)
    folder = target.with_name(f".{target.name}.partial-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        folder.mkdir(mode)
        yield folder
    finally:
        _remove(folder)


def _put_in_place(partial: Path, target: Path, overwrite: bool, replace: bool) -> None:
    """The old folder is removed when the new one stands in its place."""
    if overwrite and replace and target.exists():
        replaced = partial.with_name(f"{partial.name}-replaced")
        try:
            _swap(partial, target, replaced)
        finally:
            if target.exists():
                _remove(replaced)
    elif target.exists():
        # Somebody may be in that folder, so it stays; what makes it a finished one comes last.
        if any(target.iterdir()) and not overwrite:
            raise OSError(ENOTEMPTY, "not empty any more: another conversion was faster")
        for entry in sorted(partial.iterdir(), key=lambda entry: entry.name == "config.json"):
            old = target / entry.name
            if entry.is_dir() and os.path.lexists(old):
                _swap(entry, old, partial / f"{entry.name}.replaced")
            else:
                entry.replace(old)
    else:
        # Fails where another conversion was faster.
        partial.rename(target)


def _swap(new: Path, old: Path, aside: Path) -> None:
    """A folder in the place of another one, which goes to `aside`, and comes back where that fails."""
    try:
        old.rename(aside)
        new.rename(old)
    except BaseException:
        if os.path.lexists(aside) and not os.path.lexists(old):
            aside.rename(old)
        raise


def _remove(folder: Path) -> None:
    """Also where Ctrl-C comes meanwhile, which is told when all is removed."""
    interrupted = None
    while True:
        try:
            shutil.rmtree(folder, ignore_errors=True)
            break
        except KeyboardInterrupt as error:
            interrupted = error
    if interrupted is not None:
        raise interrupted


def remove_leftovers(target: Path) -> None:
    """Folders of conversions to `target` that were killed."""
    target = target.resolve()
    prefix = f".{target.name}.partial-"
    for folder in target.parent.glob(escape(prefix) + "*"):
        if not _owner_runs(folder, folder.name.removeprefix(prefix).partition("-")[0]):
            shutil.rmtree(folder, ignore_errors=True)


def _owner_runs(folder: Path, pid: str) -> bool:
    """Whether the process that made `folder` is still there. A process that is younger than the folder has the
    number of one that is gone; the clocks of the two times agree to a second."""
    try:
        return psutil.Process(int(pid)).create_time() < folder.stat().st_mtime + 1
    except psutil.AccessDenied:
        return True
    except (ValueError, psutil.NoSuchProcess, FileNotFoundError):
        # The last: another process has removed it meanwhile.
        return False
