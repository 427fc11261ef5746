"""Says which rank a run waits for, and ends it: a rank that died, was stopped, or fell behind the others for too long.

Every rank's main thread notes what it is doing (`phase`: one attribute, no cost). A thread beside it
writes that and a growing number, the beat, every few seconds to the store of torchrun, by a connection of its own.
The first rank reads what all wrote, the others what it wrote; clocks are compared with themselves alone.
  - no new beat for 0.8 `timeout_s`: the rank is dead or stopped; the run ends. A notice after a few seconds already.
  - a rank is in an earlier phase than another for 0.8 `timeout_s`: it stalls; the run ends.
  - nothing moves, all in one phase: may be a long step, so it is told and left to the collectives' own
    timeout, which parallel/groups.py sets a minute higher.
  - a rank fails with an error: it says so, and the others end without waiting for it.
Invariant: phases are noted alike on all ranks, so their count says who is behind.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import socket
import sys
import threading
import time
from collections import defaultdict
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from types import TracebackType
from typing import Any

import psutil
import torch.distributed as dist

from moba_train.config.schema import ConfigError

__all__ = ["Sign", "Watch", "Watched", "phase"]

_VERDICT = "verdict"
_BEAT_S = 2.0
_NOTICE_S = 10.0  # within the 30 s that torchrun grants the others after a rank's death


@dataclass
class Sign:
    """What a rank writes about itself. beat 0: nothing yet."""

    beat: int = 0
    phases: int = 0  # noted so far
    phase: str = "start"
    where: str = ""
    node: str = "?"
    done: bool = False


@dataclass
class Watch:
    """What one rank knows of the others, by its own clock; pure, so that it can be tested without processes."""

    ranks: list[int]
    limit_s: float
    notice_s: float
    now: float
    signs: dict[int, Sign] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._heard = dict.fromkeys(self.ranks, self.now)
        self._moved = dict.fromkeys(self.ranks, self.now)
        self._behind: dict[int, float] = {}
        self._told: set[int] = set()
        self._standstill_told = False
        self.signs = {rank: Sign() for rank in self.ranks}

    def update(self, signs: dict[int, Sign], now: float) -> None:
        """Take in what the ranks have written by now."""
        self.now = now
        for rank, sign in signs.items():
            if sign.beat != self.signs[rank].beat:
                self._heard[rank] = now
            if sign.phases != self.signs[rank].phases:
                self._moved[rank] = now
                self._behind.pop(rank, None)
                self._standstill_told = False
            self.signs[rank] = sign
        front = max(sign.phases for sign in self.signs.values())
        for rank, sign in self.signs.items():
            if sign.phases < front and not sign.done:
                self._behind.setdefault(rank, now)

    def verdict(self) -> str | None:
        """Why the run must end; None: no reason."""
        running = [rank for rank in self.ranks if not self.signs[rank].done]
        silent = [rank for rank in running if self.now - self._heard[rank] > self.limit_s]
        if silent:
            return self._tell(silent, lambda rank: f"gave no sign of life for {self.now - self._heard[rank]:.0f} s")
        behind = [rank for rank in running if self.now - self._behind.get(rank, self.now) > self.limit_s]
        if behind:
            last = min(self.signs[rank].phases for rank in behind)
            behind = [rank for rank in behind if self.signs[rank].phases == last]
            return self._tell(behind, lambda rank: f"did not move for {self.now - self._moved[rank]:.0f} s")
        return None

    def notice(self) -> str | None:
        """What a person should know now, once: ranks newly silent, or that nothing moves."""
        quiet = [rank for rank in self.ranks if not self.signs[rank].done and self._quiet(rank)]
        new = [rank for rank in quiet if rank not in self._told]
        self._told = set(quiet)
        if new:
            return self._tell(new, lambda rank: f"gave no sign of life for {self.now - self._heard[rank]:.0f} s")
        still = self.now - max(self._moved.values())
        if still > self.limit_s and not self._standstill_told:
            self._standstill_told = True
            return f"No rank went on for {still:.0f} s: {self.summary()}"
        return None

    def summary(self, without: tuple[int, ...] = ()) -> str:
        """Where the ranks are, those in one place together."""
        places: dict[str, list[int]] = defaultdict(list)
        for rank, sign in self.signs.items():
            if rank not in without:
                places[_place(sign)].append(rank)
        return "; ".join(f"{_names(ranks)} in {place}" for place, ranks in places.items())

    def _quiet(self, rank: int) -> bool:
        # A rank that never wrote may be starting still: machines of a job do so at different times.
        return self.signs[rank].beat > 0 and self.now - self._heard[rank] > self.notice_s

    def _tell(self, ranks: list[int], what: Any) -> str:
        lines = [f"Rank {r} ({self.signs[r].node}) {what(r)}, last in {_place(self.signs[r])}." for r in ranks[:8]]
        if ranks[8:]:
            lines.append(f"So did {_names(ranks[8:])}.")
        others = self.summary(without=tuple(ranks))
        return " ".join([*lines, f"The others: {others}." if others else ""]).strip()


class Watched:
    """A block in which this process is watched, where it is one of several that torchrun's environment describes.

    An error that leaves the block is told with rank and phase, and ends all ranks; a ConfigError tells itself.
    """

    def __init__(self, timeout_s: int) -> None:
        self._limit_s = 0.8 * timeout_s
        self._timeout_s = timeout_s
        self._beat_s = min(_BEAT_S, timeout_s / 20)
        self._rank, self._size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        self._sign = Sign(node=socket.gethostname())
        self._main = threading.get_ident()
        self._end = threading.Event()
        self._failing = False
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()  # the store's connection is used by both threads when this rank fails
        self._store: dist.Store | None = None
        self._connected = threading.Event()

    def __enter__(self) -> Watched:
        global _current
        _current = self
        if self._size > 1 and "MASTER_ADDR" in os.environ:
            self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        global _current
        _current = None
        self._failing = error is not None
        if isinstance(error, Exception) and not isinstance(error, ConfigError) and self._thread is not None:
            self._fail(error)
        self._end.set()
        if self._thread is not None:
            self._thread.join(2 * self._beat_s)

    def note(self, name: str) -> None:
        """This rank's main thread begins `name`."""
        self._sign.phase = name
        self._sign.phases += 1

    def _run(self) -> None:
        try:
            self._store = self._connect()
            # Each watches the first rank, and the first all: the store is read once a rank, not once a pair.
            ranks = list(range(self._size)) if self._rank == 0 else [0]
            watch = Watch(ranks, self._limit_s, min(_NOTICE_S, self._limit_s / 2), time.monotonic())
            self._beat()
            self._connected.set()
            while not self._end.wait(self._beat_s):
                self._beat()
                with self._lock:
                    ended = self._store.check([_VERDICT])
                if ended:
                    if self._failing:
                        return
                    _leave()
                watch.update(self._read(ranks, watch), time.monotonic())
                verdict = watch.verdict()
                if verdict is not None:
                    everyone = self._survey()
                    if self._rank != 0:
                        verdict += f" Where the ranks were: {everyone.summary()}."
                    self._pronounce(f"{verdict} Ending the run: parallel.timeout_s={self._timeout_s}.")
                    _leave()
                notice = watch.notice() if self._rank in (0, 1) else None
                if notice is not None:
                    _say(notice)
            self._sign.done = not self._failing
            self._beat()
        except (dist.DistError, ConnectionError) as error:
            # The store left with the machine that kept it, or the run is over there; collectives have timeouts too.
            if not self._end.is_set():
                _say(f"Rank {self._rank} ({self._sign.node}) lost the store, in {_place(self._sign)}: {error}")

    def _connect(self) -> dist.Store:
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(host, port, wait_for_workers=False, timeout=timedelta(seconds=self._timeout_s))
        return dist.PrefixStore(f"watchdog/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)

    def _beat(self) -> None:
        assert self._store is not None
        self._sign.beat += 1
        self._sign.where = _where(self._main)
        with self._lock:
            self._store.set(str(self._rank), json.dumps(asdict(self._sign)))

    def _read(self, ranks: list[int], known: Watch) -> dict[int, Sign]:
        """What these ranks wrote last; a rank that never wrote is not waited for."""
        assert self._store is not None
        with self._lock:
            there = [r for r in ranks if known.signs[r].beat or self._store.check([str(r)])]
            values = self._store.multi_get([str(rank) for rank in there]) if there else []
        return {rank: Sign(**json.loads(value)) for rank, value in zip(there, values, strict=True)}

    def _survey(self) -> Watch:
        """Every rank's last sign, and by a second look who has stopped giving any."""
        ranks = list(range(self._size))
        watch = Watch(ranks, 2 * self._beat_s, 2 * self._beat_s, time.monotonic())
        watch.update(self._read(ranks, watch), time.monotonic())
        return watch

    def _fail(self, error: Exception) -> None:
        """Tell this rank's error, unless it only follows from another rank's end: then tell that."""
        me = f"Rank {self._rank} ({self._sign.node}) failed in '{self._sign.phase}': {type(error).__name__}: {error}"
        self._connected.wait(5 * self._beat_s)
        if self._store is None:
            _say(me)
            return
        try:
            if _is_collective(error):
                watch = self._survey()
                time.sleep(3 * self._beat_s)
                watch.update(self._read(watch.ranks, watch), time.monotonic())
                gone = watch.verdict()
                me = f"{gone} {me}" if gone else f"{me} Where the ranks were: {watch.summary()}."
            self._pronounce(me)
        except (dist.DistError, ConnectionError):
            _say(me)

    def _pronounce(self, text: str) -> None:
        """Say it if no other rank has said why the run ends, and let all ranks know."""
        assert self._store is not None
        with self._lock:
            first = self._store.compare_set(_VERDICT, "", text).decode() == text
        if first:
            _say(text)


_current: Watched | None = None


def phase(name: str) -> None:
    """Note what this process begins to do; all ranks note the same. Nothing outside a `Watched` block."""
    if _current is not None:
        _current.note(name)


def _is_collective(error: Exception) -> bool:
    """Whether the error is of a collective: another rank may be its cause."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _where(thread: int) -> str:
    """The innermost function of this project in that thread, and the innermost of all."""
    frame = innermost = sys._current_frames().get(thread)
    while frame is not None and "moba_train" not in frame.f_globals.get("__name__", ""):
        frame = frame.f_back
    places = [
        f"{os.path.basename(f.f_code.co_filename)}:{f.f_lineno} {f.f_code.co_name}"
        for f in (frame, innermost)
        if f is not None
    ]
    return " > ".join(dict.fromkeys(places))


def _place(sign: Sign) -> str:
    if not sign.beat:
        return "no phase: it has not started"
    return f"'{sign.phase}'" + (f" at {sign.where}" if sign.where else "")


def _names(ranks: list[int]) -> str:
    """[0, 1, 2, 5] -> "ranks 0-2, 5"."""
    runs: list[list[int]] = []
    for rank in ranks:
        if runs and runs[-1][-1] == rank - 1:
            runs[-1][1:] = [rank]
        else:
            runs.append([rank])
    names = ", ".join("-".join(map(str, run)) for run in runs)
    return f"{'ranks' if len(ranks) > 1 else 'rank'} {names}"


def _say(text: str) -> None:
    print(f"[watchdog] {text}", file=sys.stderr, flush=True)


def _leave() -> None:
    """End this process though its main thread waits in a collective that will not return."""
    sys.stdout.flush()
    sys.stderr.flush()
    for child in multiprocessing.active_children():  # a checkpoint's writers would outlive this exit
        child.kill()
    try:
        _end_stopped_neighbours()
    finally:
        os._exit(1)


def _end_stopped_neighbours() -> None:
    """A stopped process heeds no other signal: torchrun would wait half a minute for each rank of this run that is."""
    launcher = os.getppid()
    neighbours = psutil.Process(launcher).children() if launcher else []  # 0: the first process of a container
    for process in neighbours:
        with contextlib.suppress(psutil.Error):
            stopped = process.status() == psutil.STATUS_STOPPED
            if stopped and process.environ().get("MASTER_PORT") == os.environ["MASTER_PORT"]:
                process.kill()
