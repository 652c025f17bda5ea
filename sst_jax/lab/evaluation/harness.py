"""Our models as a model of lm-evaluation-harness, so that any of its tasks runs at a given depth (extra `eval`).

Texts become tokens as the harness's own Hugging Face backend makes them: BOS in front, control tokens where a chat
template wrote them. Known texts are scored with the depth at every position, answers are generated with the depth from
the first new token on.
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lm_eval import simple_evaluate, utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager

from sst_jax.console.command import folder_for, write_json
from sst_jax.console.progress import bar
from sst_jax.errors import InputError
from sst_jax.files import digest, read_json
from sst_jax.inference.model import Model
from sst_jax.inference.policies import as_policy, flat
from sst_jax.inference.session import check_policy
from sst_jax.lab.evaluation import runner
from sst_jax.lab.evaluation.evaluation import check_model, fixed_date, identity
from sst_jax.lab.evaluation.scoring import Scores, score
from sst_jax.types import Json

BOOTSTRAPS = 1000  # for the few metrics whose standard error the harness finds by resampling

# It would resample in forked processes, and a fork of a process that runs JAX may hang.
os.environ.setdefault("DISABLE_MULTIPROC", "1")


class HarnessModel(TemplateLM):
    """A `Model` at one depth, for `lm_eval.simple_evaluate(model=HarnessModel(model, depth=4), ...)`."""

    max_gen_toks = 256  # where a task does not say, as in the harness's other backends

    def __init__(self, model: Model, depth: int = 1, batch_size: int = 8, max_length: int | None = None):
        """`max_length`: positions a row may have; None: as many as the backbone.

        Raises: InputError where depth needs a stream that is not there, or names no one depth.
        """
        super().__init__()
        check_policy(model.config, as_policy(depth), whole_text=True)
        self.model, self.depth, self.batch_size = model, depth, batch_size
        self.max_length = max_length or model.config.backbone.position_limit

    @property
    def eot_token_id(self) -> int:
        return self.model.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        tokenizer = self.model.tokenizer
        return tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
        return f"sst_jax-{self.model.tokenizer.digest[:16]}"

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return ids; BOS in front unless the text begins with it or `add_special_tokens` is False."""
        tokenizer = self.model.tokenizer
        ids = tokenizer.encode_rendered(string)
        wanted = tokenizer.add_bos if add_special_tokens is None else add_special_tokens
        if wanted and tokenizer.bos_id is not None and ids[:1] != [tokenizer.bos_id]:
            return [tokenizer.bos_id, *ids]
        return ids

    def chat_template(self, chat_template: bool | str = False) -> str:
        return self.model.tokenizer.conversation_template.source if chat_template else ""

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return the conversation in the model's turns; without `add_generation_prompt` its last turn is left open.

        Raises: InputError as `Tokenizer.chat`.
        """
        return self.model.tokenizer.render_chat(
            chat_history, add_generation_prompt, continue_final=not add_generation_prompt
        )

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        rows, starts = [], []
        for _, context, continuation in requests:
            row = (context + continuation)[-(self.max_length + 1) :]  # cut on the left, as the harness does
            rows.append(row)
            starts.append(len(row) - len(continuation))
        found: dict[int, Scores] = {}
        order = sorted(range(len(rows)), key=lambda index: -len(rows[index]))
        with bar(len(rows), f"log-likelihoods, depth {self.depth}", "text") as meter:
            for batch in _chunks(order, self.batch_size):
                scores = score(self.model, [rows[i] for i in batch], [starts[i] for i in batch], self.depth)
                found.update(zip(batch, scores, strict=True))
                meter.update(len(batch))
        return [(float(found[i].logprobs.sum(dtype="float64")), bool(found[i].greedy.all())) for i in range(len(rows))]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return log-likelihood of each whole text, in windows of `max_length`, each text on its own."""
        windows, owners = [], []
        for owner, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            cuts = utils.get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
            for window in map(utils.make_disjoint_window, cuts):
                windows.append((None, *window))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (loglikelihood, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += loglikelihood
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return texts up to a stop string, greedy or sampled as requested; requests of one kind share batches."""
        kinds: dict[str, list[int]] = {}
        for index, request in enumerate(requests):
            kinds.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(index)
        found: dict[int, str] = {}
        with bar(len(requests), f"answers, depth {self.depth}", "answer") as meter:
            for kind, indices in kinds.items():
                settings = normalize_gen_kwargs(json.loads(kind), self.max_gen_toks)
                room = settings["max_gen_toks"]
                if room >= self.max_length:
                    raise InputError(f"max_gen_toks={room} leaves no room for a prompt in {self.max_length} positions")
                sampling = {}
                if settings["do_sample"]:
                    sampling = {name: settings[name] for name in ("temperature", "top_p", "top_k") if name in settings}
                prompts = {i: self.tok_encode(requests[i].args[0])[-(self.max_length - room) :] for i in indices}
                for batch in _chunks(sorted(indices, key=lambda i: -len(prompts[i])), self.batch_size):
                    answers = self.model.generate(
                        [prompts[i] for i in batch],
                        depth=self.depth,
                        max_new_tokens=room,
                        stop=settings["until"],
                        seed=batch,
                        **sampling,
                    )
                    found.update(zip(batch, (answer.text for answer in answers), strict=True))
                    meter.update(len(batch))
        return [found[index] for index in range(len(requests))]


def _chunks(indices: Sequence[int], size: int) -> Iterable[list[int]]:
    return (list(indices[start : start + size]) for start in range(0, len(indices), size))


def task_manager(include: str | None) -> TaskManager:
    """Return the harness's tasks, and those described by the YAML files in the folder `include`."""
    if include is not None and not Path(include).is_dir():
        raise InputError(f"--include {include} is not a folder")
    return TaskManager(include_path=include)


def matching(manager: TaskManager, names: Sequence[str]) -> list[str]:
    """Return the tasks that names stand for: "mmlu_*" for all that begin so; a name that is none stays as it is."""
    found: list[str] = []
    for name in names:
        known = name in manager.all_tasks or not any(mark in name for mark in "*?[")
        found += [name] if known else sorted(fnmatch.filter(manager.all_tasks, name)) or [name]
    return list(dict.fromkeys(found))


def check_names(manager: TaskManager, names: Sequence[str]) -> None:
    """Raise InputError naming an unknown task and its neighbours, or a data set that cannot be read."""
    names = matching(manager, names)
    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, 3)
            raise InputError(
                f"--tasks {name} is not a task of the harness" + (f"; near it: {', '.join(near)}" * bool(near))
            )
    try:
        manager.load(list(names))
    except Exception as error:  # whatever the hub's client raises: offline, gated, missing
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"--tasks {','.join(names)}: the data cannot be read ({reason})") from error


