"""The server over real sockets: what it answers, what it refuses, and that neither leaves it down."""

import concurrent.futures
import json
import random
import signal
import socket
import threading
import time

import jax
import numpy as np
import pytest

from sst_jax.serving.queue import Engine
from tests.support.server import start

for package in ("starlette", "uvicorn"):
    pytest.importorskip(package, reason="the server is an extra: sst-jax[serve]")

DEPTHS = (1, 4, "first_token:3", "until_stable:0.05:4", "until_confident:0.3:4")


def asked(number):
    """A request of one of several kinds, and how the model alone would be asked for its answer."""
    rng = random.Random(number)
    settings = {
        "depth": DEPTHS[number % 4], "temperature": rng.choice([0, 0.7, 1.2]), "seed": number,
        "top_p": rng.choice([1, 0.9]), "stop": ["zq"],
    }  # fmt: skip
    text = f"question {number}: " + "ab " * rng.randrange(8)
    body = {**settings, "max_tokens": rng.randrange(1, 14)}
    if number % 3 == 0:
        return "/v1/chat/completions", {**body, "messages": [{"role": "user", "content": text}]}, (text, True)
    return "/v1/completions", {**body, "prompt": text}, (text, False)


def solo(model, body, prompt):
    text, chat = prompt
    names = {"depth", "temperature", "seed", "top_p", "stop"}
    return model.generate(
        text, chat=chat, max_new_tokens=body["max_tokens"], **{key: body[key] for key in names}
    )[0]  # fmt: skip


def text_of(choice):
    return choice["message"]["content"] if "message" in choice else choice["text"]


def streamed_text(events):
    choices = [choice for event in events for choice in event["choices"]]
    return "".join(choice["delta"].get("content", "") if "delta" in choice else choice["text"] for choice in choices)


@pytest.mark.slow
def test_200_mixed_requests_from_16_clients(model, client):
    """None is lost and each equals its solo answer; a third of them are streamed."""
    kinds = [asked(number) for number in range(25)]
    expected = [solo(model, body, prompt) for _, body, prompt in kinds]

    def one(number):
        path, body, _ = kinds[number % 25]
        if number % 3 == 1:
            events = client.stream(path, **body, stream_options={"include_usage": True})
            reasons = [choice["finish_reason"] for event in events for choice in event["choices"]]
            return streamed_text(events), reasons[-1], events[-1]["usage"]
        status, answer = client.send("POST", path, body)
        assert status == 200, answer
        (choice,) = answer["choices"]
        return text_of(choice), choice["finish_reason"], answer["usage"]

    order = list(range(200))
    random.Random(0).shuffle(order)
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        found = dict(zip(order, pool.map(one, order), strict=True))
    assert len(found) == 200
    for number, (text, reason, usage) in found.items():
        alone = expected[number % 25]
        assert text == alone.text
        assert reason == ("stop" if alone.finished else "length")
        assert usage["prompt_tokens"] == alone.prompt_tokens
        assert usage["completion_tokens"] == len(alone.tokens)
        assert usage["iterations"] == sum(alone.depths)


def test_completions_take_many_prompts_and_samples(model, client):
    answer = client.complete(prompt=["one", "two"], n=2, max_tokens=5, seed=3, temperature=1.0)
    assert answer["object"] == "text_completion"
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    expected = model.generate(["one", "two"], n=2, max_new_tokens=5, seed=[3, 4, 3, 4], temperature=1.0)
    assert [choice["text"] for choice in answer["choices"]] == [generation.text for generation in expected]
    ids = model.tokenizer.encode("one")
    again = client.complete(prompt=[ids], max_tokens=5, seed=3, temperature=1.0)
    assert again["choices"][0]["text"] == expected[0].text
    assert client.complete(prompt=ids, max_tokens=5, seed=3)["choices"] == again["choices"]
    assert answer["usage"]["prompt_tokens"] == 2 * len(ids)


