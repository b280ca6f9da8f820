from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from helpers.contract import checked

from harnessd.web.app import App

STREAMS = ("text/event-stream", "text/plain")


@pytest.fixture
def every_answer_is_in_the_contract(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Hold each answer of an application in this process against the contract."""
    wrong: list[str] = []
    plain = App.__call__

    async def call(app: App, scope: Any, receive: Any, send: Any) -> None:
        sent: list[Any] = []

        async def seen(message: Any) -> None:
            sent.append(message)
            await send(message)

        await plain(app, scope, receive, seen)
        media = dict(sent[0]["headers"]).get(b"content-type", b"").decode()
        if media.startswith(STREAMS):
            return
        body = b"".join(message["body"] for message in sent[1:])
        try:
            checked(scope["method"], scope["path"], sent[0]["status"], media, body)
        except AssertionError as error:
            wrong.append(str(error))

    monkeypatch.setattr(App, "__call__", call)
    yield
    assert wrong == []
