"""Failpoints inside the hand-over of KV pages, for engines started with `--logits-processors handoverlab`.

A test arms one by writing a file into HANDOVERLAB_DIR; the first engine that comes to that point takes the
file away, leaves word that it was there, and then kills or stops itself. So one server serves many tests, and
a test knows that its fault happened, where and to whom. Without the variable nothing is changed.

Points of the engine that gives (p) and of the one that takes (d); `skip` lets so many passes go by:

    p.move      it was told to move a request             d.offered    pages were offered to it
    p.chunk     a step begins while it moves one          d.accepted   it has leased pages for them
    p.finish    the rest is about to be sent              d.arrived    everything is there and verified
    p.finished  the rest was given to the transfers       d.submitted  the request itself has come
    p.sent      the receiver has everything               d.step       a step begins that goes on with one
    p.answered  the front was told (a moment later)           d.last      one that draws the last token of one

Where the folder has files `proxy.<port>`, each engine takes one of them, writes the port at which it takes
pages into it, and names the proxy's to its peers.
"""

from __future__ import annotations

import json
import os
import select
import signal
import threading
from pathlib import Path

FOLDER = os.environ.get("HANDOVERLAB_DIR", "")
ROW_S = float(os.environ.get("HANDOVERLAB_ROW_MS", "0")) / 1000
"""What a computed row takes on the null device: where prompts cost nothing, moving their pages never pays."""


class Points:
    """What is armed, looked up at every pass; `passes` counts those of the armed failpoint."""

    def __init__(self, folder: Path) -> None:
        self._armed = folder / "armed"
        self._folder = folder
        self._known: tuple[int, int] | None = None
        self._passes = 0

    def reach(self, point: str) -> None:
        try:
            stat = self._armed.stat()
            wish = json.loads(self._armed.read_text())
        except (OSError, ValueError):
            return
        if (stat.st_ino, stat.st_mtime_ns) != self._known:
            self._known, self._passes = (stat.st_ino, stat.st_mtime_ns), 0
        if wish["point"] != point:
            return
        self._passes += 1
        if self._passes <= wish["skip"]:
            return
        hit = self._folder / f"hit.{os.getpid()}"
        try:
            # Whoever renames it has it; the other engines pass by.
            os.rename(self._armed, hit)
        except OSError:
            return
        self._act(signal.Signals[wish["signal"]], wish["after_ms"] / 1000)

    @staticmethod
    def _act(number: signal.Signals, after_s: float) -> None:
        if after_s:
            threading.Timer(after_s, os.kill, (os.getpid(), number)).start()
        else:
            os.kill(os.getpid(), number)


class Watched:
    """The transfers as the engine sees them, with a look at what it asks of them."""

    def __init__(self, transfers, points: Points) -> None:
        self._transfers = transfers
        self._points = points

    def __getattr__(self, name: str):
        return getattr(self._transfers, name)

    def finish(self, *args) -> None:
        self._points.reach("p.finish")
        self._transfers.finish(*args)
        self._points.reach("p.finished")

    def give(self, *args) -> None:
        """What a pull asks for goes in one piece."""
        self._points.reach("p.finish")
        self._transfers.give(*args)
        self._points.reach("p.finished")

    def accept(self, *args) -> None:
        self._transfers.accept(*args)
        self._points.reach("d.accepted")


def install(points: Points) -> None:
    from xllm.engine.moving import mover

    class LabMover(mover.Mover):
        def __init__(self, scheduler, memory, transfers, *args, **fields) -> None:
            super().__init__(scheduler, memory, Watched(transfers, points), *args, **fields)
            self._moving: set[str] = set()
            self._taken: dict[str, int] = {}
            self._told = False

        def move(self, owner, message, now_s) -> None:
            points.reach("p.move")
            self._moving.add(message.transfer_id)
            super().move(owner, message, now_s)

        def submitted(self, request_id, owner, transfer_id, *args) -> None:
            points.reach("d.submitted")
            super().submitted(request_id, owner, transfer_id, *args)
            self._taken[request_id] = owner

        def on_event(self, event, now_s) -> None:
            point = {"Offered": "d.offered", "Arrived": "d.arrived", "Sent": "p.sent"}.get(
                type(event).__name__
            )
            if point is not None:
                points.reach(point)
            super().on_event(event, now_s)

        def before_step(self, plan) -> None:
            if self._moving:
                points.reach("p.chunk")
            if self._taken:
                points.reach("d.step")
            if any(map(self._ends_next, self._taken, self._taken.values())):
                points.reach("d.last")
            super().before_step(plan)

        def _ends_next(self, request_id, owner) -> bool:
            request = self._scheduler.find(request_id, owner)
            return request is not None and any(
                seq.num_output + 1 >= request.spec.params.max_tokens for seq in request.sequences
            )

        def tick(self, now_s) -> None:
            if self._told:
                self._told = False
                points.reach("p.answered")
            super().tick(now_s)

        def take_answers(self):
            answers = super().take_answers()
            for _, moved in answers:
                self._moving.discard(moved.transfer_id)
                self._told = self._told or moved.error is None
            return answers

    # Before the engine is composed: processors are loaded while it is built.
    mover.Mover = LabMover
    for user in ("xllm.engine.core", "xllm.engine.build", "xllm.engine.moving"):
        module = __import__(user, fromlist=["x"])
        if hasattr(module, "Mover"):
            module.Mover = LabMover


def install_cost() -> None:
    from xllm.engine.platform.null_runner import NullRunner

    execute = NullRunner.execute

    def slow(self, plan):
        select.select([], [], [], plan.num_rows * ROW_S)
        return execute(self, plan)

    NullRunner.execute = slow


def take_proxy(folder: Path, port: int) -> int | None:
    """The proxy's port, now told where to go to; None when all are taken."""
    for offered in sorted(folder.glob("proxy.*")):
        mine = offered.with_name(offered.name.replace("proxy.", "taken."))
        told = folder / f"told.{os.getpid()}"
        told.write_text(str(port))
        try:
            offered.unlink()
        except FileNotFoundError:
            continue
        told.rename(mine)
        return int(mine.suffix[1:])
    return None


def install_proxies(folder: Path) -> None:
    from xllm.engine.kvtransfer import plane

    listen = plane.listen_tcp

    def listen_behind(host, port, road, told=None):
        listener, endpoint = listen(host, port, road, told)
        proxy = take_proxy(folder, listener.getsockname()[1])
        return listener, endpoint if proxy is None else f"{road}:127.0.0.1:{proxy}"

    plane.listen_tcp = listen_behind


class Handoverlab:
    name = "handoverlab"

    def __init__(self) -> None:
        if FOLDER:
            install(Points(Path(FOLDER)))
            install_proxies(Path(FOLDER))
        if ROW_S:
            install_cost()

    def __call__(self, logits, op) -> None:
        """Changes nothing."""
