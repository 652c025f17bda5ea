"""Trains LoRA and a state stream on a frozen backbone.

  python -m sst_jax.train --config configs/quickstart.py --workdir runs/quickstart
  python -m sst_jax.train --config configs/sst.py:size=1b --config.data.path=DIR --workdir runs/1b

The same command on the same folder goes on where it stopped, to the same numbers. Ctrl-C and SIGTERM save first.
"""

from __future__ import annotations

import functools
import json
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sst_jax.console.command import Parser, Stopped, run, write_json
from sst_jax.errors import InputError


def parser() -> Parser:
    parser = Parser(prog="python -m sst_jax.train", description=__doc__)
    parser.add_argument("--config", required=True, metavar="FILE", help="a recipe, such as configs/quickstart.py")
    parser.add_argument("--config.KEY", metavar="VALUE", help="override a knob of the recipe: --config.train.steps=200")
    parser.add_argument("--workdir", metavar="DIR", help="run folder (default: runs/NAME-OF-RECIPE)")
    parser.add_argument("--json", metavar="FILE", help="write the summary here too (always in DIR/result.json)")
    return parser


def main(argv: Sequence[str]) -> None:
    # A known flag may not be mistaken for an override, nor the other way round.
    overrides = [argument for argument in argv if argument.startswith("--config.")]
    args = parser().parse_args([argument for argument in argv if argument not in overrides])

    from sst_jax.training import recipe as recipes

    recipe_config = recipes.read(args.config, overrides)
    recipe = recipes.resolve(recipe_config)
    name = Path(args.config.split(":")[0]).stem
    workdir = Path(args.workdir or f"runs/{name}")
    result = train(recipe, json.loads(recipe_config.to_json_best_effort()), workdir)
    if args.json:
        write_json(args.json, result)


