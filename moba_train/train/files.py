"""Files of a checkpoint: written whole or not at all, checksummed by all ranks together, signals held off meanwhile."""

from __future__ import annotations

import contextlib
import os
import signal
import zlib
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist

__all__ = ["checksum", "gather_checksums", "signals_held", "write_durably"]


def write_durably(path: Path, text: str) -> None:
    """Write and rename, so that a reader sees the old file or the whole new one."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


def gather_checksums(folder: Path, names: list[str]) -> dict[str, list[int]]:
    """[size, CRC-32] of every file, the work shared among ranks; the same on all."""
    mine = {name: checksum(folder / name) for name in names[dist.get_rank() :: dist.get_world_size()]}
    parts: list[dict[str, list[int]]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, mine)
    return {name: value for part in parts for name, value in part.items()}


def checksum(file: Path) -> list[int]:
    """[size in bytes, CRC-32] of a file."""
    size, crc = 0, 0
    with file.open("rb") as stream:
        while piece := stream.read(1 << 22):
            size, crc = size + len(piece), zlib.crc32(piece, crc)
    return [size, crc]


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """SIGTERM and SIGINT wait until after: a signal to the whole process group must not end the writers' processes,
    which inherit the mask."""
    held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, held)
