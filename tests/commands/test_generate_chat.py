"""generate: system messages, variables of the chat template, special tokens in prompts."""

import json

import pytest

import sst_jax
from sst_jax import generate
from sst_jax.console.command import run
from sst_jax.families.registry import backbone
from sst_jax.inference.model import Model
from sst_jax.model import decoder
from sst_jax.model.config import ModelConfig
from tests.support.template_folders import TEMPLATES, write_byte_level


@pytest.fixture(scope="module")
def thinker(tmp_path_factory):
    """A base folder of a tiny model whose template reads enable_thinking."""
    import jax

    from sst_jax.data.tokenizer import load_tokenizer

    folder = tmp_path_factory.mktemp("thinker")
    write_byte_level(folder / "tokenizer", TEMPLATES["qwen3"])
    shape = {"num_layers": 1, "d_model": 16, "d_ff": 16, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8}
    config = ModelConfig(backbone("qwen3", **shape, vocab_size=288, max_positions=256, query_pre_attn_scalar=8.0))
    params = decoder.init_params(config, jax.random.key(0))
    return Model(config, params, load_tokenizer(folder / "tokenizer")).save(folder / "base")


def said(thinker, tmp_path, *flags):
    out = tmp_path / "answers.json"
    code = run(generate.main, ["--model", str(thinker), *flags, "--max-new-tokens", "2", "--json", str(out)])
    return json.loads(out.read_text())["answers"][0] if code == 0 else code


def test_a_system_message_and_variables_reach_the_template(thinker, tmp_path):
    model = sst_jax.load(thinker)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    off = {"enable_thinking": False}
    for flags, given, variables in (
        (["--system", "Be brief."], messages, {}),
        (["--template-arg", "enable_thinking=false"], messages[1:], off),
        (["--system", "Be brief.", "--template-arg", "enable_thinking=false"], messages, off),
    ):
        expected = model.generate([model.tokenizer.chat(given, variables=variables)], max_new_tokens=2)[0]
        answer = said(thinker, tmp_path, "--chat", "--prompt", "hi", *flags)
        assert (answer["tokens"], answer["prompt_tokens"]) == (expected.tokens, expected.prompt_tokens)
        answer = said(thinker, tmp_path, "--question", "hi", "--format", "chat", *flags)
        assert (answer["tokens"], answer["prompt_tokens"]) == (expected.tokens, expected.prompt_tokens)
        system = "Be brief." if given is messages else None
        (answer,) = model.generate("hi", chat=True, system=system, template_args=variables, max_new_tokens=2)
        assert answer == expected


def test_special_tokens_are_asked_for(thinker, tmp_path, caplog):
    text = "<|im_start|>user\nhi<|im_end|>\n"
    plain = said(thinker, tmp_path, "--prompt", text)
    assert "a prompt holds '<|im_start|>'" in caplog.text
    special = said(thinker, tmp_path, "--prompt", text, "--parse-special")
    assert special["prompt_tokens"] == 1 + len("user\nhi\n") + 2
    assert plain["prompt_tokens"] == 1 + len(text)


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (["--prompt", "x", "--system", "y"], "--system and --template-arg go with --chat"),
        (["--prompt", "x", "--template-arg", "a=1"], "--system and --template-arg go with --chat"),
        (["--question", "x", "--system", "y"], "--system and --template-arg go with --chat, or --question in"),
        (["--prompt", "x", "--chat", "--parse-special"], "--parse-special goes with a prompt as it stands"),
        (["--prompt", "x", "--chat", "--template-arg", "thinking"], "--template-arg thinking: write NAME=VALUE"),
        (["--prompt", "x", "--chat", "--template-arg", "=1"], "--template-arg =1: write NAME=VALUE"),
        (["--prompt", "x", "--chat", "--template-arg", "date=1"], "no variable 'date'; it has enable_thinking"),
    ],
)
def test_what_does_not_go_together_is_named(thinker, tmp_path, capsys, flags, what):
    assert said(thinker, tmp_path, *flags) == 2
    assert what in capsys.readouterr().err
