"""The official client (pip install openai): what it sends is understood, and what it reads is the model's answer."""

import asyncio
import time

import jax
import numpy as np
import pytest

from sst_jax.serving.queue import Engine
from tests.support.server import start

openai = pytest.importorskip("openai", reason="the official client is not installed: pip install openai")
Access = pytest.importorskip("sst_jax.serving.access", reason="the server is an extra: sst-jax[serve]").Access

TEXT, NEW = "the cat sat on ", 8
HI = {"role": "user", "content": "Hi"}
BRIEF = {"role": "system", "content": "Be brief."}
BACK = {"role": "assistant", "content": "Yes?"}
GREEDY = {"model": "tiny", "temperature": 0, "max_tokens": NEW}


def connected(port, key="any", **options):
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=key, max_retries=0, timeout=60, **options)


@pytest.fixture(scope="module")
def api(client):
    with connected(client.port) as made:
        yield made


@pytest.fixture(scope="module")
def alone(model):
    """A function of a prompt and settings: the model's own answer to it."""

    def answer(prompt, **settings):
        return model.generate([prompt], **{"max_new_tokens": NEW, **settings})[0]

    return answer


def complete(api, **body):
    return api.completions.create(**{**GREEDY, "prompt": TEXT, **body})


def chat(api, **body):
    return api.chat.completions.create(**{**GREEDY, "messages": [HI], **body})


# --------------------------------------------------------------------------------------------------------- completions

IDS = (5, 77, 6)
COMPLETIONS = {
    "text": ({}, TEXT, {}),
    "ids": ({"prompt": IDS}, IDS, {}),
    "one batch of ids": ({"prompt": [IDS]}, IDS, {}),
    "unicode": ({"prompt": "Zwölf 😀 \u200d"}, "Zwölf 😀 \u200d", {}),
    "depth": ({"extra_body": {"depth": 3}}, TEXT, {"depth": 3}),
    "a policy": ({"extra_body": {"depth": "until_stable:0.05:4"}}, TEXT, {"depth": "until_stable:0.05:4"}),
    "a seed": ({"seed": 3, "temperature": 1}, TEXT, {"seed": 3, "temperature": 1.0}),
    "top_p": ({"seed": 3, "temperature": 1, "top_p": 0.5}, TEXT, {"seed": 3, "temperature": 1.0, "top_p": 0.5}),
    "neutral": (
        {"best_of": 1, "suffix": None, "presence_penalty": 0, "frequency_penalty": 0, "logit_bias": {}, "user": "me"},
        TEXT, {},
    ),
    "of other servers": ({"extra_body": {"min_p": 0, "repetition_penalty": 1.0, "top_k": -1}}, TEXT, {}),
}  # fmt: skip


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("name", COMPLETIONS)
def test_a_completion(api, alone, name, streamed):
    body, prompt, settings = COMPLETIONS[name]
    expected = alone(list(prompt) if isinstance(prompt, tuple) else prompt, **settings)
    reason = "stop" if expected.finished else "length"
    if not streamed:
        answer = complete(api, **body)
        (choice,) = answer.choices
        assert (choice.text, choice.finish_reason) == (expected.text, reason)
        assert (answer.usage.completion_tokens, answer.usage.prompt_tokens) == (
            len(expected.tokens), expected.prompt_tokens,
        )  # fmt: skip
        return
    *events, last = complete(api, stream=True, stream_options={"include_usage": True}, **body)
    choices = [choice for event in events for choice in event.choices]
    assert "".join(choice.text for choice in choices) == expected.text
    assert [choice.finish_reason for choice in choices if choice.finish_reason] == [reason]
    assert (last.choices, last.usage.completion_tokens) == ([], len(expected.tokens))


@pytest.mark.parametrize("several", [["a b", "a c"], [[5, 6], [7, 8]]], ids=["texts", "ids"])
def test_batches_and_samples(api, model, several):
    answer = complete(api, prompt=several, n=2, temperature=1, seed=5)
    expected = model.generate(several, n=2, max_new_tokens=NEW, temperature=1.0, seed=[5, 6, 5, 6])
    assert [choice.text for choice in answer.choices] == [one.text for one in expected]
    parts = dict.fromkeys(range(4), "")
    for event in complete(api, prompt=several, n=2, temperature=1, seed=5, stream=True):
        for choice in event.choices:
            parts[choice.index] += choice.text
    assert list(parts.values()) == [one.text for one in expected]


@pytest.mark.parametrize("as_list", [False, True], ids=["string", "list"])
def test_stop_strings_end_an_answer(api, alone, as_list):
    whole = alone(TEXT).text
    mark = whole[2:4]
    stopped = complete(api, stop=[mark, "zq"] if as_list else mark).choices[0]
    assert (stopped.text, stopped.finish_reason) == (whole[: whole.index(mark)], "stop")
    events = complete(api, stop=[mark] if as_list else mark, stream=True)
    assert "".join(choice.text for event in events for choice in event.choices) == stopped.text