@dataclasses.dataclass(frozen=True)
class HarnessConfig:
    """Tasks of lm-evaluation-harness, and how they are run.

    tasks       their names, or patterns of names, "mmlu_*"
    depths      iterations at every position, one run of the harness each
    format      of prompts, "plain" or "chat"; None: as the run was trained, else plain
    limit       only the first items of each task (0: all)
    fewshot     examples in front of each question; None: as the task says
    batch_size  texts scored or continued together
    include     folder with task definitions of one's own
    system      message before each prompt: the conversation's first, or plain text; None: the task's own
    """

    tasks: tuple[str, ...]
    depths: tuple[int, ...] = (1,)
    format: str | None = None
    limit: int = 0
    fewshot: int | None = None
    batch_size: int = 8
    include: str | None = None
    system: str | None = None

    def __post_init__(self) -> None:
        for name, least in (("limit", 0), ("batch_size", 1)):
            if getattr(self, name) < least:
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)} is too small")


def prepare(config: HarnessConfig, out: Path) -> TaskManager:
    """Return the harness's tasks, after checking what can be checked before a model is read.

    Raises: InputError as `task_manager` and `check_names`, and where the folder holds an evaluation of another kind.
    """
    out = folder_for("--out", out)
    if (out / runner.HEADER).is_file():
        raise InputError(f"--out {out} holds an evaluation of --task: choose another folder")
    manager = task_manager(config.include)
    check_names(manager, config.tasks)
    return manager


