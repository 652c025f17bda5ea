"""The server under many clients at once: is every answer the right one, and does its memory stay where it was?

    python benchmarks/load.py                                      30 minutes on a tiny model of the tests
    python benchmarks/load.py --model runs/quickstart --minutes 5

Sixteen clients take rounds of 200 requests: completions and chats, whole and streamed, of texts, token ids and batches,
with log-probabilities, at several depths; keys that are right, wrong and missing; bodies that are no request; clients
that leave before, in and after their body or in the middle of a stream, and clients that read slowly. All are seeded:
an answer is right where it equals what the server said to the same request while nobody else was there. A request is
lost where it gets no answer, another one, or another status. The server is a process of its own, whose resident memory,
threads and open files are read once a minute.
"""

from __future__ import annotations

import http.client
import json
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from sst_jax.console.command import Parser, run, write_json
from sst_jax.errors import InputError

KEY = "sk-of-the-load-test"
TINY = str(Path(__file__).parents[1] / "tests/fixtures/v0_1_0/merged")
ROUND = 200
SAMPLE_MINUTES = 1.0
TIMEOUT = 600.0  # seconds without a byte after which an answer is lost; a request may wait for its row


class Case(NamedTuple):
    """A request: how its client behaves, and the status that it must get; 0: it does not wait for one."""

    kind: str
    path: str
    body: bytes
    key: str | None
    behave: str
    status: int


def parser() -> Parser:
    parser = Parser(prog="python benchmarks/load.py", description=__doc__)
    parser.add_argument("--model", default=TINY, metavar="MODEL", help="default: a tiny one of the tests")
    parser.add_argument(
        "--minutes", type=float, default=30.0, metavar="M", help="default: 30; at least one round is run"
    )
    parser.add_argument("--clients", type=int, default=16, metavar="N", help="default: %(default)s")
    parser.add_argument("--rows", type=int, default=8, metavar="N", help="the server's (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write the counts and the memory by minute to FILE")
    return parser


def cases() -> list[Case]:
    """Return the 200 requests of a round."""
    return [case(number) for number in range(ROUND)]


