"""How much memory there is to keep gradient graphs in."""

from __future__ import annotations

import os
from pathlib import Path

import torch

__all__ = ["available_memory", "default_budget"]

BUDGET_SHARE = 4  # a quarter of what is free: kept graphs take about twice what they save


def available_memory(device: torch.device) -> int:
    """Return the free memory of a device in bytes, as far as the system tells."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = []
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free.append(int(line.split()[1]) * 1024)
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit != "max":
            used = int(Path("/sys/fs/cgroup/memory.current").read_text())
            free.append(int(limit) - used)
    except (OSError, ValueError):
        pass  # not Linux, or no control group: what was found must do
    if not free:
        try:
            free.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2)
        except (AttributeError, OSError, ValueError):
            free.append(4 * 2**30)
    return max(min(free), 0)


def default_budget(device: torch.device) -> int:
    """Return the bytes that kept graphs may take when the user names no budget."""
    return available_memory(device) // BUDGET_SHARE
