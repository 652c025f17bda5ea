"""Greedy answers end where transformers' do, whichever file of the folder says so, and so do those of exports."""

import dataclasses
import itertools
import json

import numpy as np
import pytest

import sst_jax
from sst_jax import export
from sst_jax.console.command import run
from sst_jax.data.tokenizer import load_tokenizer
from sst_jax.errors import InputError
from sst_jax.families.registry import FAMILIES, backbone
from sst_jax.weights.huggingface import write_folder
from tests.support.template_folders import SPECIALS, TEMPLATES, write_byte_level
from tests.support.tiny_files import drawn, written

END = SPECIALS.index("<|end_of_role|>")  # a token whose name tells nothing
WIDTH = 288


@pytest.fixture(scope="module")
def scripted(tmp_path_factory):
    """A folder whose model writes "abc", END, "def", whatever came before "a"."""
    folder = tmp_path_factory.mktemp("scripted")
    write_byte_level(folder / "tokenizer", TEMPLATES["chatml"])
    ids = [load_tokenizer(folder / "tokenizer").encode_text(c)[0] for c in "abcdef"]
    chain = [*ids[:3], END, *ids[3:]]
    shape = {"num_layers": 1, "d_model": WIDTH, "d_ff": 8, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8}
    config = backbone("llama", **shape, vocab_size=WIDTH, max_positions=64, tied_head=False, query_pre_attn_scalar=8.0)
    layer = {
        "q": (WIDTH, 16), "k": (WIDTH, 8), "v": (WIDTH, 8), "o": (16, WIDTH),
        "gate": (WIDTH, 8), "up": (WIDTH, 8), "down": (8, WIDTH),
    }  # fmt: skip
    head = np.zeros((WIDTH, WIDTH), np.float32)
    for before, after in itertools.pairwise(chain):
        head[after, before] = 1.0
    ones = np.ones((1, WIDTH), np.float32)
    base = {
        "embed": {"embedding": np.eye(WIDTH, dtype=np.float32)}, "head": {"embedding": head},
        "final_norm": {"scale": ones[0]},
        "layers": {
            **{name: {"kernel": np.zeros((1, *size), np.float32)} for name, size in layer.items()},
            "pre_attn_norm": {"scale": ones}, "pre_ffn_norm": {"scale": ones},
        },
    }  # fmt: skip
    files = {file.name: file.read_bytes() for file in (folder / "tokenizer").iterdir()}
    write_folder(folder / "model", config, base, "float32")
    for name, data in files.items():
        (folder / "model" / name).write_bytes(data)
    return folder / "model"


def said(folder, generation, config):
    """The folder, where these files name the tokens that end an answer."""
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 0, "temperature": 0.6, **generation}))
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token_id": None, **config}))
    return folder


@pytest.mark.fast_cases(3)
@pytest.mark.parametrize(
    ("generation", "config"),
    [
        ({"eos_token_id": [1, END]}, {}),
        ({"eos_token_id": END}, {}),
        ({"eos_token_id": [END, 1]}, {"eos_token_id": 1}),
        ({}, {"eos_token_id": [1, END]}),
        ({"eos_token_id": [1]}, {"eos_token_id": 1}),
    ],
)
def test_greedy_answers_end_where_transformers_does(scripted, generation, config):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    folder = said(scripted, generation, config)
    model = sst_jax.load(folder, "float32")
    if not generation:  # which transformers would read instead of config.json's
        (folder / "generation_config.json").unlink()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    prompt = model.tokenizer.encode("a")
    (answer,) = model.generate([prompt], max_new_tokens=6)
    expected = theirs.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=6)[0, len(prompt) :]
    assert answer.tokens == expected.tolist()
    stops = END in [*np.atleast_1d(generation.get("eos_token_id", 1)), *np.atleast_1d(config.get("eos_token_id", 1))]
    assert (answer.text, answer.finished) == (("bc", True) if stops else ("bcdef", False))