def test_echo_and_log_probabilities(api, model):
    ids = model.tokenizer.encode(TEXT)
    logp = np.asarray(jax.nn.log_softmax(model.logits([ids])[0]))
    (choice,) = complete(api, echo=True, logprobs=3, max_tokens=0).choices
    scores = choice.logprobs
    assert choice.text == model.tokenizer.decode(ids)
    assert (scores.token_logprobs[0], len(scores.tokens)) == (None, len(ids))
    np.testing.assert_allclose(scores.token_logprobs[1:], logp[np.arange(len(ids) - 1), ids[1:]], atol=1e-3)
    np.testing.assert_allclose(max(scores.top_logprobs[-1].values()), logp[-2].max(), atol=1e-3)
    assert complete(api, echo=True).choices[0].text.startswith(TEXT)


@pytest.mark.parametrize("kind", ["completion", "chat"])
def test_log_probabilities_of_a_stream_are_those_of_the_whole(api, kind):
    if kind == "completion":
        whole = complete(api, logprobs=20).choices[0].logprobs.token_logprobs
        events = complete(api, logprobs=20, stream=True)
        parts = [choice.logprobs.token_logprobs for event in events for choice in event.choices if choice.logprobs]
    else:
        (choice,) = chat(api, logprobs=True, top_logprobs=20).choices
        whole = [part.logprob for part in choice.logprobs.content]
        assert all(len(part.top_logprobs) == 20 for part in choice.logprobs.content)
        events = chat(api, logprobs=True, top_logprobs=20, stream=True)
        parts = [
            [part.logprob for part in choice.logprobs.content]
            for event in events for choice in event.choices if choice.logprobs
        ]  # fmt: skip
    assert [value for part in parts for value in part] == whole
    assert all(value <= 0 for value in whole)


# --------------------------------------------------------------------------------------------------------------- chats

CHATS = {
    "one message": ([HI], {}),
    "a system message": ([BRIEF, HI], {}),
    "turns": ([HI, BACK, HI], {}),
    "parts": ([{"role": "user", "content": [{"type": "text", "text": "Hi"}]}], {}),
    "a name": ([{**HI, "name": "Ann"}], {}),
    "unicode": ([{"role": "user", "content": "ça va 😀?"}], {}),
    "max_completion_tokens": ([HI], {"max_tokens": openai.omit, "max_completion_tokens": NEW}),
    "top_p of nothing": ([HI], {"top_p": 0, "temperature": 1}),
    "no tools": ([HI], {"tool_choice": "none", "parallel_tool_calls": False, "tools": []}),
    "any tier": ([HI], {"service_tier": "auto", "store": False, "metadata": {"a": "b"}}),
    "text as format": ([HI], {"response_format": {"type": "text"}, "modalities": ["text"]}),
    "names of the caller": ([HI], {"user": "me", "safety_identifier": "me", "prompt_cache_key": "k"}),
    "penalties of nothing": ([HI], {"presence_penalty": 0, "frequency_penalty": 0, "logit_bias": {}}),
    "no variables": ([HI], {"extra_body": {"chat_template_kwargs": {}, "add_generation_prompt": True}}),
    "one reason": ([HI], {"n": 1, "logprobs": False}),
}


@pytest.mark.parametrize("streamed", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize("name", CHATS)
def test_a_chat(api, model, alone, name, streamed):
    messages, body = CHATS[name]
    plain = [
        {"role": message["role"], "content": "Hi" if isinstance(message["content"], list) else message["content"]}
        for message in messages
    ]
    expected = alone(model.tokenizer.chat(plain))
    if not streamed:
        (choice,) = chat(api, messages=messages, **body).choices
        assert (choice.message.content, choice.message.role) == (expected.text, "assistant")
        assert not choice.message.tool_calls
        return
    options = {"include_usage": True, "include_obfuscation": False}
    *events, last = chat(api, messages=messages, stream=True, stream_options=options, **body)
    deltas = [choice.delta for event in events for choice in event.choices]
    assert (deltas[0].role, "".join(delta.content or "" for delta in deltas)) == ("assistant", expected.text)
    assert last.usage.completion_tokens == len(expected.tokens)


def test_an_answer_is_sent_back_as_the_client_holds_it(api, alone, model):
    first = chat(api).choices[0].message
    said = {"role": "assistant", "content": first.content}
    expected = alone(model.tokenizer.chat([HI, said, HI])).text
    for back in (first, first.model_dump(), said):
        assert chat(api, messages=[HI, back, HI]).choices[0].message.content == expected


def test_samples_of_a_chat(api, alone, model):
    prompt = model.tokenizer.chat([HI])
    expected = [alone(prompt, seed=seed, temperature=1.0).text for seed in (4, 5)]
    assert [one.message.content for one in chat(api, n=2, seed=4, temperature=1).choices] == expected


def test_the_streaming_helper_and_raw_responses(api, alone, model):
    expected = alone(model.tokenizer.chat([HI])).text
    mark = expected[3:5]  # an answer that is cut off is an error to the helper
    with api.chat.completions.stream(**GREEDY, messages=[HI], stop=mark) as stream:
        said = stream.get_final_completion().choices[0].message.content
        assert said == expected[: expected.index(mark)]
    raw = api.chat.completions.with_raw_response.create(**GREEDY, messages=[HI])
    assert raw.parse().choices[0].message.content == expected
    assert raw.headers["content-type"] == "application/json"


def test_the_asynchronous_client(client, alone):
    async def both():
        async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{client.port}/v1", api_key="any") as api:
            whole = await api.completions.create(**GREEDY, prompt=TEXT)
            events = await api.completions.create(**GREEDY, prompt=TEXT, stream=True)
            return whole.choices[0].text, "".join([c.text async for event in events for c in event.choices])

    assert asyncio.run(both()) == (alone(TEXT).text,) * 2


def test_models(api):
    assert [card.id for card in api.models.list()] == ["tiny"]
    assert api.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="not served here"):
        api.models.retrieve("gpt-4")


