"""Continuous batching: a fixed number of cache rows that are decoded together, and requests that come and go.

Between two chunks of decoding, waiting prompts are prefilled (no more than a prefill chunk at a time, so that running
answers do not stand still for long) and put into free rows. A prompt is prefilled alone and all rows are always decoded
together, so the shapes that an answer is computed in do not depend on who else is there, and neither do its bits.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sst_jax.errors import InputError
from sst_jax.inference.decode_state import Cache, init_cache, map_rows
from sst_jax.inference.detokenizer import Answer
from sst_jax.inference.policies import DepthBudget, Policy, depth_budget
from sst_jax.inference.prefill import CHUNK as PREFILL
from sst_jax.inference.prefill import capacity_for, padded, prefill_chunks
from sst_jax.inference.sampling import Sampling, SamplingParams, Scores, sampling_params, score
from sst_jax.inference.session import (
    DecodeState,
    SampledTokens,
    begin,
    decode_chunk,
    pick_rows,
    prompt_depth,
    prompt_mode,
)
from sst_jax.model import decoder

CHUNK = 8  # tokens between two looks at who has ended and who is waiting
TOP = 5  # likeliest tokens that come with a score
BLOCK = 64  # prompt positions whose logits over the vocabulary are in memory together


@dataclasses.dataclass(frozen=True)
class Request:
    """One answer to one prompt.

    scored         with log-probabilities of the new tokens
    prompt_scored  and of the prompt's own, all of whose positions then have the depth policy.first
    """

    tokens: tuple[int, ...]
    max_new_tokens: int
    policy: Policy
    sampling: Sampling
    seed: int = 0
    stop: tuple[str, ...] = ()
    scored: bool = False
    prompt_scored: bool = False


class Job:
    """A request on its way. `answer` grows; `error` says what went wrong; once `ended`, none of it changes any more.

    emit(text, reason) is called with every piece of new text, and with the last one why no more will come: "stop",
    "length" or "error". A reader in another thread goes by that: `answer` may be ahead of what it has been told.
    """

    def __init__(self, request: Request, answer: Answer, emit: Callable[[str, str | None], None]):
        self.request, self.answer, self.emit = request, answer, emit
        self.scores: list[Scores] = []  # one a new token
        self.prompt_scores: list[Scores] = []  # one a prompt token but the first
        self.error: str | None = None
        self.cancelled = self.ended = False


class Busy(RuntimeError):
    """Too many requests are waiting."""


class Closing(RuntimeError):
    """The engine takes no more requests."""


class Prompt(NamedTuple):
    """A prefilled prompt: the newest one is kept, for more samples of it."""

    key: tuple
    cache: Cache
    hidden: jax.Array
    scores: list[Scores]


class Engine:
    """Runs jobs in a thread of its own. All methods may be called from any thread.

    rows: answers that are decoded together. capacity: positions of each, prompt and answer; rounded up.
    waiting: requests that may wait for a row.
    """

    def __init__(self, model: Any, *, rows: int = 8, capacity: int = 4096, waiting: int = 256):
        self.model, self.rows, self.waiting = model, rows, waiting
        self.capacity = min(capacity_for(capacity), model.config.backbone.max_positions)
        self.slots = capacity_for(self.capacity)
        self.answered = self.tokens = 0  # of jobs that have ended well
        self._stop_ids = tuple(sorted(model.tokenizer.stop_ids))
        self._queue: collections.deque[Job] = collections.deque()
        self._seated: dict[int, Job] = {}
        self._filling: tuple[Job, Iterator[int]] | None = None
        self._kept: Prompt | None = None
        self._batch = self._empty()
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, requests: Sequence[Request], emit: Callable[[Job, str, str | None], None]) -> list[Job]:
        """Queues requests, all or none. `emit(job, text, reason)` is called in the engine's thread, see `Job`.

        Raises: InputError where prompt and answer exceed the capacity; Busy; Closing.
        """
        for request in requests:
            if len(request.tokens) + request.max_new_tokens > self.capacity:
                raise InputError(
                    f"a prompt of {len(request.tokens)} tokens and {request.max_new_tokens} new ones exceed this "
                    f"server's {self.capacity} positions"
                )
        jobs = []
        for request in requests:
            job = Job(request, Answer(self.model.tokenizer, request.stop), lambda text, reason: None)
            job.emit = functools.partial(emit, job)
            jobs.append(job)
        with self._changed:
            if self._closing:
                raise Closing("shutting down: no more requests are taken")
            if len(self._queue) + len(jobs) > self.waiting:
                raise Busy(f"{len(self._queue)} requests are waiting already, and {self.waiting} may")
            self._queue.extend(jobs)
            self._changed.notify()
        return jobs

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Drops jobs: their rows are free before the next chunk, their places in the queue at once."""
        for job in jobs:
            job.cancelled = True
        with self._changed:
            waiting = [job for job in self._queue if not job.cancelled]
            self._queue.clear()
            self._queue.extend(waiting)

    def close(self, seconds: float) -> bool:
        """Takes no more requests and finishes those there are, within a deadline; says whether all were finished.

        What runs or waits beyond it ends with an error.
        """
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join(seconds)
        if not self._thread.is_alive():
            return True
        with self._changed:
            filling = [self._filling[0]] if self._filling else []
            unfinished = [*self._queue, *filling, *self._seated.values()]
        for job in unfinished:
            if not job.ended:
                self._fail(job, "the server was shut down before this was finished")
        self.cancel(unfinished)
        self._thread.join()
        return False

    @property
    def closing(self) -> bool:
        return self._closing

    def load(self) -> dict[str, int]:
        """How many requests run and wait, and the rows there are."""
        return {"running": len(self._seated), "waiting": len(self._queue), "rows": self.rows}

    def _empty(self) -> DecodeState:
        """A batch of rows that have all ended."""

        def zeros(kind: str) -> jax.Array:
            return jnp.zeros(self.rows, kind)

        cache = init_cache(self.model.config, self.rows, self.slots)
        policies = DepthBudget(zeros("int32"), zeros("int32"), zeros("float32"))
        sampling = SamplingParams(zeros("float32"), zeros("int32"), zeros("float32"), zeros("uint32"))
        return DecodeState(cache, zeros("int32"), ~zeros("bool"), zeros("int32"), policies, sampling)

    def _run(self) -> None:
        while self._await_work():
            self._admit()
            if self._seated:
                self._decode()

    def _await_work(self) -> bool:
        """Waits until there is something to do; False once the engine is closed and idle."""
        with self._changed:
            while not (self._queue or self._filling or self._seated):
                if self._closing:
                    return False
                self._changed.wait()
        return True

    def _admit(self) -> None:
        """Prefills waiting prompts into free rows, as far as a chunk's worth of positions goes."""
        budget = PREFILL
        while budget > 0 and len(self._seated) < self.rows:
            if self._filling is None:
                with self._changed:
                    if not self._queue:
                        return
                    job = self._queue.popleft()
                    self._filling = job, self._fill(job)
            job, filling = self._filling
            try:
                budget -= next(filling)
            except StopIteration:
                self._filling = None
            except Exception as error:  # of this request alone; the others go on
                traceback.print_exc()
                self._filling = None
                self._fail(job, f"the engine failed: {type(error).__name__}")

    def _fill(self, job: Job) -> Iterator[int]:
        """Takes a job from its prompt to its first token and a row; yields the positions that each part has cost."""
        if job.cancelled:
            return
        request, config, params = job.request, self.model.config, self.model.params
        prompt = "all" if request.prompt_scored else prompt_mode(config)
        depth = prompt_depth(prompt, request.policy)
        key = (request.tokens, depth, request.prompt_scored)
        if self._kept is None or self._kept.key != key:
            self._kept = None  # its memory is needed
            length = len(request.tokens)
            tokens = np.full((1, padded(length)), self.model.tokenizer.pad_id, np.int32)
            tokens[0, :length] = request.tokens
            following, scores = np.pad(tokens[:, 1:], ((0, 0), (0, 1))), []
            lengths, at = np.array([length], np.int32), 0
            for filled in prefill_chunks(config, params, tokens, lengths, capacity=self.slots, depth=depth):
                size = filled.positions.shape[1]
                if request.prompt_scored:
                    found = score_positions(params, filled.positions[0], following[0, at : at + size])
                    scores += _each(found, min(size, length - 1 - at))
                at += size
                if job.cancelled:
                    return
                yield size
            self._kept = Prompt(key, filled.cache, filled.hidden, scores)
        if job.cancelled:
            return
        job.prompt_scores = self._kept.scores
        if request.max_new_tokens == 0:
            self._tell(job, [], [], [], True)
            return
        cache, hidden = pick_rows(self._kept.cache, self._kept.hidden, np.zeros(1, np.int32))
        drawn, rows = begin(
            config,
            params,
            cache,
            hidden,
            np.array(request.tokens[-1:], np.int32),
            np.array([request.max_new_tokens], np.int32),
            depth_budget([request.policy]),
            sampling_params([request.sampling], [request.seed]),
            prompt=prompt,
            top=TOP,
            scored=np.bool_(request.scored),
            stop_ids=self._stop_ids,
        )
        row = next(row for row in range(self.rows) if row not in self._seated)
        self._batch = seat(self._batch, rows, np.int32(row))
        self._seated[row] = job
        self._pass_on(drawn, np.asarray(rows.done), {0: job})
        self._leave()

    def _decode(self) -> None:
        """One chunk of tokens for all rows."""
        scored = any(job.request.scored for job in self._seated.values())
        try:
            drawn, self._batch = decode_chunk(
                self.model.config,
                self.model.params,
                self._batch,
                np.int32(CHUNK),
                top=TOP,
                scored=np.bool_(scored),
                size=CHUNK,
                stop_ids=self._stop_ids,
            )
            done = np.asarray(self._batch.done)
        except Exception as error:  # the caches were donated and are gone
            traceback.print_exc()
            for job in self._seated.values():
                self._fail(job, f"the engine failed: {type(error).__name__}")
            self._seated, self._batch = {}, self._empty()
            return
        self._pass_on(drawn, done, self._seated)
        self._leave()

    def _pass_on(self, drawn: SampledTokens, done: np.ndarray, jobs: dict[int, Job]) -> None:
        tokens, depths = np.asarray(drawn.tokens), np.asarray(drawn.depths)
        for row, job in jobs.items():
            scores = []
            if job.request.scored:
                new = jax.tree.map(lambda part, row=row: np.asarray(part[row]), drawn.scores)
                scores = _each(new, int((tokens[row] >= 0).sum()))
            if not job.cancelled:
                self._tell(job, tokens[row], depths[row], scores, bool(done[row]))

    def _leave(self) -> None:
        """Frees the rows of jobs that have ended or were cancelled."""
        gone = [row for row, job in self._seated.items() if job.ended or job.cancelled]
        if gone:
            for row in gone:
                del self._seated[row]
            self._batch = self._batch._replace(done=self._batch.done.at[np.array(gone)].set(True))

    def _tell(self, job: Job, tokens: Any, depths: Any, scores: list[Scores], last: bool) -> None:
        job.scores += scores
        text = job.answer.add(tokens, depths, last)
        if job.answer.ended:
            del job.scores[len(job.answer.tokens) :]
            self.answered += 1
            self.tokens += len(job.answer.tokens)
            job.ended = True
        job.emit(text, job.answer.ended)

    def _fail(self, job: Job, reason: str) -> None:
        job.error = reason
        job.ended = True
        job.emit("", "error")