def train(recipe: Any, recipe_json: dict[str, Any], workdir: Path) -> dict[str, Any]:
    """One run, from the folder as it is to the last step. Returns the summary that result.json holds."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from sst_jax.console.progress import bar, say
    from sst_jax.data.loader import fixed_batches, prepare, rows
    from sst_jax.inference.model import Model, count
    from sst_jax.model import decoder, kernels
    from sst_jax.model.config import ModelConfig
    from sst_jax.model.state import alpha_summary
    from sst_jax.training.figures import learning_curve
    from sst_jax.training.optimizer import make_optimizer
    from sst_jax.training.problems import split_problems
    from sst_jax.training.recipe import placed
    from sst_jax.training.run import RunFolder, check_recipe
    from sst_jax.training.step import ForwardConfig, TrainState, batch_losses, init_state, train_step
    from sst_jax.weights.checkpoint import Checkpoints
    from sst_jax.weights.models import open_model

    # Everything that can be wrong with the input shows before the first long computation.
    check_recipe(workdir, recipe_json)
    problems, heldout_problems = split_problems(recipe.data, recipe.seed)
    opened = open_model(recipe.model, recipe.dtype, recipe.quantize)
    if opened.config.stream is not None or opened.config.adapter.rank:
        raise InputError(f"model.source={recipe.model} already has a stream or adapter: train from its plain base")
    config = ModelConfig(opened.config.backbone, recipe.stream, recipe.adapter)
    recipe = placed(recipe, functools.partial(kernels.here, head_dim=config.backbone.head_dim))
    tokenizer, base = opened.tokenizer, opened.params["base"]
    data = recipe.data
    examples = prepare(problems, tokenizer, data.length, data.format, data.overlong)
    heldout = prepare(heldout_problems, tokenizer, data.length, data.format, data.overlong)

    run_config = {"recipe": recipe_json, "model_config": config.to_dict()}
    base_facts = {name: opened.facts[name] for name in ("path", "digest", "dtype", "kind", "quantize")}
    folder = RunFolder(workdir, run_config, base_facts)
    try:
        # 1. State: fresh, then overwritten by the newest good checkpoint where there is one.
        key = jax.random.key(recipe.seed)
        fresh = jax.jit(lambda key: {k: v for k, v in decoder.init_params(config, key).items() if k != "base"})(key)
        if not jax.tree.leaves(fresh):
            raise InputError("nothing to train: the stream is off or has a fixed alpha, and adapter.rank is 0")
        optimizer = make_optimizer(recipe.optimizer, recipe.steps)
        # Placed as a restored state is, or a resumed run would compile its step anew.
        state = jax.device_put(init_state(fresh, optimizer), jax.devices()[0])
        iterator = rows(
            examples, length=data.length, batch_size=data.batch_size, seed=recipe.seed, pack=data.pack,
            pad_id=tokenizer.pad_id,
        )  # fmt: skip
        checkpoints = Checkpoints(workdir, recipe.keep)
        step, meta = checkpoints.latest_good() or 0, {}
        if step:
            trainable, optimizer_state, meta = checkpoints.restore(step, state.trainable, state.optimizer, iterator)
            state = jax.device_put(TrainState(jnp.int32(step), trainable, optimizer_state), jax.devices()[0])
        folder.start_log(step)

        # 2. The compiled functions: the step (one for each number of passes that is drawn), and the held-out losses.
        @functools.cache
        def train_fn(settings: ForwardConfig) -> Any:
            step = functools.partial(train_step, config, settings, optimizer, tokenizer.bos_id)
            options = kernels.compiler_options(jax.default_backend())
            return jax.jit(step, donate_argnums=(0,), compiler_options=options or None)

        eval_fn = jax.jit(functools.partial(batch_losses, config, recipe.heldout_forward, bos_id=tokenizer.bos_id))
        eval_batches = fixed_batches(
            heldout, length=data.length, batch_size=data.batch_size, pack=data.pack, pad_id=tokenizer.pad_id
        )

        def heldout_loss(state: TrainState) -> float:
            total, tokens = 0.0, 0
            with bar(len(eval_batches), "held-out loss", "batch") as meter:
                for batch in eval_batches:
                    arrays = {name: value for name, value in batch.items() if name != "ids"}
                    total += float(eval_fn(base, state.trainable, arrays).sum())
                    tokens += int(batch["answer_mask"].sum())
                    meter.update()
            return total / tokens

        say(
            f"{Path(recipe.model).name}: {config.backbone.num_params / 1e6:,.0f}M frozen parameters, training "
            f"{count(fresh['adapter']):,} of LoRA and {count(fresh['blend']):,} of the stream "
            f"({recipe.forward.forward}, {recipe.dtype}) on {len(examples):,} examples of {data.name}; "
            f"{len(heldout)} held out" + (f"; resuming at step {step}" if step else "")
        )
        if step == 0:
            meta = {"heldout": {"0": heldout_loss(state)}, "seconds": 0.0}
            folder.log(0, {"heldout_loss": meta["heldout"]["0"]})
            say(f"step 0: held-out loss {meta['heldout']['0']:.4f}")

        # 3. The loop.
        started, seconds_before = time.monotonic(), meta["seconds"]

        def save(step: int) -> None:
            meta["seconds"] = seconds_before + time.monotonic() - started
            checkpoints.save(step, state.trainable, state.optimizer, iterator, meta)

        with stop_signals() as stop, bar(recipe.steps, "training", "step", initial=step) as meter:
            while step < recipe.steps:
                before = time.monotonic()
                batch = next(iterator)
                state, metrics = train_fn(recipe.forward.at(step, recipe.seed))(state, base, batch, key)
                metrics = {name: float(value) for name, value in metrics.items()}
                step += 1
                real = int(np.count_nonzero(batch["segment_ids"]))
                metrics["tokens_per_second"] = real / (time.monotonic() - before)
                meter.update()
                meter.set_postfix(loss=f"{metrics['loss']:.3f}", tok_s=f"{metrics['tokens_per_second']:.0f}")
                last = step == recipe.steps
                if step % recipe.eval_every == 0 or last:
                    metrics["heldout_loss"] = meta["heldout"][str(step)] = heldout_loss(state)
                    say(
                        f"step {step}: loss {metrics['loss']:.4f}, held-out loss {metrics['heldout_loss']:.4f}, "
                        f"{metrics['tokens_per_second']:.0f} tokens/s"
                    )
                if step % recipe.log_every == 0 or "heldout_loss" in metrics:
                    folder.log(step, metrics | alpha_summary(config.stream, state.trainable["blend"]))
                if step % recipe.save_every == 0 or last or stop.requested:
                    save(step)
                if stop.requested and not last:
                    raise Stopped(f"stopped by {stop.requested} and saved at step {step}; the same command goes on")

        # 4. What the run came to.
        result = summary(recipe, meta, step)
        figure = learning_curve(workdir, f"{config.backbone.family}, {recipe.forward.forward}")
        model = Model(config, {"base": base, **state.trainable}, tokenizer, opened.facts)
        result["samples"] = samples(model, heldout_problems[0], data.format, recipe, workdir)
        result |= {"figure": str(figure), "checkpoint": str(workdir / "checkpoints" / str(step))}
        write_json(workdir / "result.json", result)
        report(result, workdir, config.stream is not None)
        return result
    finally:
        folder.close()


class stop_signals:
    """Within this block SIGINT and SIGTERM set `requested` to the signal's name; a second SIGINT interrupts at once."""

    requested: str | None = None

    def __enter__(self) -> stop_signals:
        def note(number: int, frame: Any) -> None:
            if self.requested and number == signal.SIGINT:
                raise KeyboardInterrupt
            self.requested = signal.Signals(number).name

        self._before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def summary(recipe: Any, meta: dict[str, Any], step: int) -> dict[str, Any]:
    losses = {int(at): loss for at, loss in meta["heldout"].items()}
    return {
        "steps": step,
        "forward": recipe.forward.forward,
        "heldout_forward": recipe.heldout_forward.forward,
        "heldout_loss": {str(at): losses[at] for at in sorted(losses)},
        "heldout_before": losses[0],
        "heldout_after": losses[step],
        "seconds": meta["seconds"],
    }


def samples(model: Any, problem: Any, format: str, recipe: Any, workdir: Path) -> list[dict[str, Any]]:
    """The model's answers to one held-out problem, at depths 1 and 4 where it has a stream."""
    from sst_jax.data.prompts import prompt_tokens

    depths = [1, 4] if model.config.stream else [1]
    prompt = prompt_tokens(problem.question, model.tokenizer, format)
    answers = model.generate([prompt] * len(depths), depth=depths, max_new_tokens=recipe.sample_tokens)
    found = [
        {"question": problem.question, "expected": problem.result, "depth": answer.depth, "answer": answer.text}
        for answer in answers
    ]
    with (workdir / "samples.jsonl").open("w") as file:
        file.writelines(json.dumps(sample) + "\n" for sample in found)
    return found


def report(result: dict[str, Any], workdir: Path, streaming: bool) -> None:
    before, after = result["heldout_before"], result["heldout_after"]
    print(f"\nheld-out loss ({result['heldout_forward']}): {before:.4f} -> {after:.4f} in {result['seconds']:.0f} s")
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
