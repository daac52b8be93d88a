"""Who works at a checkpoint, and whether it is still there."""

from __future__ import annotations

import json
import os
import socket
import time
import uuid
from dataclasses import dataclass
from pathlib import Path

__all__ = ["BEAT", "LEASE", "Owner"]

BEAT = 20.0  # seconds between two signs of life
LEASE = 180.0  # seconds without one after which a worker on another machine counts as lost

_left: set[str] = set()  # tokens of owners of this process that no longer work


@dataclass(frozen=True)
class Owner:
    """A process.

    Attributes:
        host: The machine, and the container on it.
        pid: Number of the process.
        started: When it started, as the system counts; numbers of processes are used again.
        token: Tells apart what else is equal.
    """

    host: str
    pid: int
    started: str
    token: str

    @classmethod
    def here(cls) -> Owner:
        """Return the present process."""
        return cls(_host(), os.getpid(), _started(os.getpid()), uuid.uuid4().hex[:12])

    @classmethod
    def read(cls, text: str) -> Owner:
        """Return the owner that a text stands for."""
        return cls(*json.loads(text))

    @property
    def text(self) -> str:
        """The owner as text."""
        return json.dumps([self.host, self.pid, self.started, self.token])

    def leave(self) -> None:
        """Work no longer, though the process goes on: claims that are left can be taken over."""
        _left.add(self.token)

    def is_alive(self, beat: float) -> bool:
        """Return whether the process is still there, and has not left.

        On this machine the system is asked; elsewhere, and on Windows, the last sign of life
        decides.

        Args:
            beat: When the last sign of life came, in seconds since 1970.
        """
        if self.host != _host() or os.name != "posix":
            return time.time() - beat < LEASE
        if self.pid == os.getpid() and self.token in _left:
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return False
        except PermissionError:
            pass
        return _started(self.pid) == self.started


def _host() -> str:
    # Processes of two containers with one name do not see each other's numbers.
    try:
        space = os.readlink("/proc/self/ns/pid")
    except OSError:
        space = ""
    return f"{socket.gethostname()} {space}".strip()


def _started(pid: int) -> str:
    # Linux tells; elsewhere the number alone must do. A process that has ended but was not
    # yet collected by its parent (a zombie) no longer works.
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return ""
    return "ended" if fields[0] in "ZX" else fields[19]
