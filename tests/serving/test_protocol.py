"""What the server reads and writes, without a server."""

import numpy as np
import pytest

from sst_jax.data.tokenizer import load_tokenizer
from sst_jax.inference.detokenizer import IncrementalDetokenizer
from sst_jax.inference.model import Model
from sst_jax.inference.sampling import Scores
from sst_jax.inference.session import Request
from sst_jax.serving.protocol import Call, Limits, Refused, read_chat, read_completion
from sst_jax.serving.queue import Job
from sst_jax.serving.responses import Writer
from tests.support.template_folders import TEMPLATES, write_byte_level, write_metaspace


@pytest.fixture(scope="module")
def spaced(tmp_path_factory):
    """A vocabulary that writes spaces as "▁" and drops the first one."""
    folder = tmp_path_factory.mktemp("spaced")
    write_metaspace(folder, None)
    return load_tokenizer(folder)


def answered(tokenizer, prompt, answer, echo):
    """The response to a prompt whose answer was scored, each token beside "▁" and "c" as the best of all."""
    request = Request(tuple(tokenizer.encode(prompt)), len(answer), scored=True)
    job = Job(request, IncrementalDetokenizer(tokenizer, (), request.tokens), lambda text, reason: None)
    job.answer.add(answer, [1] * len(answer), True)
    best = np.array([tokenizer.piece_id("▁"), tokenizer.piece_id("c")])
    job.scores = [Scores(np.float32(-1), best, np.array([-1.0, -2.0])) for _ in answer]
    job.prompt_scores = [Scores(np.float32(-2), best, np.array([-1.0, -2.0])) for _ in request.tokens[1:]]
    call = Call(False, [request], [tokenizer.decode(request.tokens)] if echo else [], logprobs=2, echo=echo)
    return Writer(call, "tiny", tokenizer).whole([job])["choices"][0]


def test_tokens_of_log_probabilities_keep_their_spaces(spaced):
    """So that " c" and "c" are two, and the pieces are the text."""
    answer = [spaced.piece_id(piece) for piece in "▁cat"]
    alone, echoed = (answered(spaced, "the", answer, echo) for echo in (False, True))
    assert (alone["text"], echoed["text"]) == (" cat", "the cat")
    assert alone["logprobs"]["tokens"] == [" ", "c", "a", "t"]
    assert echoed["logprobs"]["tokens"] == ["", "", *"the", " ", *"cat"]
    assert alone["logprobs"]["text_offset"] == [0, 1, 2, 3]
    for choice in (alone, echoed):
        assert "".join(choice["logprobs"]["tokens"]) == choice["text"]
        assert all(top == {" ": -1.0, "c": -2.0} for top in choice["logprobs"]["top_logprobs"][-4:])


# ------------------------------------------------------------------------------------------------------------ requests

HI = {"role": "user", "content": "hi"}


@pytest.fixture(scope="module")
def thinker(model, tmp_path_factory):
    """A model whose template reads enable_thinking, and takes roles in any order."""
    folder = tmp_path_factory.mktemp("thinker")
    write_byte_level(folder, TEMPLATES["qwen3"])
    return Model(model.config, model.params, load_tokenizer(folder))


def chat(model, *messages, **body):
    (request, *_) = read_chat({"messages": list(messages), **body}, model, "tiny", Limits()).requests
    return request


def refused(read, *arguments, **body):
    with pytest.raises(Refused) as found:
        read(*arguments, **body)
    assert found.value.status == 400
    return found.value


@pytest.mark.parametrize(
    "messages",
    [
        [HI, HI],
        [{"role": "developer", "content": "Be brief."}, HI],
        [HI, {"role": "assistant", "content": "yes"}, {"role": "system", "content": "now in French"}, HI],
        [{"role": "assistant", "content": "Ask me."}, HI],
        [HI, {"role": "assistant", "content": "I look"}, {"role": "tool", "content": "5", "tool_call_id": "c1"}],
        [HI, {"role": "assistant", "content": "x", "reasoning_content": "hm"}, HI],
        [{**HI, "name": "Ann", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]}],
    ],
)
def test_every_conversation_that_the_template_takes(thinker, messages):
    assert list(chat(thinker, *messages).tokens) == thinker.tokenizer.chat(messages)


