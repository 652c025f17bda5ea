"""The routes, and a server that finishes what runs before it goes."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import socket
import threading
import types
from collections.abc import AsyncIterator, Callable
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from sst_jax.errors import InputError
from sst_jax.serving.access import Access
from sst_jax.serving.protocol import Call, Limits, Refused, parse, read_chat, read_completion
from sst_jax.serving.queue import Busy, Closing, Engine, Job
from sst_jax.serving.request_log import JOBS, RequestLog
from sst_jax.serving.responses import Writer
from sst_jax.types import Json

ANYONE = Access()
ROUTES = ["/v1/completions", "/v1/chat/completions", "/v1/models", "/health"]
CLIENT_GONE = 499  # nginx's number; the client has closed the connection and does not read it


def make_app(
    engine: Engine, name: str, limits: Limits, access: Access = ANYONE, log: Callable[[str], None] | None = None
) -> Starlette:
    """Return an ASGI application that answers with `engine` under the model's `name`, to those who have `access`.

    log: is called with a line for every call; None: nothing is told.
    """
    api = Api(engine, name, limits)

    def post(path: str, read: Callable[..., Call]) -> Route:
        return Route(path, functools.partial(api.complete, read=read), methods=["POST"])

    routes = [
        Route("/", api.root),
        Route("/health", api.health),
        Route("/v1/models", api.models),
        Route("/v1/models/{name:path}", api.one_model),
        post("/v1/completions", read_completion),
        post("/v1/chat/completions", read_chat),
        Route("/v1/responses", api.no_responses, methods=["GET", "POST"]),
    ]
    handlers: dict[Any, Any] = {Refused: _refused, InputError: _bad_input, HTTPException: _http, Exception: _broken}
    middleware = access.middleware() if log is None else [Middleware(RequestLog, write=log), *access.middleware()]
    return Starlette(routes=routes, exception_handlers=handlers, middleware=middleware)


class Api:
    """What each route answers."""

    def __init__(self, engine: Engine, name: str, limits: Limits):
        self.engine, self.name, self.limits = engine, name, limits
        self.card = {"id": name, "object": "model", "created": 0, "owned_by": "sst_jax"}

    async def root(self, request: HttpRequest) -> Response:
        return JSONResponse({"model": self.name, "routes": ROUTES, "documentation": "sst-jax serve --help"})

    async def no_responses(self, request: HttpRequest) -> Response:
        raise Refused(404, "/v1/responses is not served: ask /v1/chat/completions (chat.completions.create)")

    async def health(self, request: HttpRequest) -> Response:
        closing = self.engine.closing
        return JSONResponse({"status": "closing" if closing else "ok", **self.engine.load()}, 503 if closing else 200)

    async def models(self, request: HttpRequest) -> Response:
        return JSONResponse({"object": "list", "data": [self.card]})

    async def one_model(self, request: HttpRequest) -> Response:
        asked = request.path_params["name"]
        if asked != self.name:
            raise Refused(404, f"the model {asked!r} is not served here", code="model_not_found")
        return JSONResponse(self.card)

    async def complete(self, request: HttpRequest, read: Callable[..., Call]) -> Response:
        """Answer a completion or a chat, whole or as events."""
        body = await _body(request, self.limits.body)
        # In a thread: a long text takes a while to tokenise, and others want to be heard meanwhile.
        call = await asyncio.to_thread(lambda: read(parse(body), self.engine.model, self.name, self.limits))
        writer = Writer(call, self.name, self.engine.model.tokenizer)
        events: asyncio.Queue = asyncio.Queue()
        jobs = self._submit(call, events)
        request.scope.get(JOBS, []).extend(jobs)
        if call.stream:
            return StreamingResponse(stream_events(self.engine, writer, jobs, events), media_type="text/event-stream")
        gone = asyncio.ensure_future(_disconnected(request))
        try:
            while not all(job.ended for job in jobs):
                moved = asyncio.ensure_future(events.get())
                await asyncio.wait({moved, gone}, return_when=asyncio.FIRST_COMPLETED)
                moved.cancel()
                if gone.done():
                    return Response(status_code=CLIENT_GONE)
        finally:
            gone.cancel()
            self.engine.cancel(jobs)
        for job in jobs:
            if job.error is not None:
                raise Refused(503 if self.engine.closing else 500, job.error)
        return JSONResponse(writer.whole(jobs))

    def _submit(self, call: Call, events: asyncio.Queue) -> list[Job]:
        """Queue a call's requests; what comes of them is put into `events`."""
        loop = asyncio.get_running_loop()

        def emit(job: Job, text: str, reason: str | None, count: int) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the client is gone
                loop.call_soon_threadsafe(events.put_nowait, (job, text, reason, count))

        try:
            return self.engine.submit(call.requests, emit)
        except Busy as error:
            raise Refused(429, str(error), code="busy") from None
        except Closing as error:
            raise Refused(503, str(error), code="shutting_down") from None


