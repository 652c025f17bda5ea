"""One toy, trained from scratch under each forward: what the approximation costs in what can be learned.

    python benchmarks/toy.py                     S3 words, four forwards and plain, three seeds
    python benchmarks/toy.py --alpha-range 0.015,0.10 --alpha-init 0.027

The task is to follow a word in the permutation group S3: each token is a permutation, the label at each position is the
product so far. Every label needs the one before it, so a model without memory that is trained at one length fails
beyond it. All parameters train. Accuracy is over all positions, under the exact recurrence whatever the model was
trained with, at the training length and at two and four times that; chance is 1/6. The errors are those of the parallel
forwards' logits against `exact`, on the trained model with alpha set to 0.03.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import sys
import time
from collections.abc import Sequence
from typing import Any

from sst_jax.console.command import Parser, run, write_json

FORWARDS = "plain,two_pass,local:2,k_pass:3,exact"
PARALLEL = (("two_pass", 2), ("local", 2), ("k_pass", 3))


def parser() -> Parser:
    parser = Parser(prog="python benchmarks/toy.py", description=__doc__)
    parser.add_argument("--forwards", default=FORWARDS, metavar="F,G:K,...", help="default: %(default)s")
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=1500, metavar="N", help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=128, metavar="B", help="default: %(default)s")
    parser.add_argument("--length", type=int, default=12, metavar="T", help="default: %(default)s")
    parser.add_argument("--alpha-range", default="0,1", metavar="LO,HI", help="default: %(default)s, free")
    parser.add_argument("--alpha-init", type=float, default=0.5, metavar="A", help="default: %(default)s")
    parser.add_argument("--gain", type=float, default=1.0, metavar="G", help="factor on the state (default: 1)")
    parser.add_argument("--json", metavar="FILE", help="write the figures to FILE")
    return parser


def group() -> Any:
    """The multiplication table of S3, int32 [6, 6]: table[a, b] is "a, then b"."""
    import numpy as np

    elements = list(itertools.permutations(range(3)))
    index = {element: number for number, element in enumerate(elements)}
    table = [[index[tuple(b[i] for i in a)] for b in elements] for a in elements]
    return np.array(table, np.int32)


def words(key: Any, rows: int, length: int) -> tuple[Any, Any]:
    """Random words int32 [B, T] and the products so far, [B, T]."""
    import jax
    import jax.numpy as jnp

    table = jnp.asarray(group())
    tokens = jax.random.randint(key, (rows, length), 0, 6)

    def follow(product: Any, token: Any) -> Any:
        product = table[product, token]
        return product, product

    _, products = jax.lax.scan(follow, jnp.zeros(rows, jnp.int32), tokens.T)
    return tokens, products.T


def train(args: Any, name: str, passes: int, seed: int) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp
    import optax

    from sst_jax.model import decoder, forward
    from sst_jax.model.config import BackboneConfig, ModelConfig, StreamConfig

    backbone = BackboneConfig(
        num_layers=2, d_model=64, d_ff=128, num_heads=4, num_kv_heads=4, head_dim=16, vocab_size=6, window=64,
        query_pre_attn_scalar=16.0, layer_types=("global", "global"),
    )  # fmt: skip
    lo, hi = (float(part) for part in args.alpha_range.split(","))
    stream = StreamConfig(alpha_range=(lo, hi), alpha_init=args.alpha_init, gain=args.gain)
    config = ModelConfig(backbone, None if name == "plain" else stream)
    params = decoder.init_params(config, jax.random.key(seed))
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adam(optax.warmup_cosine_decay_schedule(0.0, 3e-3, 100, args.steps, 1e-4)),
    )

    def losses(params: Any, tokens: Any, labels: Any) -> Any:
        logits = forward.logits(config, params, tokens, forward=name, passes=passes)
        return optax.losses.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @functools.partial(jax.jit, donate_argnums=(0,))
    def steps(carry: Any, keys: Any) -> Any:
        def one(carry: Any, key: Any) -> Any:
            params, state = carry
            loss, gradient = jax.value_and_grad(losses)(params, *words(key, args.batch, args.length))
            updates, state = optimizer.update(gradient, state)
            return (optax.apply_updates(params, updates), state), loss

        return jax.lax.scan(one, carry, keys)

    started = time.monotonic()
    keys = jax.random.split(jax.random.key(1000 + seed), args.steps)
    (params, _), loss = steps((params, optimizer.init(params)), keys)
    judge = "plain" if name == "plain" else "exact"
    accuracy = []
    for times in (1, 2, 4):
        tokens, labels = words(jax.random.key(77), 512, args.length * times)
        guess = forward.logits(config, params, tokens, forward=judge).argmax(-1)
        accuracy.append(float(jnp.mean(guess == labels)))
    errors = {}
    if name != "plain":
        narrow = dataclasses.replace(config, stream=dataclasses.replace(stream, alpha=0.03))
        fixed, (tokens, _) = {**params, "blend": {}}, words(jax.random.key(78), 512, args.length * 4)
        truth = forward.logits(narrow, fixed, tokens, forward="exact")
        for kind, k in PARALLEL:
            off = forward.logits(narrow, fixed, tokens, forward=kind, passes=k) - truth
            errors[f"{kind}:{k}"] = float(jnp.linalg.norm(off) / jnp.linalg.norm(truth))
    return {
        "forward": name, "passes": passes, "seed": seed, "loss": float(loss[-50:].mean()), "accuracy": accuracy,
        "errors": errors, "seconds": time.monotonic() - started,
    }  # fmt: skip


def main(argv: Sequence[str]) -> None:
    args = parser().parse_args(argv)
    import numpy as np

    records = []
    for text in args.forwards.split(","):
        name, _, passes = text.partition(":")
        mine = [train(args, name, int(passes or 2), seed) for seed in range(args.seeds)]
        records += mine
        table = np.array([record["accuracy"] for record in mine])
        spread = "  ".join(
            f"{middle:.2f} [{low:.2f}, {high:.2f}]"
            for middle, low, high in zip(table.mean(0), table.min(0), table.max(0), strict=True)
        )
        seconds = sum(record["seconds"] for record in mine)
        errors = "  ".join(
            f"{kind} {np.mean([record['errors'][kind] for record in mine]):.1e}" for kind in mine[0]["errors"]
        )
        print(f"{text:10} accuracy at 1x, 2x, 4x, mean [range]: {spread}   {seconds:.0f} s", flush=True)
        if errors:
            print(f"{'':10} errors at alpha = 0.03: {errors}", flush=True)
    if args.json:
        write_json(args.json, {"arguments": vars(args), "records": records})


if __name__ == "__main__":
    sys.exit(run(main))
