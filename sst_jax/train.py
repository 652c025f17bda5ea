"""Trains LoRA and a state stream on a frozen backbone.

  python -m sst_jax.train --config configs/quickstart.py --workdir runs/quickstart
  python -m sst_jax.train --config configs/sst.py:size=1b --config.data.path=DIR --workdir runs/1b
  python -m sst_jax.train --config configs/statetrack.py --workdir runs/s3      (tiny models from scratch)

The same command on the same folder goes on where it stopped, to the same numbers. Ctrl-C, SIGTERM and SIGUSR1 save
first; a step whose loss or gradient is not finite is skipped, and train.max_skipped such in a row end the run.
From scratch nothing is saved before an arm is done: --stop-within and --stall-minutes do nothing there.
"""

from __future__ import annotations

import functools
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sst_jax.console.command import Parser, run, write_json
from sst_jax.errors import InputError, RunInterrupted


def parser() -> Parser:
    parser = Parser(prog="python -m sst_jax.train", description=__doc__)
    parser.add_argument("--config", required=True, metavar="FILE", help="a recipe, such as configs/quickstart.py")
    parser.takes_overrides()
    parser.add_argument("--workdir", metavar="DIR", help="run folder (default: runs/NAME-OF-RECIPE)")
    parser.add_argument("--json", metavar="FILE", help="write the summary here too (always in DIR/result.json)")
    parser.add_argument(
        "--stop-within",
        type=float,
        default=0.0,
        metavar="S",
        help="after SIGTERM, SIGINT or SIGUSR1 end in S seconds, saved or not (default: as long as the save takes)",
    )
    parser.add_argument(
        "--stall-minutes",
        type=float,
        default=15.0,
        metavar="M",
        help="say so and write DIR/stall.txt when no step has finished for M minutes, 0: never (default: %(default)g)",
    )
    return parser


def main(argv: Sequence[str]) -> None:
    args, overrides = parser().parse_with_overrides(argv)

    import jax

    from sst_jax.model.sharding import make_mesh
    from sst_jax.training import distributed
    from sst_jax.training import recipe as recipes
    from sst_jax.training.watchdog import Watch

    watch = Watch(args.stop_within, args.stall_minutes)
    recipe_config = recipes.read(args.config, overrides)
    name = Path(args.config.split(":")[0]).stem
    workdir = Path(args.workdir or f"runs/{name}")
    if "kind" in recipe_config:
        from sst_jax.lab.studies import scratch_study

        result = scratch_study.run(recipe_config, workdir)
    else:
        recipe = recipes.resolve(recipe_config)
        distributed.initialize_distributed(recipe.mesh)
        with jax.set_mesh(make_mesh(recipe.mesh)), distributed.quiet_non_primary():
            result = train(recipe, recipes.recorded(recipe_config), workdir, watch)
    if args.json and distributed.is_primary():
        write_json(args.json, result)


