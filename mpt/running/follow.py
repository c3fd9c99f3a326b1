"""Follow a file of JSON lines while another process appends to it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class LineFollower:
    """Gives each complete line that was appended since the last look; begins at the file's present end."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offset = path.stat().st_size if path.exists() else 0
        self._rest = b""

    def new(self) -> Iterator[dict[str, Any]]:
        """Read on. A line that is no JSON object (torn by a kill) is skipped."""
        try:
            if self.path.stat().st_size == self._offset:
                return
            with self.path.open("rb") as file:
                file.seek(self._offset)
                text = file.read()
        except OSError:
            return  # not there yet, or a network file system's hiccup: the next look will tell
        self._offset += len(text)
        *lines, self._rest = (self._rest + text).split(b"\n")
        for line in lines:
            try:
                value = json.loads(line)
            except ValueError:
                continue
            if isinstance(value, dict):
                yield value