def test_log_probabilities_as_an_evaluation_asks_for_them(model, client):
    """echo, logprobs and one token more, for a batch of contexts with continuations: what lm-evaluation-harness sends.

    Its sum over the continuation and its greedy flag are read from the response as that client reads them.
    """
    texts = [("the cat sat", " on the mat."), ("1 + 1 = 2 and 2", " + 2 = 4"), ("only the end matters!", "..")]
    contexts = [model.tokenizer.encode(context) for context, _ in texts]
    whole = [ids + model.tokenizer.encode_text(end) for ids, (_, end) in zip(contexts, texts, strict=True)]
    # A continuation that is greedy by construction.
    whole[2] = contexts[2] + model.generate([contexts[2]], max_new_tokens=2, depth=2)[0].tokens
    assert {len(ids) for ids in whole} == {24}
    body = {"prompt": whole, "temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    for depth in (1, 2):
        answer = client.complete(**body, depth=depth)
        for ids, context, choice in zip(whole, contexts, answer["choices"], strict=True):
            scores, size = choice["logprobs"], len(context)
            assert {len(part) for part in scores.values()} == {len(ids) + 1}
            assert scores["token_logprobs"][0] is None
            found = scores["token_logprobs"][size:-1]
            greedy = all(
                token == max(top.values()) for token, top in zip(found, scores["top_logprobs"][size:-1], strict=True)
            )
            logp = np.asarray(jax.nn.log_softmax(model.logits([ids], depth=depth)[0]))[size - 1 : -1]
            assert abs(sum(found) - logp[np.arange(len(logp)), ids[size:]].sum()) < 1e-3
            assert greedy == (logp.argmax(-1) == ids[size:]).all()
            assert choice["text"].startswith(model.tokenizer.decode(ids))
    alone = client.complete(prompt=whole[0], max_tokens=0, echo=True, logprobs=0)
    assert alone["choices"][0]["text"] == model.tokenizer.decode(whole[0])
    assert alone["usage"]["completion_tokens"] == 0
    assert len(alone["choices"][0]["logprobs"]["token_logprobs"]) == len(whole[0])


@pytest.mark.slow
def test_lm_evaluation_harness_own_client(model, client, tmp_path):
    """Its loglikelihoods and generations over the wire, with the tokenizer that we export, are the model's."""
    pytest.importorskip("tenacity", reason="a part of lm-eval[api]")
    models = pytest.importorskip("lm_eval.models.openai_completions")
    from lm_eval.api.instance import Instance

    for name, data in model.tokenizer.export_files().items():
        (tmp_path / name).write_bytes(data)
    theirs = models.LocalCompletionsAPI(
        base_url=f"http://127.0.0.1:{client.port}/v1/completions",
        model="tiny",
        tokenizer=str(tmp_path),
        tokenizer_backend="huggingface",
        batch_size=2,
        max_length=400,
        add_bos_token=True,
    )
    pairs = [("the cat sat", " on the mat"), ("1 + 1 =", " 2"), ("a b", "c")]
    found = theirs.loglikelihood([Instance("loglikelihood", {}, pair, at) for at, pair in enumerate(pairs)])
    for (context, end), (value, greedy) in zip(pairs, found, strict=True):
        ids = model.tokenizer.encode(context + end)
        size = len(model.tokenizer.encode(context))
        logp = np.asarray(jax.nn.log_softmax(model.logits([ids])[0]))[size - 1 : -1]
        assert abs(value - logp[np.arange(len(logp)), ids[size:]].sum()) < 1e-3
        assert greedy == (logp.argmax(-1) == ids[size:]).all()
    settings = {"until": ["\n"], "max_gen_toks": 12, "temperature": 0}
    (text,) = theirs.generate_until([Instance("generate_until", {}, ("hello", settings), 0)])
    assert text == model.generate("hello", max_new_tokens=12, stop=["\n"])[0].text


@pytest.mark.slow
def test_lm_evaluation_harness_own_chat_client(model, client):
    """Its conversations, with a system message and few-shot turns, are answered as the model answers them."""
    pytest.importorskip("tenacity", reason="a part of lm-eval[api]")
    models = pytest.importorskip("lm_eval.models.openai_completions")
    from lm_eval.api.instance import Instance

    theirs = models.LocalChatCompletion(base_url=f"http://127.0.0.1:{client.port}/v1/chat/completions", model="tiny")
    asked = {"role": "user", "content": "hello"}
    shot = [{"role": "user", "content": "1 + 1 ="}, {"role": "assistant", "content": "2"}]
    talks = [[asked], [{"role": "system", "content": "Be brief."}, asked], [*shot, *shot, asked]]
    settings = {"until": ["\n"], "max_gen_toks": 12, "temperature": 0}
    requests = [
        Instance("generate_until", {}, (theirs.apply_chat_template(talk), dict(settings)), at)
        for at, talk in enumerate(talks)
    ]
    expected = [model.generate([model.tokenizer.chat(talk)], max_new_tokens=12, stop=["\n"])[0].text for talk in talks]
    assert theirs.generate_until(requests) == expected


def test_depth_changes_answers_and_is_counted(client):
    body = {"prompt": "a deep question", "max_tokens": 12, "temperature": 0}
    shallow, deep = client.complete(**body, depth=1), client.complete(**body, depth=6)
    assert shallow["usage"]["iterations"] == shallow["usage"]["completion_tokens"]
    assert deep["usage"]["iterations"] == 6 * deep["usage"]["completion_tokens"]


def test_without_a_seed_samples_differ(client):
    texts = {client.complete(prompt="x", max_tokens=12)["choices"][0]["text"] for _ in range(4)}
    assert len(texts) > 1


def test_log_probabilities_of_chats_and_streams_are_those_of_the_tokens(model, client):
    """Whole and streamed, of either route, and as many as twenty."""
    messages = [{"role": "user", "content": "Hi"}]
    prompt = model.tokenizer.chat(messages)
    settings = {"max_tokens": 9, "temperature": 0}
    completed = client.complete(prompt=prompt, logprobs=20, **settings)["choices"][0]["logprobs"]
    tokens = model.generate([prompt], max_new_tokens=9)[0].tokens
    logp = np.asarray(jax.nn.log_softmax(model.logits([[*prompt, *tokens]])[0]))[len(prompt) - 1 : -1]
    body = {"messages": messages, "logprobs": True, "top_logprobs": 20, **settings}
    status, answer = client.send("POST", "/v1/chat/completions", body)
    assert status == 200
    content = answer["choices"][0]["logprobs"]["content"]
    assert [part["token"] for part in content] == completed["tokens"]
    for token, part, row in zip(tokens, content, logp, strict=True):
        assert part["token"] == model.tokenizer.decode_next([token], True)
        assert part["logprob"] == pytest.approx(row[token], abs=1e-3)
        assert part["bytes"] == (None if "\ufffd" in part["token"] else list(part["token"].encode()))
        best = [each["logprob"] for each in part["top_logprobs"]]
        np.testing.assert_allclose(best, np.sort(row)[::-1][:20], atol=1e-3)

    streamed = client.stream("/v1/chat/completions", **body, model="tiny")
    choices = [choice for event in streamed for choice in event["choices"]]
    assert [part for choice in choices if choice["logprobs"] for part in choice["logprobs"]["content"]] == content
    streamed = client.stream("/v1/completions", prompt=prompt, logprobs=20, **settings)
    parts = [choice["logprobs"] for event in streamed for choice in event["choices"] if choice["logprobs"]]
    for name, values in completed.items():
        assert [value for part in parts for value in part[name]] == values, name


def test_a_chat_without_log_probabilities_has_none(client):
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2, "logprobs": False, "top_logprobs": 0}
    status, answer = client.send("POST", "/v1/chat/completions", body)
    assert (status, answer["choices"][0]["logprobs"]) == (200, None)


