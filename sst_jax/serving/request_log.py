"""One line a call that has been answered: who called what, what came of it, and how long it took."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sst_jax.console.progress import counted
from sst_jax.serving.queue import Job

JOBS = "sst_jax.jobs"  # in a call's scope: the jobs that it became
QUIET = ("/health",)  # asked every few seconds by those who watch a server; told only where it is not well


class RequestLog:
    """Tells `write` a line for every call; no text of a prompt, an answer or a header is in it."""

    def __init__(self, app: ASGIApp, write: Callable[[str], None]):
        self._app, self._write = app, write

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.monotonic(), 500
        jobs: list[Job] = []
        scope[JOBS] = jobs

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noted)
        finally:
            path = json.dumps(scope["path"])[1:-1]  # no control characters
            if scope["path"] not in QUIET or status != 200:
                client = (scope.get("client") or ("-",))[0]
                line = f"{client} {scope['method']} {path} {status} in {time.monotonic() - started:.2f} s"
                if jobs:
                    read, new = (sum(map(len, part)) for part in zip(*map(_tokens, jobs), strict=True))
                    depths = ", ".join(dict.fromkeys(job.request.policy.name for job in jobs))
                    line += f": {read} + {counted(new, 'token')}, depth {depths}"
                self._write(line)


def _tokens(job: Job) -> tuple[Sequence[int], Sequence[int]]:
    return job.request.tokens, job.answer.tokens