def case(number: int) -> Case:
    """Return one request; of ten, seven are answered, and three are refused or do not wait for their answer."""
    rng = random.Random(number)
    kind = ("whole", "stream", "chat", "chat stream", "slow", "batch", "scored", "refused", "left", "left")[number % 10]
    text = f"question {number}: " + "ab " * rng.randrange(8)
    body: dict[str, Any] = {
        "max_tokens": rng.randrange(1, 40), "temperature": rng.choice([0, 0.8]), "seed": number,
        "depth": rng.choice([1, 2, 4, "until_stable:0.05:4"]),
    }  # fmt: skip
    body |= {"messages": [{"role": "user", "content": text}]} if "chat" in kind else {"prompt": text}
    path = "/v1/chat/completions" if "chat" in kind else "/v1/completions"
    key, behave, status = KEY, "wait", 200
    if kind in ("stream", "chat stream", "slow"):
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    if kind == "slow":
        behave, body["max_tokens"] = "slow", 200
    elif kind == "batch":
        body |= {"prompt": [[1 + number % 50, 2, 3], [4, 5, 6 + number % 50]], "n": 2}
    elif kind == "scored":
        body |= {"logprobs": 5, "echo": True, "depth": 1 + number // 10 % 3}
    elif kind == "refused":
        key, status, body = _refusal(number // 10, body)
    elif kind == "left":
        behave, status = ("head", "body", "stream", "waiting")[number // 10 % 4], 0
        body |= {"stream": behave == "stream", "max_tokens": 400}
    return Case(kind, path, json.dumps(body).encode(), key, behave, status)


def _refusal(which: int, body: dict[str, Any]) -> tuple[str | None, int, dict[str, Any]]:
    """Return (key, status, body) of a request that is refused."""
    return (
        ("sk-wrong", 401, body),
        (None, 401, body),
        (KEY, 400, {**body, "temperature": -1}),
        (KEY, 404, {**body, "model": "another"}),
        (KEY, 400, {**body, "tools": [{"type": "function"}]}),
    )[which % 5]


def ask(port: int, one: Case) -> str:
    """Send one request as its client behaves and return what identifies its answer; "" where it does not wait.

    Raises: OSError, http.client.HTTPException or ValueError where the answer is not whole or not the right status.
    """
    with socket.socket() as connection:
        connection.settimeout(TIMEOUT)
        if one.behave == "slow":  # before it connects, or the server would be told of a larger window
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", port))
        key = f"Authorization: Bearer {one.key}\r\n" if one.key else ""
        head = f"POST {one.path} HTTP/1.1\r\nHost: x\r\n{key}Content-Length: {len(one.body)}\r\n\r\n".encode()
        if one.behave == "head":
            connection.sendall(head)
            return ""
        if one.behave == "body":
            connection.sendall(head + one.body[:-5])
            return ""
        connection.sendall(head + one.body)
        if one.behave == "waiting":
            time.sleep(0.05)
            return ""
        response = http.client.HTTPResponse(connection)
        response.begin()
        if one.behave == "stream":
            response.read(200)
            return ""
        text = _slowly(response) if one.behave == "slow" else response.read().decode()
    if response.status != one.status:
        raise ValueError(f"status {response.status} for {one.status}: {text[:200]}")
    return identity(text)


def _slowly(response: http.client.HTTPResponse) -> str:
    """Read a stream in small pieces, with a pause after each."""
    parts = []
    while part := response.read(2048):
        parts.append(part)
        time.sleep(0.05)
    return b"".join(parts).decode()


def identity(text: str) -> str:
    """Return an answer without its id and time. Raises: ValueError where a stream does not end."""
    if text.startswith("data: ") and not text.endswith("data: [DONE]\n\n"):
        raise ValueError("the stream breaks off")
    events = [event.removeprefix("data: ") for event in text.split("\n\n") if event] if "data: " in text[:6] else [text]
    parsed = [json.loads(event) for event in events if event != "[DONE]"]
    if len(parsed) == 1:
        return json.dumps({name: value for name, value in parsed[0].items() if name not in ("id", "created")})
    # How a stream is cut depends on who else is there; what it says does not.
    words: dict[int, list[str]] = {}
    for choice in (choice for event in parsed for choice in event["choices"]):
        words.setdefault(choice["index"], []).append(choice.get("text") or choice.get("delta", {}).get("content") or "")
        if choice["finish_reason"]:
            words[choice["index"]].append(f" [{choice['finish_reason']}]")
    return json.dumps([{index: "".join(parts) for index, parts in words.items()}, parsed[-1].get("usage")])


class Server:
    """`sst-jax serve` in a process of its own."""

    def __init__(self, model: str, rows: int):
        command = [sys.executable, "-m", "sst_jax.serve", "--model", model, "--port", "0", "--rows", str(rows)]
        command += ["--context", "512", "--waiting", "1000", "--api-key", KEY, "--no-request-log"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        announced = re.search(r"http://127\.0\.0\.1:(\d+)/", line)
        if announced is None:
            raise InputError(f"{model} cannot be served")
        self.port = int(announced[1])

    def resources(self) -> dict[str, int]:
        """Return resident MiB, threads and open files (Linux)."""
        folder = Path(f"/proc/{self.process.pid}")
        fields = dict(line.split(":", 1) for line in (folder / "status").read_text().splitlines())
        return {
            "rss_mib": int(fields["VmRSS"].split()[0]) // 1024,
            "threads": int(fields["Threads"]),
            "files": len(list((folder / "fd").iterdir())),
        }

    def health(self) -> dict[str, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=TIMEOUT)
        connection.request("GET", "/health")
        return json.loads(connection.getresponse().read())

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(TIMEOUT)


def storm(
    ask_one: Callable[[Case], str], known: dict[Case, str], clients: int, until: float
) -> tuple[Counter, list[str]]:
    """Run rounds of all cases, shuffled, until a time; return (requests by kind, what was lost)."""
    counts: Counter = Counter()
    lost: list[str] = []
    lock = threading.Lock()

    def one(case: Case) -> None:
        try:
            answer = ask_one(case)
            wrong = None if answer == known.get(case, "") else f"another answer: {answer[:300]}"
        except (OSError, http.client.HTTPException, ValueError) as error:
            wrong = f"{type(error).__name__}: {error}"
        with lock:
            counts[case.kind] += 1
            if wrong:
                lost.append(f"{case.kind} ({case.behave}): {wrong}")

    order, rng = list(cases()), random.Random(0)
    while True:
        rng.shuffle(order)
        with ThreadPoolExecutor(clients) as pool:
            list(pool.map(one, order))
        counts["rounds"] += 1
        if time.monotonic() >= until:
            return counts, lost


def main(argv: Sequence[str]) -> None:
    args = parser().parse_args(argv)
    server = Server(args.model, args.rows)
    try:
        figures = measure(server, args)
        figures["exit"] = server.stop()
    finally:
        if server.process.poll() is None:
            server.process.kill()
    if args.json:
        write_json(args.json, figures)
    if figures["lost"] or figures["exit"]:
        raise RuntimeError(f"{len(figures['lost'])} requests were lost, exit code {figures['exit']}")


def measure(server: Server, args: Any) -> dict[str, Any]:
    """Return counts, what was lost, and the server's resources by minute."""

    def ask_one(one: Case) -> str:
        return ask(server.port, one)

    known = {one: ask_one(one) for one in cases() if one.status}
    samples: list[dict[str, float]] = []
    over, start = threading.Event(), time.monotonic()

    def watch() -> None:
        while True:
            samples.append({"minute": round((time.monotonic() - start) / 60, 2), **server.resources()})
            print(
                "{minute:6.1f} min: {rss_mib} MiB, {threads} threads, {files} files".format(**samples[-1]), flush=True
            )
            if over.wait(60 * SAMPLE_MINUTES):
                return

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        counts, lost = storm(ask_one, known, args.clients, start + 60 * args.minutes)
    finally:
        over.set()
        watcher.join()
    load, deadline = server.health(), time.monotonic() + TIMEOUT
    while (load["running"] or load["waiting"]) and time.monotonic() < deadline:
        time.sleep(0.2)
        load = server.health()
    samples.append({"minute": round((time.monotonic() - start) / 60, 2), **server.resources()})
    rounds = counts.pop("rounds")
    print(f"{rounds} rounds, {counts.total()} requests: {dict(sorted(counts.items()))}")
    print(f"lost {len(lost)}{''.join(chr(10) + '  ' + line for line in lost[:10])}")
    memory = [samples[at]["rss_mib"] for at in (0, len(samples) // 2, -1)]
    print("resident memory {} -> {} -> {} MiB".format(*memory))
    return {"rounds": rounds, "requests": dict(counts), "lost": lost, "at the end": load, "samples": samples}


if __name__ == "__main__":
    sys.exit(run(main))