def test_a_chat_stream_opens_with_its_role_and_closes_with_a_reason(model, client):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
    ]
    events = client.stream("/v1/chat/completions", messages=messages, max_tokens=6, temperature=0, model="tiny", n=2)
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert len({event["id"] for event in events}) == 1
    for index in (0, 1):
        mine = [choice for event in events for choice in event["choices"] if choice["index"] == index]
        assert mine[0]["delta"] == {"role": "assistant", "content": ""}
        assert [choice["finish_reason"] for choice in mine[:-1]] == [None] * (len(mine) - 1)
        assert mine[-1]["finish_reason"] in ("stop", "length")
    prompt = model.tokenizer.chat([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}])
    assert streamed_text(events) == 2 * model.generate([prompt], max_new_tokens=6)[0].text


def test_models_and_health(client):
    status, listed = client.send("GET", "/v1/models")
    assert (status, [card["id"] for card in listed["data"]]) == (200, ["tiny"])
    assert client.send("GET", "/v1/models/tiny")[1]["id"] == "tiny"
    assert client.send("GET", "/v1/models/other")[0] == 404
    status, health = client.send("GET", "/health")
    assert (status, health["status"], health["rows"]) == (200, "ok", 4)


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({}, 400, "prompt"),
        ({"prompt": None}, 400, "prompt"),
        ({"prompt": []}, 400, "prompt"),
        ({"prompt": [[]]}, 400, "prompt"),
        ({"prompt": {"text": "x"}}, 400, "prompt"),
        ({"prompt": [1, "x"]}, 400, "prompt"),
        ({"prompt": [1, 2.5]}, 400, "prompt"),
        ({"prompt": [True, False]}, 400, "prompt"),
        ({"prompt": [5, 100_000]}, 400, "prompt"),
        ({"prompt": [-1]}, 400, "prompt"),
        ({"prompt": "\ud800"}, 400, "prompt"),
        ({"prompt": "x", "model": "gpt-4"}, 404, "model"),
        ({"prompt": "x", "max_tokens": 0}, 400, "max_tokens"),
        ({"prompt": "x", "max_tokens": 10**9}, 400, "max_tokens"),
        ({"prompt": "x" * 600}, 400, "max_tokens"),
        ({"prompt": "x", "max_tokens": "5"}, 400, "max_tokens"),
        ({"prompt": "x", "max_tokens": True}, 400, "max_tokens"),
        ({"prompt": "x", "temperature": -0.1}, 400, "temperature"),
        ({"prompt": "x", "temperature": "hot"}, 400, "temperature"),
        ({"prompt": "x", "top_p": -0.1}, 400, "top_p"),
        ({"prompt": "x", "top_p": 1.5}, 400, "top_p"),
        ({"prompt": "x", "top_k": -2}, 400, "top_k"),
        ({"prompt": "x", "n": 0}, 400, "n"),
        ({"prompt": "x", "n": 17}, 400, "n"),
        ({"prompt": ["x"] * 9, "n": 2}, 400, "n"),
        ({"prompt": "x", "seed": 1.5}, 400, "seed"),
        ({"prompt": "x", "seed": 2**70}, 400, "seed"),
        ({"prompt": "x", "stop": 5}, 400, "stop"),
        ({"prompt": "x", "stop": ["a"] * 17}, 400, "stop"),
        ({"prompt": "x", "stream": "yes"}, 400, "stream"),
        ({"prompt": "x", "stream": True, "echo": True}, 400, "stream"),
        ({"prompt": "x", "stream_options": {"speed": 1}}, 400, "stream_options"),
        ({"prompt": "x", "logprobs": 21}, 400, "logprobs"),
        ({"prompt": "x", "depth": 0}, 400, "depth"),
        ({"prompt": "x", "depth": 9}, 400, "depth"),
        ({"prompt": "x", "depth": 1.5}, 400, "depth"),
        ({"prompt": "x", "depth": "deep"}, 400, "depth"),
        ({"prompt": "x", "depth": "until_stable:0.1:99"}, 400, "depth"),
        ({"prompt": "x", "depth": "until_confident:0.9:2", "echo": True, "logprobs": 1}, 400, "depth"),
        ({"prompt": "x", "depth": "until_confident:1.5:2"}, 400, "depth"),
        ({"prompt": "x", "depth": "probe:/etc/passwd"}, 400, "depth"),
        ({"prompt": "x", "depth": "first_token:2", "echo": True, "logprobs": 1}, 400, "depth"),
        ({"prompt": "x", "best_of": 2}, 400, "best_of"),
        ({"prompt": "x", "suffix": "y"}, 400, "suffix"),
        ({"prompt": "x", "frequency_penalty": 0.5}, 400, "frequency_penalty"),
        ({"prompt": "x", "logit_bias": {"5": 1}}, 400, "logit_bias"),
        ({"prompt": "x", "guided_json": {}}, 400, "guided_json"),
    ],
)
def test_bad_completions_are_refused_by_name(client, body, status, param):
    found, error = client.refused(**body)
    assert (found, error["param"]) == (status, param)
    assert param in error["message"]


