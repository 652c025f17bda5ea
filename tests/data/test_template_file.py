"""A chat template from a file: the flag --chat-template, and the knob data.chat_template, whose run opens with it."""

import hashlib
import json

import pytest
from transformers import AutoTokenizer

from sst_jax.console.command import Parser, opening
from sst_jax.data.template_file import use_template_file
from sst_jax.data.tokenizer import load_tokenizer
from sst_jax.errors import InputError
from sst_jax.inference.model import load
from sst_jax.training import fit, read_recipe
from tests.support.template_folders import CONVERSATIONS, TEMPLATES, write_byte_level


def test_a_template_from_a_file_is_transformers_with_that_template(tmp_path):
    """The folder has ChatML's turns; the file has Llama's."""
    write_byte_level(tmp_path / "folder", TEMPLATES["qwen3"])
    name = next(name for name in TEMPLATES if name.startswith("llama3"))
    (tmp_path / "other.jinja").write_text(TEMPLATES[name])
    ours, theirs = load_tokenizer(tmp_path / "folder"), AutoTokenizer.from_pretrained(tmp_path / "folder")
    before = ours.chat(CONVERSATIONS["turns"])
    use_template_file(ours, tmp_path / "other.jinja", "--chat-template")
    found = ours.chat(CONVERSATIONS["turns"])
    wanted = theirs.apply_chat_template(
        CONVERSATIONS["turns"], chat_template=TEMPLATES[name], add_generation_prompt=True, return_dict=False
    )
    assert found == wanted != before


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot be read"), (b"\xff\xfe\x00", "cannot be read"), (b" \n", "is empty"), (b"{% for", "can be read")],
)
def test_a_file_that_is_no_template_is_refused_by_name(tmp_path, content, message):
    write_byte_level(tmp_path / "folder", TEMPLATES["qwen3"])
    file = tmp_path / "bad.jinja"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InputError, match=r"--chat-template=.*bad\.jinja") as raised:
        use_template_file(load_tokenizer(tmp_path / "folder"), file, "--chat-template")
    assert message in str(raised.value)


def test_the_flag_comes_with_every_model():
    parser = Parser(prog="p")
    parser.takes_model()
    assert opening(parser.parse_args(["--model", "m", "--chat-template", "f"])) == {"base": None, "chat_template": "f"}


@pytest.mark.optimised
@pytest.mark.slow
def test_a_run_keeps_the_template_that_it_is_trained_with(tmp_path):
    source = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</{{ m.role }}>{% endfor %}<assistant>"
    file = tmp_path / "turns.jinja"
    file.write_text(source)
    knobs = {
        "model.source": "random:tiny-llama", "train.steps": 1, "train.sample_tokens": 2, "data.limit": 8,
        "data.heldout": 2, "data.batch_size": 2, "data.format": "chat", "data.chat_template": str(file),
    }  # fmt: skip
    fit(read_recipe("tiny", knobs), tmp_path / "run")
    file.unlink()
    model = load(tmp_path / "run")
    asked = model.tokenizer.chat([{"role": "user", "content": "hi"}])
    assert model.tokenizer.decode(asked) == "<user>hi</user><assistant>"
    recorded = json.loads((tmp_path / "run" / "config.json").read_text())["data"]["chat template"]["sha256"]
    whole = source.encode()
    assert recorded in (hashlib.sha256(whole).hexdigest(), hashlib.sha256(whole + b"null").hexdigest())
    other = tmp_path / "other.jinja"
    other.write_text(source.replace("<", "["))
    with pytest.raises(InputError, match="another config"):
        fit(read_recipe("tiny", knobs | {"data.chat_template": str(other)}), tmp_path / "run")
    file.write_text(source.replace("<", "["))
    with pytest.raises(InputError, match="chat template"):
        fit(read_recipe("tiny", knobs), tmp_path / "run")
    with pytest.raises(InputError, match=r"is for data\.format=chat"):
        read_recipe("tiny", knobs | {"data.format": "plain"})
