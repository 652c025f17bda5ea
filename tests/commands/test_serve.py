"""serve as a command: its announcement, its shutdown by a signal, and what it refuses before any work."""

import http.client
import json
import signal
import socket
import subprocess
import sys

import pytest

import sst_jax
from sst_jax import serve
from sst_jax.console.command import run

for package in ("starlette", "uvicorn"):
    pytest.importorskip(package, reason="the server is an extra: sst-jax[serve]")


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_serves_until_it_is_told_to_stop(stop, finished, tmp_path):
    """A run's model over the wire; at the signal the running answer is finished, and the exit code is 0."""
    out = tmp_path / "served.json"
    arguments = ["--model", str(finished), "--name", "run", "--port", "0", "--rows", "2", "--context", "512"]
    server = subprocess.Popen(
        [sys.executable, "-m", "sst_jax.serve", *arguments, "--json", str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        said = server.stdout.readline()
        assert said.startswith("serving run at http://127.0.0.1:"), server.stderr.read()
        port = int(said.split(":")[2].split("/")[0])
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        body = {"model": "run", "prompt": "Seven", "max_tokens": 300, "temperature": 0, "depth": 3, "stream": True}
        connection.request("POST", "/v1/completions", json.dumps(body))
        response = connection.getresponse()
        first = response.readline()
        server.send_signal(stop)
        rest = response.read().decode().split("\n\n")
        printed, errors = server.communicate(timeout=60)
    finally:
        server.kill()
    assert server.returncode == 0, errors
    assert rest[-2] == "data: [DONE]"
    events = [first.decode(), *rest[:-2]]
    text = "".join(json.loads(event.split("data: ")[1])["choices"][0]["text"] for event in events if "data: " in event)
    expected = sst_jax.load(finished).generate("Seven", max_new_tokens=300, depth=3)[0]
    assert text == expected.text
    assert f"answers given: 1; their tokens: {len(expected.tokens)}" in printed
    assert json.loads(out.read_text())["tokens"] == len(expected.tokens)


@pytest.mark.parametrize(
    ("arguments", "culprit"),
    [
        (["--model", "nowhere"], "nowhere does not exist"),
        (["--model", "random:tiny", "--rows", "0"], "--rows 0"),
        (["--model", "random:tiny", "--context", "-5"], "--context -5"),
        (["--model", "random:tiny", "--max-body", "0"], "--max-body 0"),
        (["--model", "random:tiny", "--deadline", "-1"], "--deadline -1"),
        (["--model", "random:tiny", "--port", "99999"], "--port 99999"),
        (["--model", "random:tiny", "--host", "no.such.host.invalid"], "no.such.host.invalid"),
        (["--model", "random:tiny", "--ports", "1"], "--ports"),
        ([], "--model"),
    ],
)
def test_refuses_in_one_line(arguments, culprit, capsys):
    assert run(serve.main, [*arguments, *([] if "--port" in arguments else ["--port", "0"])]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    assert culprit in message


def test_a_taken_port_is_named_before_a_model_is_read(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert run(serve.main, ["--model", "nowhere", "--port", port]) == 2
    assert f"--port {port} cannot be listened on" in capsys.readouterr().err


def test_a_model_without_a_first_token_is_compiled_before_it_is_announced(tmp_path, monkeypatch):
    """As Qwen 3 has none; the request that compiles must not fail unseen."""
    import asyncio

    from sst_jax.data.tokenizer import ByteTokenizer
    from sst_jax.serving import app, queue

    jobs = []
    monkeypatch.setattr(ByteTokenizer, "bos_id", None)
    monkeypatch.setattr(app.Server, "serve", lambda self, sockets: asyncio.sleep(0))
    original = queue.answers
    monkeypatch.setattr(queue, "answers", lambda *args: jobs.extend(original(*args)) or jobs)
    arguments = ["--model", "random:tiny", "--port", "0", "--rows", "1", "--context", "512"]
    assert run(serve.main, arguments) == 0
    (job,) = jobs
    assert job.error is None
    assert job.answer.tokens
    monkeypatch.setattr(ByteTokenizer, "eos_id", None)
    assert run(serve.main, arguments) == 1
