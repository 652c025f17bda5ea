"""The engine: rows that come and go, each as if it were alone."""

import asyncio
import json
import threading
import time

import jax
import numpy as np
import pytest

from sst_jax.errors import InputError
from sst_jax.inference.policies import flat, parse
from sst_jax.inference.sampling import Sampling
from sst_jax.inference.session import Request
from sst_jax.serving.app import stream_events
from sst_jax.serving.protocol import Call
from sst_jax.serving.queue import Busy, Closing, Engine, answers
from sst_jax.serving.responses import Writer

ROWS, CAPACITY = 4, 512  # those of the fixture, so that all engines share their programs
POLICIES = ("1", "4", "first_token:3", "until_stable:0.05:4")


def request(model, number, **more):
    """Requests of unequal lengths, depths, temperatures and ends."""
    text = f"{number} bottles " * (1 + number % 3) + "x" * (number % 15)
    given = {
        "tokens": tuple(model.tokenizer.encode(text)), "max_new_tokens": 3 + number % 11,
        "policy": parse(POLICIES[number % 4]), "sampling": Sampling(float(number % 3), number % 5, 0.9), "seed": number,
    }  # fmt: skip
    return Request(**{**given, **more})


def solo(model, request):
    return model.generate(
        [list(request.tokens)], depth=request.policy, max_new_tokens=request.max_new_tokens, seed=request.seed,
        temperature=request.sampling.temperature, top_k=request.sampling.top_k, top_p=request.sampling.top_p,
        stop=request.stop,
    )[0]  # fmt: skip


def test_answers_are_those_of_the_model_alone(model, engine):
    requests = [request(model, number) for number in range(30)]
    for asked, job in zip(requests, answers(engine, requests), strict=True):
        alone = solo(model, asked)
        assert job.answer.tokens == alone.tokens
        assert job.answer.depths == alone.depths
        assert job.answer.text == alone.text
        assert (job.answer.ended == "stop") == alone.finished


def test_company_changes_no_bit(model, engine):
    """Log-probabilities too: to the bit, whether a request is alone or among others."""
    asked = request(model, 3, scored=True, max_new_tokens=12)
    alone = answers(engine, [asked])[0]
    crowd = [request(model, number) for number in range(9)]
    among = answers(engine, [*crowd[:4], asked, *crowd[4:]])[4]
    assert among.answer.tokens == alone.answer.tokens
    assert [score.chosen for score in among.scores] == [score.chosen for score in alone.scores]
    assert len(alone.scores) == len(alone.answer.tokens)


@pytest.mark.slow
def test_long_prompts_are_filled_in_turns_with_decoding(model):
    """A prompt of three chunks does not hold up what is running, and comes out as it does alone."""
    engine = Engine(model, rows=2, capacity=1536)
    long = request(model, 1, tokens=tuple(np.random.default_rng(0).integers(6, 262, 1300).tolist()), max_new_tokens=5)
    short = request(model, 2, max_new_tokens=200)
    told = []
    jobs = engine.submit([short, long], lambda job, text, reason, count: told.append((job, len(job.answer.tokens))))
    deadline = time.monotonic() + 120
    while not all(job.ended for job in jobs) and time.monotonic() < deadline:
        time.sleep(0.01)
    first_of_long = next(place for place, (job, _) in enumerate(told) if job is jobs[1])
    before = [count for job, count in told[:first_of_long] if job is jobs[0]]
    assert len(before) >= 3, "the short one should have moved on between the long one's chunks"
    assert before[-1] < 200
    assert jobs[1].answer.tokens == solo(model, long).tokens
    assert jobs[0].answer.tokens == solo(model, short).tokens
    assert engine.close(10)


def test_prompt_scores_are_the_log_probabilities_of_exact(model, engine):
    tokens = tuple(model.tokenizer.encode("the quick brown fox " * 4))
    for depth in (1, 3):
        asked = Request(tokens, 1, flat(depth), Sampling(), scored=True, prompt_scored=True)
        job = answers(engine, [asked])[0]
        expected = np.asarray(jax.nn.log_softmax(model.logits([list(tokens)], depth=depth)[0]))
        found = [float(score.chosen) for score in job.prompt_scores]
        assert len(found) == len(tokens) - 1
        np.testing.assert_allclose(found, expected[np.arange(len(tokens) - 1), tokens[1:]], atol=1e-4)
        assert job.answer.tokens == [int(expected[-1].argmax())]
        np.testing.assert_allclose(job.scores[0].chosen, expected[-1].max(), atol=1e-4)


def test_samples_of_a_prompt_are_prefilled_once(model, engine, monkeypatch):
    from sst_jax.inference import session as module

    calls = []
    original = module.prefill_chunks
    monkeypatch.setattr(module, "prefill_chunks", lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs))
    asked = [request(model, 5, seed=seed, sampling=Sampling(1.0), policy=flat(2)) for seed in range(6)]
    jobs = answers(engine, asked)
    assert len(calls) == 1
    assert len({tuple(job.answer.tokens) for job in jobs}) > 1
    assert jobs[4].answer.tokens == solo(model, asked[4]).tokens


def test_stop_strings_end_a_row(model, engine):
    free = answers(engine, [request(model, 7, max_new_tokens=40, sampling=Sampling(1.5))])[0].answer.text
    mark = next(character for character in free[3:] if character.isascii() and character.isprintable())
    job = answers(engine, [request(model, 7, max_new_tokens=40, sampling=Sampling(1.5), stop=(mark,))])[0]
    assert job.answer.text == free[: free.index(mark)]
    assert job.answer.ended == "stop"
    asked = request(model, 7, max_new_tokens=40, sampling=Sampling(1.5), stop=(mark,), scored=True)
    (scored,) = answers(engine, [asked])
    assert scored.answer.tokens == job.answer.tokens == solo(model, asked).tokens
    assert len(scored.scores) == len(scored.answer.tokens)


