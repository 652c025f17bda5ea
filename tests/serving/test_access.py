"""Who may call the server: keys right and wrong, and pages of other origins."""

import http.client
import json

import pytest

from sst_jax import serve
from sst_jax.console.command import run
from sst_jax.errors import InputError
from tests.support.server import start

made = pytest.importorskip("sst_jax.serving.access", reason="the server is an extra: sst-jax[serve]")
KEY_VARIABLE, Access, access = made.KEY_VARIABLE, made.Access, made.access

KEY, PAGE = "sk-right", "http://localhost:3000"
BODY = json.dumps({"prompt": "x", "max_tokens": 1, "temperature": 0})


@pytest.fixture(scope="module")
def guarded(engine):
    client, server, thread = start(engine, access=Access(KEY, (PAGE,)))
    yield client
    server.should_exit = True
    thread.join(20)


def call(client, method, path, headers=(), body=None):
    """(status, headers, body)."""
    connection = http.client.HTTPConnection("127.0.0.1", client.port, timeout=60)
    connection.putrequest(method, path)
    for name, value in (*headers, *([("Content-Length", str(len(body)))] if body else [])):
        connection.putheader(name, value)
    connection.endheaders(body.encode() if body else None)
    response = connection.getresponse()
    found = response.status, {name.lower(): value for name, value in response.getheaders()}, response.read().decode()
    connection.close()
    return found


def test_the_right_key_is_answered(guarded, client):
    right = [("Authorization", f"Bearer {KEY}")]
    status, _, answer = call(guarded, "POST", "/v1/completions", right, BODY)
    assert status == 200
    _, _, open_answer = call(client, "POST", "/v1/completions", (), BODY)  # of a server without a key
    assert json.loads(answer)["choices"] == json.loads(open_answer)["choices"]
    assert call(guarded, "GET", "/v1/models", right)[0] == 200
    assert call(guarded, "GET", "/health")[0] == 200


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [("Authorization", "Bearer sk-wrong")],
        [("Authorization", f"Bearer {KEY}x")],
        [("Authorization", f"Bearer {KEY[:-1]}")],
        [("Authorization", KEY)],
        [("Authorization", "Bearer ")],
        [("Authorization", f"Basic {KEY}")],
        [("Authorization", f"Bearer {KEY}"), ("Authorization", "Bearer other")],
        [("X-Api-Key", KEY)],
    ],
)
def test_every_other_is_refused_on_every_route(guarded, headers):
    for method, path, body in (
        ("POST", "/v1/completions", BODY),
        ("POST", "/v1/chat/completions", BODY),
        ("GET", "/v1/models", None),
        ("GET", "/v1/models/tiny", None),
        ("GET", "/no/such/route", None),
    ):
        status, found, answer = call(guarded, method, path, headers, body)
        assert (status, found["www-authenticate"]) == (401, "Bearer")
        error = json.loads(answer)["error"]
        assert (error["code"], error["type"]) == ("invalid_api_key", "invalid_request_error")
        assert KEY not in answer


def test_pages_of_a_named_origin_may_call(guarded, client):
    asking = [
        ("Origin", PAGE), ("Access-Control-Request-Method", "POST"),
        ("Access-Control-Request-Headers", "authorization,content-type"),
    ]  # fmt: skip
    status, headers, _ = call(guarded, "OPTIONS", "/v1/chat/completions", asking)  # a browser asks without the key
    assert (status, headers["access-control-allow-origin"]) == (200, PAGE)
    assert "authorization" in headers["access-control-allow-headers"].lower()
    _, headers, _ = call(guarded, "GET", "/v1/models", [("Origin", PAGE), ("Authorization", f"Bearer {KEY}")])
    assert headers["access-control-allow-origin"] == PAGE
    assert (
        call(guarded, "GET", "/v1/models", [("Origin", PAGE)])[1]["access-control-allow-origin"] == PAGE
    )  # to read 401
    other = [("Origin", "http://evil.example"), *asking[1:]]
    assert "access-control-allow-origin" not in call(guarded, "OPTIONS", "/v1/chat/completions", other)[1]
    status, headers, _ = call(client, "OPTIONS", "/v1/chat/completions", asking)
    assert status == 405
    assert "access-control-allow-origin" not in headers


def test_where_a_key_comes_from(monkeypatch):
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    assert access(None, []) == Access()
    monkeypatch.setenv(KEY_VARIABLE, "from-outside")
    assert access(None, []).key == "from-outside"
    assert access("given", ["*"]) == Access("given", ("*",))
    assert "given" not in repr(access("given", []))
    monkeypatch.setenv(KEY_VARIABLE, "")
    with pytest.raises(InputError, match="must be printable ASCII"):
        access(None, [])


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (["--api-key", "a b"], "--api-key (or SST_JAX_API_KEY) must be printable ASCII"),
        (["--api-key", "ключ"], "must be printable ASCII"),
        (["--cors", "localhost:3000"], "--cors localhost:3000 is no origin"),
        (["--cors", "http://a/b"], "--cors http://a/b is no origin"),
    ],
)
def test_bad_flags_are_refused_before_a_model_is_read(capsys, flags, what):
    assert run(serve.main, ["--model", "no/such/model", *flags]) == 2
    error = capsys.readouterr().err
    assert what in error
    assert "a b" not in error
