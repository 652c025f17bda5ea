"""What the server tells of itself: a line a call, its routes, and a command that asks it."""

import shlex
import time

import pytest

from sst_jax.serve import example
from tests.support.server import start

for package in ("starlette", "uvicorn"):
    pytest.importorskip(package, reason="the server is an extra: sst-jax[serve]")


@pytest.fixture(scope="module")
def logged(engine):
    lines = []
    client, server, thread = start(engine, log=lines.append)
    yield client, lines
    server.should_exit = True
    thread.join(20)


def next_line(lines, before):
    """Return the line that follows the first `before` ones: an answer may be read before its line is written."""
    until = time.monotonic() + 20
    while len(lines) == before and time.monotonic() < until:
        time.sleep(0.01)
    (line,) = lines[before:]
    return line


def test_every_call_is_a_line_without_its_text(logged, model):
    client, lines = logged
    prompt, before = "a secret", len(lines)
    answer = client.complete(prompt=prompt, max_tokens=3, temperature=0, depth=2)
    read = len(model.tokenizer.encode(prompt))
    assert answer["usage"]["completion_tokens"] == 3
    line = next_line(lines, before)
    assert line.startswith("127.0.0.1 POST /v1/completions 200 in ")
    assert line.endswith(f" s: {read} + 3 tokens, depth 2")
    client.stream("/v1/completions", prompt=prompt, max_tokens=4, n=2, temperature=0)
    assert next_line(lines, before + 1).endswith(f" s: {2 * read} + 8 tokens, depth 1")
    client.refused(prompt=prompt, temperature=-1)
    assert " POST /v1/completions 400 in " in next_line(lines, before + 2)
    client.send("GET", "/v1/%0Anothing")
    assert " GET /v1/\\nnothing 404 in " in next_line(lines, before + 3)
    assert not any("secret" in line or "\n" in line for line in lines)


def test_questions_after_its_health_are_no_lines(logged):
    client, lines = logged
    before = list(lines)
    assert client.send("GET", "/health")[0] == 200
    assert lines == before


def test_the_root_names_the_routes(logged):
    client, _ = logged
    status, answer = client.send("GET", "/")
    assert (status, answer["model"]) == (200, "tiny")
    for route in answer["routes"]:
        assert client.send("GET", route)[0] in (200, 405)


def test_responses_are_refused_with_the_way_out(logged):
    client, _ = logged
    status, error = client.refused("/v1/responses", input="hi")
    assert status == 404
    assert "/v1/chat/completions" in error["message"]


def test_the_command_that_is_shown_asks_the_server(logged):
    client, _ = logged
    address = f"http://127.0.0.1:{client.port}"
    curl, url, flag, body = shlex.split(example(address, False))
    assert (curl, flag) == ("curl", "-d")
    assert client.send("POST", url.removeprefix(address), raw=body)[0] == 200
    assert "Bearer $SST_JAX_API_KEY" in example(address, True)
