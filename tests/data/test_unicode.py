"""Half a surrogate pair is named, wherever it comes from, before any work."""

import json
import subprocess
import sys

import pytest

from sst_jax import generate
from sst_jax.console.command import run
from sst_jax.data.problems import Problem
from sst_jax.data.prompts import read_prompts, render
from sst_jax.data.records import read_file
from sst_jax.data.tokenizer import ByteTokenizer, SentencePieceTokenizer, load_tokenizer
from sst_jax.data.unicode import check_unicode
from sst_jax.errors import InputError
from tests.data.test_tokenizer import _small_vocabulary
from tests.support.template_folders import TEMPLATES, write_byte_level

HALVES = ["\ud83d", "the cat \ud83d", "x\udfff y", "\udcff"]  # the last: a byte of a command line that is no UTF-8


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bytes")
    write_byte_level(folder, TEMPLATES["chatml"])
    pieces = SentencePieceTokenizer.from_gguf_vocabulary(*_small_vocabulary())
    pieces.use_template(TEMPLATES["chatml"])
    return [ByteTokenizer(), load_tokenizer(folder), pieces]


@pytest.mark.parametrize("half", HALVES)
def test_no_tokenizer_takes_it(tokenizers, half):
    for tokenizer in tokenizers:
        for make in (
            lambda tokenizer=tokenizer: tokenizer.encode(half),
            lambda tokenizer=tokenizer: tokenizer.encode_text(half),
            lambda tokenizer=tokenizer: tokenizer.encode(half, parse_special=True),
            lambda tokenizer=tokenizer: tokenizer.chat([{"role": "user", "content": half}]),
            lambda tokenizer=tokenizer: tokenizer.chat([{"role": half, "content": "x"}]),
            lambda tokenizer=tokenizer: render(Problem("x", half, "so", "5"), tokenizer),
            lambda tokenizer=tokenizer: render(Problem("x", "why", half, "5"), tokenizer, "chat"),
        ):
            with pytest.raises(InputError, match="is no valid Unicode"):
                make()


def test_the_place_is_told_in_text_and_in_json():
    with pytest.raises(InputError, match=r"the text is no valid Unicode: character 8, '\\ud83d', is half"):
        check_unicode("the cat \ud83d")
    for value in ({"a": [1, {"b": "\ud800"}]}, ["x", ["\ud800"]], {"\ud800": None}):
        with pytest.raises(InputError, match=r"line 3 is no valid Unicode: character 0, '\\ud800'"):
            check_unicode(value, "line 3")
    check_unicode({"a": ["\U0001f600", "\ufffe", 1.5, None, True]})


def test_a_file_of_prompts_is_named_with_its_line(tmp_path, capsys):
    file = tmp_path / "a.jsonl"
    file.write_text('{"prompt": "x"}\n' + json.dumps({"prompt": "the cat \ud83d"}) + "\n")
    for read in (lambda: read_prompts(str(file)), lambda: list(read_file(file))):
        with pytest.raises(InputError, match=r"a\.jsonl, line 2 is no valid Unicode: character 8, '\\ud83d'"):
            read()
    array = tmp_path / "a.json"
    array.write_text(json.dumps([{"prompt": "x"}, {"prompt": "\ud83d"}], indent=1))
    with pytest.raises(InputError, match=r"a\.json is no valid Unicode: character 0"):
        list(read_file(array))
    assert run(generate.main, ["--model", "random:tiny", "--prompts", str(file)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_bytes_of_a_command_line_that_are_no_text(tmp_path):
    command = [sys.executable, "-m", "sst_jax.generate", "--model", "random:tiny", "--prompt", b"x \xff"]
    found = subprocess.run(command, capture_output=True)
    assert found.returncode == 2
    assert found.stderr.startswith(b"error: --prompt is no valid Unicode: character 2")
    assert found.stderr.count(b"\n") == 1