def test_messages_as_clients_write_them(client):
    """lm-evaluation-harness says that its text is text; OpenAI's client sends an answer's empty fields back."""

    def said(*messages):
        body = {"messages": list(messages), "max_tokens": 4, "temperature": 0}
        status, answer = client.send("POST", "/v1/chat/completions", body)
        assert status == 200, answer
        return answer["choices"][0]["message"]["content"]

    asked = {"role": "user", "content": "hello"}
    back = {"role": "assistant", "content": "x"}
    once = said(asked)
    assert once == said({**asked, "type": "text"}) == said({**asked, "name": None, "refusal": None})
    echoed = {**back, "refusal": None, "tool_calls": None, "audio": None}
    assert said(asked, echoed, asked) == said(asked, back, asked)


@pytest.mark.parametrize("half", ["\ud800", "x\udfff"])
def test_half_a_surrogate_pair_is_refused(client, half):
    assert client.refused(prompt=half)[0] == 400
    status, error = client.refused("/v1/chat/completions", messages=[{"role": "user", "content": half}])
    assert (status, error["param"]) == (400, "messages")


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "messages"),
        ({"messages": [{"role": "user", "content": "x", "type": "image"}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": [1]}]}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": ["hello"]}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, "messages"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages"),
        ({"messages": [{"role": "user", "content": "x"}], "tools": [{"type": "function"}]}, "tools"),
        ({"messages": [{"role": "user", "content": "x"}], "logprobs": 3}, "logprobs"),
        ({"messages": [{"role": "user", "content": "x"}], "logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"messages": [{"role": "user", "content": "x"}], "top_logprobs": 2}, "top_logprobs"),
        (
            {"messages": [{"role": "user", "content": "x"}], "response_format": {"type": "json_object"}},
            "response_format",
        ),
        ({"messages": [{"role": "user", "content": "x"}], "prompt": "x"}, "prompt"),
    ],
)
def test_bad_chats_are_refused_by_name(client, body, param):
    status, error = client.refused("/v1/chat/completions", **body)
    assert (status, error["param"]) == (400, param)


def test_neutral_values_of_unsupported_fields_are_taken(client):
    neutral = {"presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": None, "best_of": 1, "user": "me"}
    assert client.complete(prompt="x", max_tokens=2, suffix=None, **neutral)["choices"]


@pytest.mark.parametrize("raw", [b"", b"{", b"[1, 2]", b"null", b'"x"', b"\xff\xfe", b'{"prompt": NaN}', b"[" * 50_000])
def test_what_is_no_json_object_is_refused(client, raw):
    status, answer = client.send("POST", "/v1/completions", raw=raw)
    assert status == 400
    assert answer["error"]["type"] == "invalid_request_error"


def test_oversized_bodies_are_refused(client):
    status, error = client.refused(prompt="x" * 200_000)
    assert (status, error["code"]) == (413, "too_large")
    # The same without a Content-Length.
    with socket.create_connection(("127.0.0.1", client.port), timeout=20) as raw:
        raw.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(12):
            raw.sendall(b"4e20\r\n" + b" " * 20_000 + b"\r\n")
        assert b" 413 " in raw.recv(4096)


def test_unknown_routes_and_methods(client):
    for method, path, status in (
        ("GET", "/v1/nothing", 404),
        ("GET", "/v1/completions", 405),
        ("POST", "/health", 405),
        ("POST", "/v1/responses", 404),
    ):
        found, answer = client.send(method, path)
        assert found == status
        assert path in answer["error"]["message"]


def test_clients_that_go_away_free_their_rows(engine, client):
    """Eight clients, streaming and not, of whom none waits for the end; then the server answers as before."""
    answered, body = engine.answered, {"prompt": "x", "max_tokens": 480, "temperature": 0, "depth": 8}
    connections = []
    for number in range(8):
        connection = socket.create_connection(("127.0.0.1", client.port), timeout=20)
        data = json.dumps({**body, "stream": number % 2 == 0}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
        connection.sendall(head.encode() + data)
        connections.append(connection)
    deadline = time.monotonic() + 20
    while engine.load()["running"] < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    for connection in connections:
        connection.close()
    half = socket.create_connection(("127.0.0.1", client.port), timeout=20)  # and one in the middle of its body
    half.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 999\r\n\r\n{")
    half.close()
    while any(engine.load()[name] for name in ("running", "waiting")) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert engine.load() == {"running": 0, "waiting": 0, "rows": 4}
    assert engine.answered == answered, "somebody's answer was computed to its end for nobody"
    assert client.complete(prompt="x", max_tokens=3)["choices"]


@pytest.mark.slow
def test_shutdown_finishes_what_runs_and_refuses_what_comes(model):
    engine = Engine(model, rows=4, capacity=512)
    client, server, thread = start(engine)
    body = {"prompt": "x", "max_tokens": 450, "temperature": 0, "depth": 6}
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        running = [pool.submit(client.stream, "/v1/completions", **body), pool.submit(client.complete, **body)]
        while engine.load()["running"] < 2:
            time.sleep(0.005)
        server.handle_exit(signal.SIGTERM, None)
        while not engine.closing:
            time.sleep(0.005)
        assert client.refused(prompt="x")[0] == 503
        assert client.send("GET", "/health")[0] == 503
        events, whole = (future.result(60) for future in running)
    alone = model.generate("x", max_new_tokens=450, depth=6)[0].text
    assert streamed_text(events) == whole["choices"][0]["text"] == alone
    thread.join(20)
    assert not thread.is_alive()
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", client.port), timeout=5)


def test_shutdown_keeps_its_deadline(model):
    engine = Engine(model, rows=4, capacity=512)
    client, server, thread = start(engine, deadline=0.3, depth=64)
    found = []
    asking = threading.Thread(
        target=lambda: found.append(client.refused(prompt="x", max_tokens=450, temperature=0, depth=64))
    )
    asking.start()
    while not engine.load()["running"]:
        time.sleep(0.005)
    server.handle_exit(signal.SIGINT, None)
    asking.join(20)
    thread.join(20)
    assert not thread.is_alive()
    ((status, error),) = found
    assert status == 503
    assert "shut down" in error["message"]


def test_too_many_waiting_requests_are_told_so(model):
    engine = Engine(model, rows=4, capacity=512, waiting=4)
    client, server, thread = start(engine)
    status, error = client.refused(prompt=["x"] * 5, max_tokens=2)
    assert (status, error["code"]) == (429, "busy")
    assert len(client.complete(prompt=["x"] * 4, max_tokens=2)["choices"]) == 4
    server.should_exit = True
    thread.join(20)
    engine.close(5)