@functools.partial(jax.jit, donate_argnums=(0,))
def seat(batch: DecodeState, one: DecodeState, row: jax.Array) -> DecodeState:
    """The batch with the only row of `one` at `row`."""

    def put(axis: int, whole: jax.Array, new: jax.Array) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(whole, new.astype(whole.dtype), row, axis)

    rest = jax.tree.map(functools.partial(put, 0), batch._replace(cache=None), one._replace(cache=None))
    return rest._replace(cache=map_rows(put, batch.cache, one.cache))


@jax.jit
def score_positions(params: decoder.Params, hidden: jax.Array, following: jax.Array) -> Scores:
    """Scores of the tokens `following` [T] the positions of hidden [T, D], a block of logits at a time."""
    blocks = hidden.reshape(-1, min(BLOCK, hidden.shape[0]), hidden.shape[1])
    found = jax.lax.map(
        lambda part: score(decoder.head(params, part[0]), part[1], TOP), (blocks, following.reshape(blocks.shape[:2]))
    )
    return jax.tree.map(lambda part: part.reshape(-1, *part.shape[2:]), found)


def _each(scores: Scores, count: int) -> list[Scores]:
    """The first `count` of stacked scores, one by one, as numpy."""
    whole = jax.tree.map(np.asarray, scores)
    return [jax.tree.map(lambda part, at=at: part[at], whole) for at in range(count)]


def answers(engine: Engine, requests: Sequence[Request], seconds: float = 600.0) -> list[Job]:
    """Runs requests to their end and returns their jobs, in order.

    Raises: TimeoutError; as `Engine.submit`.
    """
    moved = threading.Condition()

    def emit(job: Job, text: str, reason: str | None) -> None:
        with moved:
            moved.notify()

    jobs, deadline = engine.submit(requests, emit), time.monotonic() + seconds
    with moved:
        while not all(job.ended for job in jobs):
            if not moved.wait(deadline - time.monotonic()):
                engine.cancel(jobs)
                raise TimeoutError(f"{sum(not job.ended for job in jobs)} of {len(jobs)} answers took too long")
    return jobs
