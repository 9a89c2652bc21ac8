"""Results that are appended to a file as they come, so that work which was stopped can go on.

    {"tasks": "recall", "seed": 0, ...}                      the first line: the settings
    ["recall", 2048, 0, [{"written": "PLM3", ...}, ...]]     every other line: a key, and its value
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch.distributed as dist


class Record(dict[tuple[Any, ...], Any]):
    """A dict that appends each new entry to a file (on the main rank)."""

    path: Path | None = None

    def __setitem__(self, key: tuple[Any, ...], value: Any) -> None:
        super().__setitem__(key, value)
        if self.path is not None:
            with self.path.open("a") as file:
                file.write(json.dumps([*key, value]) + "\n")


def open_record(path: Path | None, settings: dict[str, Any], parallel: Any = None) -> Record:
    """Open a record, or begin one. Raises ValueError if it was made with other settings.

    The main rank alone reads the file. It sends the others what it found, or its error, so that all
    ranks skip the same work and none waits for another.
    """
    main = parallel is None or parallel.main
    found: list[Any] = [{}]
    if path is not None and main:
        try:
            found = [_read(path, settings)]
        except (ValueError, OSError) as error:
            found = [error]
    if parallel is not None:
        dist.broadcast_object_list(found, device=parallel.device)
    if isinstance(found[0], Exception):
        raise found[0]
    record = Record(found[0])
    record.path = path if main else None
    return record


def _read(path: Path, settings: dict[str, Any]) -> dict[tuple[Any, ...], Any]:
    text = path.read_text() if path.exists() else ""
    whole = text[:text.rfind("\n") + 1]  # a last line may be half written
    lines = whole.splitlines() or [json.dumps(settings)]
    before = json.loads(lines[0])
    changed = [f"{key} {before.get(key)!r}, now {value!r}" for key, value in settings.items()
               if before.get(key) != value]
    if changed:
        raise ValueError(f"{path} was made with other settings ({'; '.join(changed)}); "
                         "choose another folder (--out), or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    rows = [json.loads(line) for line in lines[1:]]
    return {tuple(key): value for *key, value in rows}
