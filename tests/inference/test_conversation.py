"""Talking to a model: each answer is `Model.generate`'s to the conversation so far, at the depth that holds then."""

import jax
import pytest

from sst_jax import chat
from sst_jax.data.tokenizer import load_tokenizer
from sst_jax.errors import InputError
from sst_jax.families.registry import backbone
from sst_jax.inference.conversation import Conversation, Settings
from sst_jax.inference.model import Model
from sst_jax.model import decoder
from sst_jax.model.config import ModelConfig
from tests.support.template_folders import TEMPLATES, write_byte_level

FEW = Settings(max_new_tokens=3)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model with a stream and a chat template, fully blended, so that depth changes what it says."""
    folder = tmp_path_factory.mktemp("talker")
    write_byte_level(folder, TEMPLATES["qwen3"])
    shape = {"num_layers": 1, "d_model": 16, "d_ff": 16, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8}
    config = ModelConfig(backbone("qwen3", **shape, vocab_size=288, max_positions=512, query_pre_attn_scalar=8.0))
    params = decoder.init_params(config, jax.random.key(0))
    return Model(config, params, load_tokenizer(folder)).with_stream(alpha=0.9, alpha_range=(0.0, 1.0))


def expected(model, messages, depth):
    prompt = model.tokenizer.chat([{"role": role, "content": content} for role, content in messages])
    return model.generate([prompt], depth=depth, max_new_tokens=3)[0].text


def test_answers_follow_the_conversation_and_the_depth_that_was_set(model):
    talk = Conversation(model, "1", "Be brief.", FEW)
    said = [("system", "Be brief."), ("user", "hi")]
    first = "".join(talk.say("hi"))
    assert first == expected(model, said, 1)
    assert talk.note.startswith("[depth 1; ")
    assert "".join(talk.say("/depth 3")) == "depth 3 from now on"
    said += [("assistant", first), ("user", "and?")]
    second = "".join(talk.say("and?"))
    assert second == expected(model, said, 3)
    assert "".join(talk.say("/again 1")) == expected(model, said, 1)
    assert talk.policy.name == "3"  # for the next one
    assert [message["role"] for message in talk.messages] == ["system", "user", "assistant", "user", "assistant"]
    "".join(talk.say("/system"))
    assert "".join(talk.say("hi")) == expected(model, [("user", "hi")], 3)


def test_what_is_refused_leaves_the_conversation_as_it_was(model):
    talk = Conversation(model, "2", None, FEW)
    "".join(talk.say("hi"))
    before = list(talk.messages)
    for line, message in (
        ("/dept 4", "/dept is not one of"),
        ("/depth deep", "depth='deep'"),
        ("/depth 0", "depth"),
        ("/set heat=1", "/set heat=1: write NAME=VALUE"),
        ("/set temperature=-1", "temperature"),
        ("a" * 600, "exceed the model's 512 positions"),
    ):
        with pytest.raises(InputError, match=r".") as raised:
            "".join(talk.say(line))
        assert message in str(raised.value)
        assert talk.messages == before
    with pytest.raises(InputError, match="nothing has been answered"):
        list(Conversation(model, "1").say("/again"))
    with pytest.raises(InputError, match="depth"):
        Conversation(model.without_stream(), "2")


def test_an_answer_that_is_broken_off_stays_as_far_as_it_came(model):
    talk = Conversation(model, "1", None, FEW)
    whole = expected(model, [("user", "hi")], 1)
    pieces = talk.say("hi")
    first = next(pieces)
    pieces.close()
    assert talk.messages[-1] == {"role": "assistant", "content": first}
    assert whole.startswith(first)


def test_the_command_reads_lines_until_it_is_told_to_end(model, monkeypatch, capsys):
    monkeypatch.setattr("sst_jax.inference.model.load", lambda *given, **named: model)
    lines = iter(["hi", "", "/nonsense", "/help", "/quit"])
    chat.main(["--model", "m", "--max-new-tokens", "3", "--depth", "2"], read=lambda prompt: next(lines))
    seen = capsys.readouterr()
    assert seen.out == expected(model, [("user", "hi")], 2) + "\n"
    assert "error: /nonsense is not one of" in seen.err
    assert "/depth I " in seen.err
    assert "[depth 2; " in seen.err