def test_exports_keep_the_stop_ids_and_how_to_sample(scripted, tmp_path):
    """Of the folder, and of a base folder that it was converted into; what reads them stops there too."""
    folder = said(scripted, {"eos_token_id": [END, 1], "top_p": 0.9}, {"eos_token_id": 1})
    own = sst_jax.load(folder, "float32")
    own.save(tmp_path / "base")
    for source in (folder, tmp_path / "base"):
        target = tmp_path / f"from-{source.name}"
        assert run(export.main, ["--from", str(source), "--to", str(target), "--format", "merged"]) == 0
        written = json.loads((target / "generation_config.json").read_text())
        assert written["eos_token_id"][:2] == [END, 1]
        assert set(written["eos_token_id"]) == own.tokenizer.stop_ids
        assert (written["temperature"], written["top_p"], written["bos_token_id"]) == (0.6, 0.9, 0)
        assert sst_jax.load(target, "float32").generate(["a"], max_new_tokens=6)[0].text == "bc"
    own.with_stream(alpha=0.1).save(tmp_path / "stream")
    assert run(export.main, ["--from", str(tmp_path / "stream"), "--to", str(tmp_path / "sst"), "--format", "sst"]) == 0
    written = json.loads((tmp_path / "sst" / "generation_config.json").read_text())
    config = json.loads((tmp_path / "sst" / "config.json").read_text())
    assert END in config["eos_token_id"] == written["eos_token_id"]
    assert "top_p" in written
    assert "top_p" not in config


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_answers_of_every_family_end_where_transformers_does(family, tmp_path):
    """At a token that generation_config.json alone names, of the folder and of what is exported from it."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    shape = dataclasses.replace(family.tiny, vocab_size=WIDTH)
    folder = written(tmp_path / "model", shape, drawn(shape))
    write_byte_level(folder, TEMPLATES["chatml"])
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer("the cab sat")["input_ids"]

    def theirs(folder):
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        return model.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=12)[0, len(prompt) :].tolist()

    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": WIDTH - 1}))  # which it does not write
    whole = theirs(folder)
    assert len(whole) == 12
    # Tied heads may write one token for ever: they end at once.
    end = next((token for at, token in enumerate(whole) if at > 2 and token not in whole[:at]), whole[0])
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": [1, end]}))
    expected = theirs(folder)
    assert expected == whole[: min(whole.index(token) for token in (1, end) if token in whole) + 1]
    assert run(export.main, ["--from", str(folder), "--to", str(tmp_path / "merged"), "--format", "merged"]) == 0
    kept = json.loads((tmp_path / "merged" / "generation_config.json").read_text())["eos_token_id"]
    assert kept[:2] == [1, end]
    assert theirs(tmp_path / "merged") == expected
    for source in (folder, tmp_path / "merged"):
        (answer,) = sst_jax.load(source, "float32").generate([prompt], max_new_tokens=12)
        assert (answer.tokens, answer.finished) == (expected, True)
        assert answer.text == tokenizer.decode(expected[:-1], skip_special_tokens=True)


def test_suppressed_tokens_are_never_chosen(scripted, tmp_path):
    """As transformers reads `suppress_tokens`, and drawn at a high temperature; exports carry it on."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    plain = sst_jax.load(said(scripted, {"eos_token_id": 1}, {"eos_token_id": 1}), "float32")
    prompt = plain.tokenizer.encode("a")
    (whole,) = plain.generate([prompt], max_new_tokens=6)
    hidden = [whole.tokens[2], 2**20]  # the second is beyond the vocabulary
    folder = said(scripted, {"eos_token_id": 1, "suppress_tokens": hidden[:1]}, {"eos_token_id": 1})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    expected = theirs.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=6)[0, len(prompt) :].tolist()
    assert expected[:2] == whole.tokens[:2]
    assert expected[2] != hidden[0]
    for ids in (hidden[:1], hidden):
        folder = said(scripted, {"eos_token_id": 1, "suppress_tokens": ids}, {"eos_token_id": 1})
        model = sst_jax.load(folder, "float32")
        assert model.generate([prompt], max_new_tokens=6)[0].tokens == expected
        drawn_tokens = [model.generate([prompt] * 4, max_new_tokens=24, temperature=9.0, seed=n) for n in range(4)]
        assert hidden[0] not in [token for answers in drawn_tokens for answer in answers for token in answer.tokens]
    model.with_stream(alpha=0.1).save(tmp_path / "stream")
    assert run(export.main, ["--from", str(tmp_path / "stream"), "--to", str(tmp_path / "sst"), "--format", "sst"]) == 0
    assert json.loads((tmp_path / "sst" / "generation_config.json").read_text())["suppress_tokens"] == hidden
    assert sst_jax.load(tmp_path / "sst", "float32").special_tokens.suppressed == tuple(hidden)


def test_suppressed_tokens_that_are_none_are_refused_by_name(scripted):
    folder = said(scripted, {"suppress_tokens": ["a"]}, {})
    with pytest.raises(InputError, match=r"generation_config\.json: suppress_tokens=\['a'\] must be a token id"):
        sst_jax.load(folder, "float32")