# -------------------------------------------------------------------------------------------------------------- errors

TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}
REFUSED = {
    "tools": (chat, {"tools": [TOOL]}, "tools"),
    "a tool that must be called": (chat, {"tool_choice": "required"}, "tool_choice"),
    "JSON": (chat, {"response_format": {"type": "json_object"}}, "response_format"),
    "a schema": (
        chat, {"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {}}}},
        "response_format",
    ),
    "sound": (chat, {"modalities": ["audio"]}, "modalities"),
    "a picture": (
        chat, {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "messages",
    ),
    "a role that the template lacks": (chat, {"messages": [{"role": "tool", "content": "x", "tool_call_id": "c"}]},
        "messages"),
    "a tier": (chat, {"service_tier": "priority"}, "service_tier"),
    "21 scores": (chat, {"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    "a penalty": (complete, {"frequency_penalty": 1}, "frequency_penalty"),
    "a bias": (complete, {"logit_bias": {"5": 1}}, "logit_bias"),
    "the best of two": (complete, {"best_of": 2}, "best_of"),
    "text behind": (complete, {"suffix": "x"}, "suffix"),
    "temperature": (complete, {"temperature": -1}, "temperature"),
    "too many": (complete, {"n": 17}, "n"),
    "too long": (complete, {"prompt": "x" * 600}, "max_tokens"),
    "an id beyond the table": (complete, {"prompt": [100_000]}, "prompt"),
    "a field": (complete, {"extra_body": {"guided_json": {}}}, "guided_json"),
    "too deep": (complete, {"extra_body": {"depth": 9}}, "depth"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_had_is_a_bad_request_that_names_it(api, name):
    call, body, param = REFUSED[name]
    with pytest.raises(openai.BadRequestError) as raised:
        call(api, **body)
    assert raised.value.param == param
    assert param.removesuffix("s") in str(raised.value)  # "message 0: ..." of messages
    assert (raised.value.code == "context_length_exceeded") == (name == "too long")


def test_other_errors_have_their_classes(api):
    with pytest.raises(openai.NotFoundError, match="'gpt-4' is not served"):
        complete(api, model="gpt-4")
    for call in (api.embeddings.create, api.responses.create):
        with pytest.raises(openai.NotFoundError):
            call(model="tiny", input="x")
    with pytest.raises(openai.APIStatusError) as large:
        complete(api, prompt="x" * 200_000)
    assert (large.value.status_code, large.value.code) == (413, "too_large")
    with connected(1) as nobody, pytest.raises(openai.APIConnectionError):
        complete(nobody)


def test_keys(engine, alone):
    client, server, thread = start(engine, access=Access("sk-right"))
    with connected(client.port, "sk-right") as right, connected(client.port, "sk-wrong") as wrong:
        assert complete(right).choices[0].text == alone(TEXT).text
        for call in (complete, chat, lambda api: api.models.list()):
            with pytest.raises(openai.AuthenticationError):
                call(wrong)
    server.should_exit = True
    thread.join(20)


def test_busy_and_closing(model):
    engine = Engine(model, rows=4, capacity=512, waiting=2)
    client, server, thread = start(engine)
    with connected(client.port) as api:
        with pytest.raises(openai.RateLimitError):
            complete(api, prompt=["x"] * 3)
        engine.close(5)
        with pytest.raises(openai.InternalServerError) as closing:
            complete(api)
        assert (closing.value.status_code, closing.value.code) == (503, "shutting_down")
    server.should_exit = True
    thread.join(20)


def idle(engine):
    deadline = time.monotonic() + 20
    while any(engine.load()[name] for name in ("running", "waiting")):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_client_that_waits_no_longer_frees_its_row(api, client, engine, alone):
    answered, long = engine.answered, {"max_tokens": 480, "extra_body": {"depth": 8}}
    with connected(client.port) as hasty, pytest.raises(openai.APITimeoutError):
        complete(hasty.with_options(timeout=0.05), **long)
    stream = complete(api, stream=True, **long)
    next(iter(stream))
    stream.close()
    idle(engine)
    assert engine.answered == answered
    assert complete(api).choices[0].text == alone(TEXT).text
