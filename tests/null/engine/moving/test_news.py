"""What the transfers do with an event: a success reaches its front, and the step thread before that."""

from __future__ import annotations

import queue
from types import SimpleNamespace

import pytest

from xllm.engine.kvtransfer.base import Released, Sent, TransferEvent
from xllm.engine.moving.news import TransferNews
from xllm.engine.port import Inbox

ANSWER = object()


class Port(SimpleNamespace):
    def send(self, message: object) -> None:
        self.sent.append((message, self.inbox.qsize()))


@pytest.mark.parametrize(
    ("event", "fronts", "sent"),
    [
        (Sent(transfer_id="t"), {3}, [(ANSWER, 1)]),
        (Sent(transfer_id="t"), {4}, []),
        (Sent(transfer_id="other"), {3}, []),
        (Released(transfer_id="t"), {3}, []),
    ],
)
def test_the_owner_hears_of_a_success_after_the_inbox(
    event: TransferEvent, fronts: set[int], sent: list[tuple[object, int]]
) -> None:
    inbox: Inbox = queue.SimpleQueue()
    mover = SimpleNamespace(answer_early=lambda e: (3, ANSWER) if e.transfer_id == "t" else None)
    news = TransferNews(SimpleNamespace(mover=mover), inbox)
    heard: list[tuple[object, int]] = []
    news.fronts = {number: Port(sent=heard, inbox=inbox) for number in fronts}
    news(event)
    assert heard == sent
    assert inbox.get_nowait() == (None, event)