def test_answers_of_other_servers_are_taken_back(thinker):
    """With the empty fields that OpenAI's have; a tool's call is refused by name."""
    back = {"role": "assistant", "content": "x", "refusal": None, "annotations": [], "tool_calls": [], "audio": None}
    assert chat(thinker, HI, back, HI).tokens == chat(thinker, HI, {"role": "assistant", "content": "x"}, HI).tokens
    for field, value in (("tool_calls", [{"id": "c1"}]), ("audio", {"id": "a"}), ("annotations", ["x"])):
        assert field in str(refused(chat, thinker, HI, {**back, field: value}))


def test_variables_of_the_template(thinker, model):
    plain = chat(thinker, HI)
    quiet = chat(thinker, HI, chat_template_kwargs={"enable_thinking": False})
    assert list(quiet.tokens) == thinker.tokenizer.chat([HI], variables={"enable_thinking": False})
    assert quiet.tokens[: len(plain.tokens)] == plain.tokens != quiet.tokens
    assert chat(thinker, HI, chat_template_kwargs=None).tokens == plain.tokens
    for asked, value in ((thinker, {"date": "x"}), (thinker, {"messages": []}), (thinker, [1]), (model, {"a": 1})):
        assert refused(chat, asked, HI, chat_template_kwargs=value).param == "chat_template_kwargs"
    with pytest.raises(Refused, match="has no variable 'enable_thinkin'; it has enable_thinking"):
        chat(thinker, HI, chat_template_kwargs={"enable_thinkin": False})


NEUTRAL = {
    "tool_choice": ["none", "auto"], "parallel_tool_calls": [True, False], "service_tier": ["auto", "default"],
    "stream_options": [{"include_obfuscation": False}, {"include_usage": True, "include_obfuscation": False}],
    "top_k": [-1, 0], "min_p": [0, 0.0], "repetition_penalty": [1, 1.0], "skip_special_tokens": [True],
    "modalities": [["text"]], "ignore_eos": [False], "stop_token_ids": [[]], "add_generation_prompt": [True],
    "tools": [[]], "response_format": [{"type": "text"}], "prompt_cache_key": ["k"], "safety_identifier": ["u"],
}  # fmt: skip
MEANT = {
    "tool_choice": "required", "service_tier": "priority", "stream_options": {"include_obfuscation": True}, "top_k": -2,
    "min_p": 0.1, "repetition_penalty": 1.1, "skip_special_tokens": False, "modalities": ["audio"], "ignore_eos": True,
    "stop_token_ids": [3], "add_generation_prompt": False, "tools": [{"type": "function"}], "top_p": -0.1,
    "response_format": {"type": "json_object"}, "prediction": {"type": "content"},
}  # fmt: skip


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in NEUTRAL.items() for value in values])
def test_values_that_change_nothing_are_taken(model, field, value):
    seeded = {"seed": 3, "temperature": 0.5}
    assert chat(model, HI, **seeded, **{field: value}) == chat(model, HI, **seeded)
    body = {"prompt": "x", **seeded}
    plain, found = (read_completion(each, model, "tiny", Limits()) for each in (body, {**body, field: value}))
    assert found.requests == plain.requests


@pytest.mark.parametrize(("field", "value"), MEANT.items())
def test_values_that_would_change_the_answer_are_refused(model, field, value):
    assert refused(chat, model, HI, **{field: value}).param == field
    assert refused(read_completion, {"prompt": "x", field: value}, model, "tiny", Limits()).param == field


def test_top_p_of_nothing_is_the_top_token_alone(model):
    sampling = chat(model, HI, top_p=0, temperature=1).sampling
    assert 0 < sampling.top_p < 1e-6


def test_special_tokens_in_a_prompt_are_asked_for(thinker):
    def tokens(**body):
        return list(read_completion({"prompt": "<|im_start|>a", **body}, thinker, "tiny", Limits()).requests[0].tokens)

    assert tokens(parse_special=True) == [0, 3, *thinker.tokenizer.encode_text("a")]
    assert tokens() == tokens(parse_special=False) == thinker.tokenizer.encode("<|im_start|>a")


def test_tokens_beyond_the_table_are_refused(model, tmp_path):
    write_byte_level(tmp_path, TEMPLATES["chatml"])
    tokenizer = load_tokenizer(tmp_path)
    tokenizer.set_rows(model.config.backbone.vocab_size)
    lacking = Model(model.config, model.params, tokenizer)
    error = refused(read_completion, {"prompt": "a <think>"}, lacking, "tiny", Limits())
    assert error.param == "prompt"
    assert "the token '<think>' has the id" in str(error)
    error = refused(chat, lacking, {"role": "user", "content": "<think>"})
    assert (error.param, "the token '<think>'" in str(error)) == ("messages", True)