def run(model: Model, config: HarnessConfig, out: Path, manager: TaskManager | None = None) -> tuple[Json, Json]:
    """Run the harness's tasks at each depth into a folder; what stands there already is not computed again.

    Args:
        model: with a stream where a depth is above 1.
        config: tasks and settings.
        out: a folder that is new, empty, or holds results of the same settings, at these depths or others.
        manager: what `prepare` returned; None: it is called here.

    Returns:
        What DIR/result.json holds, at all depths that the folder has; and the results of the depths asked for.

    Raises: InputError as `prepare`, and where the folder holds results of other settings.
    """
    manager = manager or prepare(config, out)
    check_model(model, [flat(depth) for depth in config.depths])
    format = config.format or model.prompt_format
    earlier = min(out.glob("depth-*.json"), default=None)
    there = None if earlier is None else read_json(earlier).get("settings") or {}
    header = {
        "tasks": list(config.tasks),
        "model": identity(model),
        "format": format,
        **fixed_date(model.tokenizer, there, earlier or out, format),
        "limit": config.limit,
        "fewshot": config.fewshot,
        "batch_size": config.batch_size,
        "include": definitions(config.include),
        **({} if config.system is None else {"system": config.system}),
    }
    with runner.locked(out):
        found = {str(depth): measure(model, depth, config, header, manager, out) for depth in config.depths}
        # What other depths came to earlier, under the same settings, stays in the result.
        result = {**header, "policies": measured(out, header)}
        write_json(out / runner.RESULT, result)
    return result, found


def measure(model: Model, depth: int, config: HarnessConfig, header: Json, manager: TaskManager, out: Path) -> Json:
    """Return the harness's results by task at one depth, and write its samples; what `out` holds is not measured anew.

    Args:
        model: with a stream where `depth` is above 1.
        depth: iterations at every position.
        config: tasks and settings.
        header: settings as they are recorded beside the results.
        manager: the harness's tasks.
        out: folder of the results.

    Raises: InputError where `out` holds results of other settings.
    """
    there = measured(out, header)
    if str(depth) in there:
        return there[str(depth)]
    header = {**header, "depth": depth}
    found = simple_evaluate(
        model=HarnessModel(model, depth, config.batch_size),
        tasks=matching(manager, config.tasks),
        task_manager=manager,
        limit=config.limit or None,
        num_fewshot=config.fewshot,
        system_instruction=config.system,
        apply_chat_template=(config.format or model.prompt_format) == "chat",
        torch_random_seed=None,
        bootstrap_iters=BOOTSTRAPS,
    )
    results = json.loads(json.dumps(found["results"], default=utils.handle_non_serializable))
    out.mkdir(parents=True, exist_ok=True)
    for task, samples in found["samples"].items():
        with (out / f"samples-{task}-depth-{depth}.jsonl").open("w", encoding="utf-8") as lines:
            lines.writelines(json.dumps(sample, default=utils.handle_non_serializable) + "\n" for sample in samples)
    write_json(out / f"depth-{depth}.json", {"settings": header, "versions": found["versions"], "results": results})
    return results


def measured(out: Path, header: Json) -> Json:
    """Return the results that OUT already holds, by depth.

    Raises: InputError where they are of other settings.
    """
    found = {}
    for file in out.glob("depth-*.json"):
        there = read_json(file)
        settings = there.get("settings") or {}
        if settings != json.loads(json.dumps({**header, "depth": settings.get("depth")})):
            raise InputError(f"{file} holds results of other settings: choose another --out")
        found[str(settings["depth"])] = there["results"]
    return {depth: found[depth] for depth in sorted(found, key=int)}


def definitions(include: str | None) -> str | None:
    """Return the SHA-256 over the files of a folder of task definitions; it identifies the test."""
    if include is None:
        return None
    return digest(file for file in Path(include).rglob("*") if file.is_file())
