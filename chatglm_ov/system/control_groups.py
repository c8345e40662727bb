"""Linux control groups: how containers and slices limit what a process may take."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path


def groups(controller: str, root: Path = Path("/")) -> Iterator[tuple[int, Path]]:
    """The folders of the groups that this process is in, and of those around them, each with the version, 1 or 2, of
    its files. A folder may be missing: in a container a group may have a name that only the system outside knows.
    root: where the system's files are."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        with suppress(ValueError):
            _, controllers, name = line.split(":", 2)
            if controllers and controller not in controllers.split(","):
                continue
            version, place = (1, f"sys/fs/cgroup/{controller}") if controllers else (2, "sys/fs/cgroup")
            group = Path(name.lstrip("/"))
            yield from ((version, root / place / each) for each in (group, *group.parents))
