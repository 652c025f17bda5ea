"""A real server on a free port, and a client of a few lines over http.client."""

import asyncio
import http.client
import json
import socket
import threading

import pytest

from sst_jax.serving.protocol import Limits


class Client:
    """A few lines over http.client: one connection a request, JSON in and out."""

    def __init__(self, port):
        self.port = port

    def connect(self):
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)

    def send(self, method, path, body=None, raw=None):
        """(status, parsed body or text)."""
        connection = self.connect()
        data = raw if raw is not None else None if body is None else json.dumps(body)
        connection.request(method, path, data)
        response = connection.getresponse()
        text = response.read().decode()
        connection.close()
        return response.status, json.loads(text) if text.startswith("{") else text

    def complete(self, **body):
        status, answer = self.send("POST", "/v1/completions", body)
        assert status == 200, answer
        return answer

    def refused(self, path="/v1/completions", **body):
        """(status, error) of a request that is not answered."""
        status, answer = self.send("POST", path, body)
        assert set(answer) == {"error"}
        assert set(answer["error"]) == {"message", "type", "param", "code"}
        return status, answer["error"]

    def stream(self, path, **body):
        """The events of a stream, parsed, without the closing [DONE], which must be there."""
        connection = self.connect()
        connection.request("POST", path, json.dumps({**body, "stream": True}))
        response = connection.getresponse()
        assert response.status == 200
        lines = [line for line in response.read().decode().split("\n\n") if line]
        connection.close()
        assert lines.pop() == "data: [DONE]"
        return [json.loads(line.removeprefix("data: ")) for line in lines]


def start(engine, deadline=20.0, access=None, log=None, **limits):
    """(client, server, thread) of a server that is up."""
    app = pytest.importorskip("sst_jax.serving.app", reason="the server is an extra: sst-jax[serve]")
    up, listener = threading.Event(), socket.create_server(("127.0.0.1", 0))
    given = {"positions": engine.capacity, "new_tokens": engine.capacity, **limits}
    made = app.make_app(engine, "tiny", Limits(**given), access or app.ANYONE, log)
    server = app.Server(made, engine, deadline, up.set)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])), daemon=True)
    thread.start()
    assert up.wait(20)
    return Client(listener.getsockname()[1]), server, thread