async def _body(request: HttpRequest, most: int) -> bytes:
    """Return the body, at most `most` bytes of it. Raises: Refused."""
    parts, size = [], 0
    try:
        async for part in request.stream():
            size += len(part)
            if size > most:
                raise Refused(413, f"the body is larger than {most} bytes", code="too_large")
            parts.append(part)
    except ClientDisconnect:
        raise Refused(CLIENT_GONE, "the client went away") from None
    return b"".join(parts)


async def _disconnected(request: HttpRequest) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def stream_events(engine: Engine, writer: Writer, jobs: list[Job], events: asyncio.Queue) -> AsyncIterator[str]:
    """Yield server-sent events until all jobs have ended; when the client goes away, its jobs end too."""
    index = {id(job): number for number, job in enumerate(jobs)}
    told = 0
    try:
        for chunk in writer.begin(len(jobs)):
            yield _event(chunk)
        while told < len(jobs):
            job, text, reason, count = await events.get()
            if reason == "error":
                yield _event(Refused(500, job.error).body())
                return
            told += reason is not None
            for chunk in writer.delta(index[id(job)], job, text, reason, count):
                yield _event(chunk)
        for chunk in writer.end(jobs):
            yield _event(chunk)
        yield "data: [DONE]\n\n"
    finally:
        engine.cancel(jobs)


def _event(value: Json) -> str:
    return f"data: {json.dumps(value)}\n\n"


async def _refused(request: HttpRequest, error: Refused) -> Response:
    return JSONResponse(error.body(), error.status)


async def _bad_input(request: HttpRequest, error: InputError) -> Response:
    return await _refused(request, Refused(400, str(error)))


async def _http(request: HttpRequest, error: HTTPException) -> Response:
    """Return a response for the framework's own errors: an unknown route, a wrong method."""
    refused = Refused(error.status_code, f"{request.method} {request.url.path}: {error.detail}")
    return JSONResponse(refused.body(), error.status_code, headers=error.headers)


async def _broken(request: HttpRequest, error: Exception) -> Response:
    return await _refused(request, Refused(500, f"the server failed: {type(error).__name__}"))


class Server(uvicorn.Server):
    """uvicorn, which on the first SIGTERM or SIGINT refuses new requests (503) and finishes the running ones.

    deadline: seconds that they have for it. A second signal ends everything at once.
    """

    def __init__(self, app: Starlette, engine: Engine, deadline: float, announce: Callable[[], None]):
        config = uvicorn.Config(
            app, log_level="warning", access_log=False, lifespan="off", timeout_graceful_shutdown=5, server_header=False
        )
        super().__init__(config)
        self._engine, self._deadline, self._announce, self._draining = engine, deadline, announce, False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._announce()

    def handle_exit(self, sig: int, frame: types.FrameType | None) -> None:
        if self._draining:
            self.should_exit = self.force_exit = True
            return
        self._draining = True
        threading.Thread(target=self._drain, daemon=True).start()

    def _drain(self) -> None:
        self._engine.close(self._deadline)
        self.should_exit = True