def train(recipe: Any, recipe_json: dict[str, Any], workdir: Path, watch: Any = None) -> dict[str, Any]:
    """One run, from the folder as it is to the last step. Returns the summary that result.json holds.

    `watch` is a `training.watch.Watch`, None: its defaults.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np

    from sst_jax.console.progress import bar, print_line
    from sst_jax.data.loader import fixed_batches, prepare, rows
    from sst_jax.inference.model import Model, count
    from sst_jax.model import decoder, kernels, sharding
    from sst_jax.model.config import ModelConfig
    from sst_jax.model.state import alpha_summary
    from sst_jax.training.distributed import is_primary
    from sst_jax.training.figures import learning_curve
    from sst_jax.training.optimizer import make_optimizer
    from sst_jax.training.problems import split_problems
    from sst_jax.training.recipe import with_attention_kernel
    from sst_jax.training.run import RunFolder, check_recipe
    from sst_jax.training.step import (
        ForwardConfig,
        TrainState,
        alpha_warmup_fraction_at,
        batch_losses,
        init_state,
        train_step,
    )
    from sst_jax.training.watchdog import StallWatchdog, StopSignals, Watch
    from sst_jax.weights.checkpoint import Checkpoints
    from sst_jax.weights.loading import open_model

    # Everything that can be wrong with the input shows before the first long computation.
    mesh = jax.sharding.get_mesh()
    sharding.check(mesh, batch_size=recipe.data.batch_size)
    check_recipe(workdir, recipe_json)
    problems, heldout_problems = split_problems(recipe.data, recipe.seed)
    opened = open_model(recipe.model, recipe.dtype, recipe.quantize)
    if opened.config.stream is not None or opened.config.adapter.rank:
        raise InputError(f"model.source={recipe.model} already has a stream or adapter: train from its plain base")
    config = ModelConfig(opened.config.backbone, recipe.stream, recipe.adapter)
    sharding.check(mesh, config.backbone)
    if not jax.tree.leaves({k: v for k, v in decoder.abstract_params(config).items() if k != "base"}):
        raise InputError("nothing to train: the stream is off or has a fixed alpha, and adapter.rank is 0")
    if recipe.stream is not None and recipe.stream.initial == "skip_bos" and opened.tokenizer.bos_id is None:
        raise InputError(f"stream.initial='skip_bos': the vocabulary of {recipe.model} has no BOS")
    recipe = with_attention_kernel(recipe, functools.partial(kernels.here, head_dim=config.backbone.head_dim))
    tokenizer, base = opened.tokenizer, opened.params["base"]
    data = recipe.data
    examples = prepare(problems, tokenizer, data.length, data.format, data.overlong)
    heldout = prepare(heldout_problems, tokenizer, data.length, data.format, data.overlong)

    run_config = {"recipe": recipe_json, "model_config": config.to_dict()}
    base_facts = {name: opened.provenance[name] for name in ("path", "digest", "dtype", "kind", "quantize")}
    folder = RunFolder(workdir, run_config, base_facts, writes=is_primary())
    try:
        # 1. State: fresh, then overwritten by the newest good checkpoint where there is one.
        key = jax.random.key(recipe.seed)
        dropout_key = jax.random.fold_in(key, 2**31)  # a branch that `init_params`, which splits the key, does not take
        fresh = jax.jit(lambda key: {k: v for k, v in decoder.init_params(config, key).items() if k != "base"})(key)
        optimizer = make_optimizer(recipe.optimizer, recipe.steps)
        # Placed as a restored state is, or a resumed run would compile its step anew.
        state = sharding.device_put_sharded(init_state(fresh, optimizer))
        places = sharding.shardings(mesh, state)
        iterator = rows(
            examples,
            length=data.length,
            batch_size=data.batch_size,
            seed=recipe.seed,
            pack=data.pack,
            pad_id=tokenizer.pad_id,
        )
        checkpoints = Checkpoints(workdir, recipe.keep)
        step, meta = checkpoints.latest_good() or 0, {"heldout": {}, "seconds": 0.0, "skipped": 0, "in_a_row": 0}
        if step:
            trainable, optimizer_state, saved = checkpoints.restore(step, state.trainable, state.optimizer, iterator)
            meta |= saved
            state = sharding.device_put_sharded(TrainState(jnp.int32(step), trainable, optimizer_state))
        unfinished = meta.pop("unfinished", None)  # the metrics of a step that was saved before it was evaluated
        folder.start_log(step + 1 if step and unfinished is None else step)
        watch = watch or Watch()
        stop, stalls = StopSignals(watch.stop_within), StallWatchdog(workdir, watch.stall_minutes)

        # 2. The compiled functions: the step (one for each number of passes that is drawn), and the held-out losses.
        @functools.cache
        def train_fn(settings: ForwardConfig) -> Any:
            step = functools.partial(train_step, config, settings, optimizer, tokenizer.bos_id)
            options = kernels.compiler_options(jax.default_backend())
            return jax.jit(step, donate_argnums=(0,), out_shardings=(places, None), compiler_options=options or None)

        eval_fn = jax.jit(functools.partial(batch_losses, config, recipe.heldout_forward, bos_id=tokenizer.bos_id))
        eval_batches = fixed_batches(
            heldout, length=data.length, batch_size=data.batch_size, pack=data.pack, pad_id=tokenizer.pad_id
        )

        def heldout_loss(state: TrainState) -> float | None:
            """None where a signal to stop comes first."""
            total, tokens = 0.0, 0
            with bar(len(eval_batches), "held-out loss", "batch") as meter:
                for batch in eval_batches:
                    arrays = {name: value for name, value in batch.items() if name != "ids"}
                    total += float(eval_fn(base, state.trainable, sharding.device_put_sharded(arrays)).sum())
                    tokens += int(batch["answer_mask"].sum())
                    meter.update()
                    stalls.beat()
                    if stop.now():
                        return None
            return total / tokens

        print_line(
            f"{Path(recipe.model).name}: {config.backbone.num_params / 1e6:,.0f}M frozen parameters, training "
            f"{count(fresh['adapter']):,} of LoRA and {count(fresh['blend']):,} of the stream "
            f"({recipe.forward.forward}, {recipe.dtype}) on {len(examples):,} examples of {data.name}; "
            f"{len(heldout)} held out" + (f"; resuming at step {step}" if step else "")
        )
        if step == 0:
            meta["heldout"]["0"] = heldout_loss(state)
            if not math.isfinite(meta["heldout"]["0"]):
                raise InputError(
                    f"model.source={recipe.model} has a held-out loss that is not finite before any training: its "
                    f"weights are damaged, or overflow in model.dtype={recipe.dtype}"
                )
            folder.log(0, {"heldout_loss": meta["heldout"]["0"]})
            print_line(f"step 0: held-out loss {meta['heldout']['0']:.4f}")

        # 3. The loop.
        started, seconds_before = time.monotonic(), meta["seconds"]

        def finish(step: int, metrics: dict[str, float], saved: bool = False) -> None:
            """What comes after a step: held-out loss, log, checkpoint, each where it is due; raises Stopped.

            saved: its checkpoint is there, and stays as it is: to write it again would put the newest good one at risk.
            """
            last = step == recipe.steps
            due = last or step % recipe.eval_every == 0
            loss = heldout_loss(state) if due and not stop.now() else None
            if due and loss is None:
                meta["unfinished"] = metrics  # for the run that goes on: now there is only time to save
            elif due:
                if not math.isfinite(loss):
                    raise RunInterrupted(f"step {step}: the held-out loss is not finite; {recover()}")
                metrics["heldout_loss"] = meta["heldout"][str(step)] = loss
                print_line(
                    f"step {step}: loss {metrics['loss']:.4f}, held-out loss {loss:.4f}, "
                    f"{metrics['tokens_per_second']:.0f} tokens/s"
                )
            stopping = stop.now()
            if "unfinished" not in meta and (step % recipe.log_every == 0 or due):
                alphas = alpha_summary(config.stream, state.trainable["blend"], alpha_warmup_fraction_at(config, state))
                folder.log(step, metrics | alphas)
            if not saved and (step % recipe.save_every == 0 or last or stopping):
                meta["seconds"] = seconds_before + time.monotonic() - started
                folder.check_there()
                checkpoints.save(step, state.trainable, state.optimizer, iterator, meta)
            if stopping and not (last and "unfinished" not in meta):
                raise RunInterrupted(f"stopped by {stop.requested} and saved at step {step}; the same command goes on")

        def recover() -> str:
            return (
                f"the newest good checkpoint is {checkpoints.latest_good() or 'the beginning'}. The same command would "
                "come here again: lower optimizer.learning_rate, or look at the data, in another --workdir"
            )

        with stop, stalls.watching(), bar(recipe.steps, "training", "step", initial=step) as meter:
            if unfinished is not None:
                finish(step, unfinished, saved=True)
            while step < recipe.steps:
                before = time.monotonic()
                batch = next(iterator)
                rows_here = sharding.device_put_sharded(batch)
                state, metrics = train_fn(recipe.forward.at(step, recipe.seed))(state, base, rows_here, dropout_key)
                metrics = {name: float(value) for name, value in metrics.items()}
                step += 1
                real = int(np.count_nonzero(batch["segment_ids"]))
                metrics["tokens_per_second"] = real / (time.monotonic() - before)
                stalls.beat()
                meter.update()
                meter.set_postfix(loss=f"{metrics['loss']:.3f}", tok_s=f"{metrics['tokens_per_second']:.0f}")
                meta["in_a_row"] = meta["in_a_row"] + 1 if metrics["skipped"] else 0
                if metrics["skipped"]:
                    meta["skipped"] += 1
                    kept = folder.keep_batch(step, batch, recipe.max_skipped)
                    what = f"step {step}: loss, gradient or update is not finite; its batch is kept in {kept}"
                    if meta["in_a_row"] == recipe.max_skipped:
                        raise RunInterrupted(f"{what}. So were {recipe.max_skipped} in a row; {recover()}")
                    print_line(f"{what}, and the step is skipped")
                finish(step, metrics)

        # 4. What the run came to.
        result = summary(recipe, meta, step)
        model = Model(config, {"base": base, **state.trainable}, tokenizer, opened.provenance)
        result["samples"] = samples(model, heldout_problems[0], data.format, recipe)
        if not is_primary():
            return result
        with (workdir / "samples.jsonl").open("w") as file:
            file.writelines(json.dumps(sample) + "\n" for sample in result["samples"])
        figure = learning_curve(workdir, f"{config.backbone.family}, {recipe.forward.forward}")
        result |= {"figure": str(figure), "checkpoint": str(workdir / "checkpoints" / str(step))}
        write_json(workdir / "result.json", result)
        report(result, workdir, config.stream is not None)
        return result
    finally:
        folder.close()


def summary(recipe: Any, meta: dict[str, Any], step: int) -> dict[str, Any]:
    losses = {int(at): loss for at, loss in meta["heldout"].items()}
    return {
        "steps": step,
        "forward": recipe.forward.forward,
        "heldout_forward": recipe.heldout_forward.forward,
        "heldout_loss": {str(at): losses[at] for at in sorted(losses)},
        "heldout_before": losses[0],
        "heldout_after": losses[step],
        "skipped": meta["skipped"],
        "seconds": meta["seconds"],
    }


def samples(model: Any, problem: Any, format: str, recipe: Any) -> list[dict[str, Any]]:
    """The model's answers to one held-out problem, at depths 1 and 4 where it has a stream."""
    from sst_jax.data.prompts import prompt_tokens

    depths = [1, 4] if model.config.stream else [1]
    prompt = prompt_tokens(problem.question, model.tokenizer, format)
    answers = model.generate([prompt] * len(depths), depth=depths, max_new_tokens=recipe.sample_tokens)
    return [
        {"question": problem.question, "expected": problem.result, "depth": answer.depth, "answer": answer.text}
        for answer in answers
    ]


def report(result: dict[str, Any], workdir: Path, streaming: bool) -> None:
    before, after = result["heldout_before"], result["heldout_after"]
    print(f"\nheld-out loss ({result['heldout_forward']}): {before:.4f} -> {after:.4f} in {result['seconds']:.0f} s")
    if result["skipped"]:
        print(f"{result['skipped']} of {result['steps']} steps were skipped; batches: {workdir / 'bad_batches'}")
    print(f"learning curve: {result['figure']}")
    sample = result["samples"][0]
    print(f"\nQ: {sample['question']}\n(expected {sample['expected']})")
    for sample in result["samples"]:
        print(f"depth {sample['depth']}: {sample['answer'].strip()}")
    depth = " --depth 4" if streaming else ""
    print("\nnext:")
    print(
        f'  python -m sst_jax.generate --model {workdir}{depth} --question "Ann has 3 boxes of 4 pens. How many pens?"'
    )
    print(f"  python -m sst_jax.export --from {workdir} --to {workdir}-merged --format merged")


if __name__ == "__main__":
    sys.exit(run(main))