def test_cancelled_jobs_free_their_rows(model, engine):
    jobs = engine.submit(
        [request(model, 9, max_new_tokens=400) for _ in range(4)], lambda job, text, reason, count: None
    )
    while engine.load()["running"] < 4:
        time.sleep(0.005)
    engine.cancel(jobs)
    after = answers(engine, [request(model, 1)], seconds=30)[0]
    assert after.answer.ended
    assert not any(job.ended for job in jobs)
    assert max(len(job.answer.tokens) for job in jobs) < 400


def test_cancelled_jobs_do_not_wait(model):
    """Clients that gave up while all rows were taken leave their places to those that are still there."""
    engine = Engine(model, rows=1, capacity=CAPACITY, waiting=3)
    try:
        quiet = lambda job, text, reason, count: None  # noqa: E731
        running = engine.submit([request(model, 9, max_new_tokens=400)], quiet)
        while engine.load()["running"] < 1:
            time.sleep(0.005)
        gone = engine.submit([request(model, number) for number in range(3)], quiet)
        engine.cancel(gone)
        assert engine.load()["waiting"] == 0
        engine.submit([request(model, 1)], quiet)
        engine.cancel(running)
    finally:
        engine.close(30)


def test_what_does_not_fit_is_refused(model, engine):
    with pytest.raises(InputError, match="512 positions"):
        engine.submit([request(model, 1, max_new_tokens=600)], lambda job, text, reason, count: None)


def test_a_full_queue_and_a_closing_engine_refuse(model):
    engine = Engine(model, rows=ROWS, capacity=CAPACITY, waiting=2)
    with pytest.raises(Busy):
        engine.submit([request(model, 1)] * 3, lambda job, text, reason, count: None)
    held = threading.Event()
    jobs = engine.submit([request(model, 1), request(model, 2)], lambda job, text, reason, count: held.wait(10))
    held.set()
    assert engine.close(30)
    assert all(job.answer.ended for job in jobs)
    with pytest.raises(Closing):
        engine.submit([request(model, 1)], lambda job, text, reason, count: None)


def test_what_is_not_finished_at_the_deadline_ends_with_an_error(model):
    engine = Engine(model, rows=ROWS, capacity=CAPACITY)
    told = []
    long = request(model, 1, max_new_tokens=450, policy=flat(40))
    jobs = engine.submit([long] * (ROWS + 2), lambda job, text, reason, count: told.append(job))
    assert not engine.close(0.2)
    assert all("shut down" in job.error for job in jobs)
    assert set(told) >= set(jobs)


def test_a_request_that_is_being_given_a_row_at_the_deadline_ends_with_an_error_too(model, monkeypatch):
    engine = Engine(model, rows=ROWS, capacity=CAPACITY)
    admit, admitting = engine.session.admit, threading.Event()

    def slowly(*arguments):
        admitting.set()
        time.sleep(1.0)
        return admit(*arguments)

    monkeypatch.setattr(engine.session, "admit", slowly)
    (job,) = engine.submit([request(model, 1, max_new_tokens=400)], lambda *told: None)
    assert admitting.wait(300)
    assert not engine.close(0.1)
    assert "shut down" in job.error
    assert len(job.answer.tokens) < 100


def test_a_failing_request_leaves_the_others(model, engine, monkeypatch, capfd):
    """Whatever goes wrong in one prefill is that request's own."""
    from sst_jax.inference import session as module

    original = module.prefill_chunks

    def failing(config, params, tokens, *args, **kwargs):
        if tokens[0, 0] == 77:
            raise RuntimeError("of the test's making")
        return original(config, params, tokens, *args, **kwargs)

    monkeypatch.setattr(module, "prefill_chunks", failing)
    bad, good = answers(engine, [request(model, 1, tokens=(77, 78)), request(model, 2)])
    assert "RuntimeError" in bad.error
    assert good.answer.tokens == solo(model, request(model, 2)).tokens
    assert "of the test's making" in capfd.readouterr().err


def test_a_stream_that_is_read_late_loses_nothing(model, engine):
    """All answers have ended before the first piece is looked at: pieces and reasons still come in their order."""
    requests = [request(model, number, max_new_tokens=40, stop=()) for number in range(3)]
    events = asyncio.Queue()
    jobs = engine.submit(requests, lambda *told: events.put_nowait(told))
    deadline = time.monotonic() + 120
    while not all(job.ended for job in jobs) and time.monotonic() < deadline:
        time.sleep(0.01)

    async def read():
        writer = Writer(Call(False, requests, [], stream=True), "tiny", model.tokenizer)
        return [event async for event in stream_events(engine, writer, jobs, events)]

    *chunks, end = asyncio.run(read())
    assert end == "data: [DONE]\n\n"
    choices = [json.loads(chunk.removeprefix("data: "))["choices"][0] for chunk in chunks]
    for index, job in enumerate(jobs):
        mine = [choice for choice in choices if choice["index"] == index]
        assert len(mine) > 2
        assert "".join(choice["text"] for choice in mine) == job.answer.text
        assert [choice["finish_reason"] for choice in mine] == [None] * (len(mine) - 1) + [job.answer.ended]
