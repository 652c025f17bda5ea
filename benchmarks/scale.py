"""What the forwards would cost at 27B on hardware that is described, not here. Estimates: nothing is executed.

    python benchmarks/scale.py lockstep                   two passes in lockstep against passes run apart: memory
    python benchmarks/scale.py crossing --figure FILE     exact and two_pass over batch sizes: time and peak
    python benchmarks/scale.py prefill                    a prompt by sweeps against token by token: roofline times

`lockstep` and `crossing` compile, half a minute a step, and need the extra cuda; `prefill` counts products from the
jaxpr and takes seconds. Times assume 40% of a card's peak arithmetic and 80% of its bandwidth: of prefill product by
product, of a compiled step by its bytes, operations and launches.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import sys
from collections.abc import Sequence
from typing import Any

from sst_jax.console.command import Parser, run, write_json

ARITHMETIC, BANDWIDTH = 0.4, 0.8  # assumed shares of the data sheet's peaks


def parser() -> Parser:
    parser = Parser(prog="python benchmarks/scale.py", description=__doc__)
    parser.add_argument("what", choices=("lockstep", "crossing", "prefill"))
    parser.add_argument("--size", default="27b", help="a preset of Gemma-3 (default: 27b)")
    parser.add_argument("--target", default="rtx-pro-6000", metavar="NAME,...", help="default: rtx-pro-6000")
    parser.add_argument("--batch", metavar="B,...", help="rows (lockstep: 4; crossing: 4 to 64)")
    parser.add_argument("--length", type=int, metavar="T", help="positions (1024, 256 and 512)")
    parser.add_argument("--sweeps", type=int, default=7, metavar="K", help="of prefill (default: 7)")
    parser.add_argument("--figure", metavar="FILE", help="crossing: draw the times into FILE, a PNG")
    parser.add_argument("--json", metavar="FILE", help="write the figures to FILE")
    return parser


def hidden_apart(
    config: Any,
    params: Any,
    tokens: Any,
    *,
    passes: int = 2,
    segment_ids: Any = None,
    remat: str = "none",
    attention: str = "xla",
) -> Any:
    """Final hidden states [B, T, D] of k_pass with its passes one after the other: every layer's states wait between.

    The published order of things, and what lockstep is measured and tested against.
    """

    from sst_jax.model import decoder
    from sst_jax.model.halves import attend
    from sst_jax.model.passes import next_pass_states, pass_once

    def one_pass(layer: Any, streams: Any, memory: Any, context: Any) -> Any:
        (x,) = streams
        h, _ = attend(layer, x, context)
        s = None if memory is None else next_pass_states(layer, x, memory, context)
        o, memory = pass_once(layer, x, h, s, context)
        return (o,), memory

    context = dataclasses.replace(decoder.row_context(config, tokens, segment_ids), attention=attention)
    embedded, memory = decoder.embed(config, params, tokens), None
    for _ in range(passes):
        (x,), memory = decoder.run_layers(params, one_pass, (embedded,), context, extras=memory, remat=remat)
    return decoder.final_norm(config, params, x)


def model_config(size: str, rank: int = 32) -> Any:
    from sst_jax.families.registry import PRESETS
    from sst_jax.model.config import AdapterConfig, ModelConfig, StreamConfig

    return ModelConfig(PRESETS[size], StreamConfig(), AdapterConfig(rank=rank), dtype="bfloat16")


def lockstep(args: Any, target: Any) -> list[dict[str, Any]]:
    """Loss and gradients of two passes, compiled both ways."""
    import jax
    import jax.numpy as jnp

    from sst_jax.lab.planning import compile as compiling
    from sst_jax.lab.planning.programs import abstract_parameters
    from sst_jax.lab.planning.targets import GIB
    from sst_jax.model import rules
    from sst_jax.model.decoder import head_table
    from sst_jax.model.sharding import MeshConfig
    from sst_jax.training.loss import answer_losses

    config, length = model_config(args.size), args.length or 1024
    attention = compiling.attention_of(target, "auto", "bfloat16", config.backbone.head_dim)
    alone = compiling.mesh_on(target, MeshConfig())
    ways = {"lockstep": functools.partial(rules.hidden, forward="two_pass"), "apart": hidden_apart}
    records = []
    for rows in batches(args, (4,)):

        def step(trainable: Any, base: Any, tokens: Any, mask: Any, way: Any, attention: str) -> Any:
            def loss(trainable: Any) -> Any:
                segment_ids, params = jnp.ones_like(tokens), {"base": base, **trainable}
                hidden = way(
                    config,
                    params,
                    tokens,
                    segment_ids=segment_ids,
                    remat="layer",
                    attention=attention,
                )
                return answer_losses(hidden, head_table(base), tokens, mask, config.backbone.logit_cap).sum()

            return jax.value_and_grad(loss)(trainable)

        def arguments(rows: int = rows) -> tuple:
            base, trainable = abstract_parameters(config, "bfloat16", "nf4")
            return trainable, base, jnp.zeros((rows, length), jnp.int32), jnp.zeros((rows, length), bool)

        for name, way in ways.items():
            real, counted = (functools.partial(step, way=way, attention=kind) for kind in (attention, "xla"))
            program = compiling.Program(real, counted, arguments, attention, donated=False)
            plan = compiling.plan_step(target, alone, program)
            records.append(
                {
                    "target": target.name,
                    "batch": rows,
                    "length": length,
                    "way": name,
                    "temporaries": plan.temporaries,
                    "peak": plan.peak,
                    "flops": plan.work.flops,
                    "compile_seconds": plan.compile_seconds,
                }
            )
            share = plan.temporaries / records[-1 - list(ways).index(name)]["temporaries"]
            print(
                f"{target.title}: {rows} x {length}, {name:8}  temporaries {plan.temporaries / GIB:6.2f} GiB "
                f"({share:.2f} of lockstep's), peak {plan.peak / GIB:6.2f} GiB, {plan.work.flops / 1e12:,.0f} TFLOP",
                flush=True,
            )
    return records


def crossing(args: Any, target: Any) -> list[dict[str, Any]]:
    """Planned times and peaks of a train step under exact and two_pass, from the programs compiled for the card."""
    import jax

    from sst_jax.lab.planning.records import plan_record
    from sst_jax.training.recipe import read_recipe
    from sst_jax.weights.loading import resolve

    found, remats = [], {"two_pass": "layer", "exact": "memories"}
    length = args.length or 256
    for rows in batches(args, (4, 8, 16, 32, 64)):
        told = []
        for name, remat in remats.items():
            knobs = {
                "stream.forward": name, "train.remat": remat, "data.batch_size": rows,
                "data.length": length, "optimizer.accumulate": 1,
            }  # fmt: skip
            recipe = read_recipe(f"configs/sst.py:size={args.size}", knobs)
            plan = plan_record(recipe, resolve(recipe.model.source).backbone, target, ARITHMETIC, phases=False)
            jax.clear_caches()
            known = {key: plan.get(key) for key in ("peak", "fits", "bytes_moved", "kernels")}
            found.append(
                {"target": target.title, "batch": rows, "length": length, "forward": name, **known}
                | {"seconds": plan.get("assumed_seconds", math.nan)}
            )
            told.append(f"{name} {found[-1]['seconds']:6.2f} s, {(plan.get('peak') or math.nan) / 2**30:5.1f} GiB")
        print(f"{target.title}: {rows:3} x {length}  {'; '.join(told)}", flush=True)
    return found


def prefill(args: Any, target: Any) -> list[dict[str, Any]]:
    """Roofline times of one prompt: sweeps as `local` with as many passes, against a decode step a token."""
    import jax
    import jax.numpy as jnp

    from sst_jax.inference import decode_state, kv_cache
    from sst_jax.lab.planning.count import count
    from sst_jax.lab.planning.programs import abstract_parameters
    from sst_jax.model import rules

    config, length = model_config(args.size), args.length or 512

    def params() -> Any:
        base, trainable = abstract_parameters(config, "bfloat16", "nf4")
        return {"base": base, **trainable}

    def sweeps(params: Any, tokens: Any) -> Any:
        return rules.hidden(config, params, tokens, forward="local", passes=args.sweeps)

    def one(params: Any, token: Any, caches: Any) -> Any:
        return decode_state.decode_step_at_depth(config, params, token, caches, jnp.ones(1, jnp.int32))

    shapes = jax.eval_shape(params)
    token = jax.ShapeDtypeStruct((1,), jnp.int32)
    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    caches = jax.eval_shape(lambda: kv_cache.init_cache(config, 1, length))
    parallel = roofline(count(jax.make_jaxpr(sweeps)(shapes, tokens)), target)
    sequential = length * roofline(count(jax.make_jaxpr(one)(shapes, token, caches), flash=False), target)
    print(
        f"{target.title}: prompt of {length}: {args.sweeps} sweeps {parallel:.2f} s, "
        f"token by token {sequential:.2f} s, {sequential / parallel:.1f} x"
    )
    return [
        {"target": target.name, "length": length, "sweeps": args.sweeps, "parallel_seconds": parallel,
         "sequential_seconds": sequential}
    ]  # fmt: skip


def roofline(work: Any, target: Any) -> float:
    return work.seconds(ARITHMETIC * target.flops, BANDWIDTH * target.bandwidth)


def batches(args: Any, default: Sequence[int]) -> list[int]:
    return [int(part) for part in args.batch.split(",")] if args.batch else list(default)


def draw(records: list[dict[str, Any]], file: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(record["target"] for record in records))
    figure, panels = pyplot.subplots(1, len(names), figsize=(4.6 * len(names), 3.6), squeeze=False)
    for panel, name in zip(panels[0], names, strict=True):
        for forward, style, colour in (("two_pass", "o-", "C0"), ("exact", "s--", "C1")):
            mine = [record for record in records if (record["target"], record["forward"]) == (name, forward)]
            panel.plot([r["batch"] for r in mine], [r["seconds"] for r in mine], style, color=colour, label=forward)
            beyond = [record for record in mine if not record["fits"]]
            if beyond:
                rows, seconds = [r["batch"] for r in beyond], [r["seconds"] for r in beyond]
                panel.plot(rows, seconds, style[0], color=colour, mfc="white", label=f"{forward}: does not fit")
        panel.set(title=name, xlabel=f"rows of {records[0]['length']} tokens", ylabel="seconds a step (estimate)")
        panel.set_ylim(0)
        panel.set_xticks(sorted({record["batch"] for record in records} - {4}))
        panel.legend()
    figure.suptitle("Gemma-3-27B in NF4: planned time of a train step")
    figure.tight_layout()
    figure.savefig(file, dpi=150)


def main(argv: Sequence[str]) -> None:
    args = parser().parse_args(argv)
    os.environ["JAX_PLATFORMS"] = "cpu"  # nothing is executed, wherever this runs
    from sst_jax.lab.planning import targets

    jobs = {"lockstep": lockstep, "crossing": crossing, "prefill": prefill}
    records = [record for name in args.target.split(",") for record in jobs[args.what](args, targets.find(name))]
    if args.figure and args.what == "crossing":
        draw(records, args.figure)
    if args.json:
        write_json(args.json, {"arguments": vars(args), "estimates": True, "records": records})


if __name__ == "__main__":
    sys.exit(run(main))
