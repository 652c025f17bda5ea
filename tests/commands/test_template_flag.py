"""--chat-template of convert and export: what is written has that template, and fills it in as transformers does."""

import dataclasses
import json
import shutil

import pytest
from transformers import AutoTokenizer

import sst_jax
from sst_jax import convert, export
from sst_jax.console.command import run
from sst_jax.data.template_file import use_template_file
from tests.support import torch_exports, toys
from tests.support.checkpoints import random_state, write_checkpoint
from tests.support.template_folders import CONVERSATIONS, SPECIALS, TEMPLATES, WORDS, write_byte_level

BACKBONE = dataclasses.replace(toys.LLAMA, d_model=36, vocab_size=len(SPECIALS) + 256 + len(WORDS))
SOURCE = TEMPLATES["llama3"]
TURNS = CONVERSATIONS["turns"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama whose tokenizer has Qwen's template, and a file with Llama's."""
    root = tmp_path_factory.mktemp("template")
    write_checkpoint(root / "model", random_state(BACKBONE), BACKBONE)
    write_byte_level(root / "model", TEMPLATES["qwen3"])
    (root / "turns.jinja").write_text(SOURCE, encoding="utf-8-sig")
    return root


def wanted(folder):
    """The ids that transformers gives with the file's template."""
    theirs = AutoTokenizer.from_pretrained(folder / "model")
    return theirs.apply_chat_template(TURNS, chat_template=SOURCE, add_generation_prompt=True)["input_ids"]


def assert_template_written(out, folder):
    theirs = AutoTokenizer.from_pretrained(out)
    assert theirs.chat_template == SOURCE
    assert theirs.apply_chat_template(TURNS, add_generation_prompt=True)["input_ids"] == wanted(folder)
    assert sst_jax.load(out).tokenizer.chat(TURNS) == wanted(folder)
    ends = json.loads((out / "generation_config.json").read_text())["eos_token_id"]
    assert theirs.convert_tokens_to_ids("<|eot_id|>") in ends


def test_a_base_keeps_the_template_and_so_does_its_export(folder, tmp_path):
    flags = ["--chat-template", str(folder / "turns.jinja")]
    assert run(convert.main, ["--from", str(folder / "model"), "--to", str(tmp_path / "base"), *flags]) == 0
    assert sst_jax.load(tmp_path / "base").tokenizer.chat(TURNS) == wanted(folder)
    out = ["--to", str(tmp_path / "merged"), "--format", "merged", "--no-measure-gap"]
    assert run(export.main, ["--from", str(tmp_path / "base"), *out]) == 0
    assert_template_written(tmp_path / "merged", folder)


def test_an_export_has_the_template_in_place_of_the_models_own(folder, tmp_path):
    out = ["--to", str(tmp_path / "merged"), "--format", "merged", "--no-measure-gap"]
    out += ["--chat-template", str(folder / "turns.jinja")]
    assert run(export.main, ["--from", str(folder / "model"), *out]) == 0
    assert_template_written(tmp_path / "merged", folder)


@pytest.mark.parametrize("kind", ["sst", "adapter"])
def test_a_vocabulary_without_a_template_gets_it_in_every_format(folder, tmp_path, kind):
    ours = torch_exports.model({})
    use_template_file(ours.tokenizer, folder / "turns.jinja", "--chat-template")
    torch_exports.write(ours, tmp_path / kind, kind)
    theirs = AutoTokenizer.from_pretrained(tmp_path / kind)
    assert theirs.chat_template == SOURCE
    assert theirs.apply_chat_template(TURNS)["input_ids"] == ours.tokenizer.chat(TURNS, add_generation_prompt=False)


def test_a_converted_model_of_ours_is_given_one(folder, finished, tmp_path):
    """A training run is opened whole, and not streamed from its source."""
    flags = ["--chat-template", str(folder / "turns.jinja")]
    assert run(convert.main, ["--from", str(finished), "--to", str(tmp_path / "base"), *flags]) == 0
    assert sst_jax.load(tmp_path / "base").tokenizer.template.source == SOURCE


@pytest.mark.parametrize("command", [convert, export])
def test_without_a_tokenizer_there_is_nothing_to_fill_in(folder, tmp_path, command, capsys):
    shutil.copytree(folder / "model", tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    flags = ["--from", str(tmp_path / "bare"), "--to", str(tmp_path / "out")]
    flags += ["--format", "merged"] if command is export else []
    flags += ["--chat-template", str(folder / "turns.jinja")]
    assert run(command.main, flags) == 2
    message = capsys.readouterr().err
    assert f"--chat-template={folder / 'turns.jinja'}: {tmp_path / 'bare'} holds no tokenizer" in message
    assert not (tmp_path / "out").exists()
