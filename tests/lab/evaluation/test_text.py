"""Perplexity over windows of texts: against the model's own logits, paired, over documents, under a protocol."""

import dataclasses
import hashlib
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sst_jax import evaluate
from sst_jax.console.command import run as command
from sst_jax.data.tokenizer import ByteTokenizer
from sst_jax.errors import InputError
from sst_jax.inference.model import Model
from sst_jax.lab import evaluation
from sst_jax.lab.evaluation import protocol, text, text_summary
from sst_jax.model import decoder, links
from tests.support import toys

BACKBONE = dataclasses.replace(toys.LLAMA, vocab_size=ByteTokenizer.vocab_size)
LINK = {"links": [[2, 0]], "alpha": 0.3, "timing": "same", "state": "block"}
WORDS = "the quick brown fox jumps over the lazy dog and runs along the river to the old mill by the wood "
RECORD = {
    "data": "texts.jsonl", "window": 16, "windows": 8, "batch_size": 4, "baseline": "plain",
    "settings": {"plain": {"stream": None}, "weak": {"depth": 2, "stream": {**LINK, "alpha": 0.01}},
                 "strong": {"depth": 2, "stream": {**LINK, "alpha": 1.0}}},
    "choose": {"among": ["weak", "strong"],
               "controls": {"alpha 0": {"alpha": 0.0}, "random": {"states": "random"}, "prompt": {"prompt": 8}}},
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    config = toys.config(None, BACKBONE)
    return Model(config, toys.params(config), ByteTokenizer())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    rows = [{"text": WORDS[start:] + WORDS, "kind": "ab"[start // 2 % 2]} for start in range(4)]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "protocol.json").write_text(json.dumps(RECORD))
    return folder


@pytest.fixture(scope="module")
def measured(model, folder):
    fixed = protocol.read_protocol(folder / "protocol.json")
    return text.run(model, fixed, folder / "out"), fixed


def lines_of(folder):
    return [json.loads(line) for line in (folder / "out" / "outcomes.jsonl").read_text().splitlines()]


def test_nats_are_those_of_the_model_s_logits(measured, model, folder):
    """Token by token, plain and at depth 2, from log-softmax in numpy; windows follow one another in a document."""
    _, fixed = measured
    windows = {window.id: window for window in text.cut(model, text.read_documents(fixed.data), fixed)}
    bos = [model.tokenizer.bos_id]
    whole = [*windows["1:0"].tokens[1:], *windows["1:1"].tokens[1:]]
    assert windows["1:1"].tokens[:1] == bos
    assert model.tokenizer.decode(whole) == WORDS[1:31]
    linked = model.with_stream(**LINK | {"alpha": 0.01})
    for name, under, depth in (("plain", model, 1), ("weak", linked, 2)):
        line = next(line for line in lines_of(folder) if line["policy"] == name and line["id"] == "0:1")
        tokens = np.array([windows["0:1"].tokens])
        logits = np.asarray(under.logits(tokens, depth=depth), np.float64)[0]
        logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        truth = -logp[np.arange(15), tokens[0, 1:]]
        assert np.allclose(line["nats"], truth, atol=2e-4)
        assert line["loss"] == pytest.approx(truth.sum(), abs=1e-3)
    scales = measured[0]["stages"]["choose"]["policies"]
    assert len(scales["plain"]["rms"]) == 3  # residual stream, by layer
    assert len(scales["weak"]["rms"]) == 2 * 3 * 2  # and states, by iteration


def test_what_is_chosen_is_tested_on_the_other_documents(measured, folder):
    result, _ = measured
    choosing, test = result["stages"]["choose"], result["stages"]["test"]
    stages = {
        stage: {line["document"] for line in lines_of(folder) if line["stage"] == stage} for stage in result["stages"]
    }
    assert stages == {"choose": {0, 2}, "test": {1, 3}}
    nats = {name: found["nats_per_token"]["value"] for name, found in choosing["policies"].items()}
    assert test["chosen"] == min(("weak", "strong"), key=nats.get)
    assert list(test["policies"]) == ["plain", test["chosen"], "alpha 0", "random", "prompt"]
    identical = {record["setting"]: record["identical"] for record in test["paired"]}
    assert identical == {test["chosen"]: False, "alpha 0": True, "random": False, "prompt": False}


def test_the_protocol_s_digest_is_kept(measured, folder):
    result, _ = measured
    assert result["protocol_sha256"] == hashlib.sha256((folder / "protocol.json").read_bytes()).hexdigest()
    assert json.loads((folder / "out" / "evaluation.json").read_text())["protocol_sha256"] == result["protocol_sha256"]


def test_documents_are_rows_or_a_whole_file(tmp_path):
    """U+2028 ends no line of JSON, and a byte order mark is no text."""
    rows = [{"text": "one\u2028two"}, {"text": "three", "kind": "novel"}]
    lines = "\ufeff" + "".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows)
    expected = [{"text": "one\u2028two", "kind": "text"}, {"text": "three", "kind": "novel"}]
    for name, content in (("a.jsonl", lines), ("a.json", json.dumps(rows)), ("a.txt", "\ufeffthree")):
        (tmp_path / name).write_text(content, encoding="utf-8", newline="")
    assert text.read_documents(tmp_path / "a.jsonl") == expected
    assert text.read_documents(tmp_path / "a.json") == expected
    assert text.read_documents(tmp_path / "a.txt") == [{"text": "three", "kind": "text"}]
    (tmp_path / "b.jsonl").write_text('{"text": "x"}\n{"text": 3}\n')
    with pytest.raises(InputError, match=r"b\.jsonl, line 2: a document is"):
        text.read_documents(tmp_path / "b.jsonl")
    (tmp_path / "c.txt").write_bytes(b"\xff\xfe\x00a")
    with pytest.raises(InputError, match=r"c\.txt: is UTF-16"):
        text.read_documents(tmp_path / "c.txt")


def test_a_line_that_a_kill_cut_off_is_measured_again(measured, model, folder, tmp_path, monkeypatch):
    result, fixed = measured
    shutil.copytree(folder / "out", tmp_path / "out")
    file = tmp_path / "out" / "outcomes.jsonl"
    file.write_bytes(file.read_bytes()[:-40])
    again, measure = [], text.measure
    monkeypatch.setattr(text, "measure", lambda *arguments: again.append(arguments) or measure(*arguments))
    resumed = text.run(model, fixed, tmp_path / "out")
    assert len(again) == 1
    assert [line["nats"] for line in lines_of(tmp_path)] == [line["nats"] for line in lines_of(folder)]
    shown = {name: record["perplexity"] for name, record in resumed["policies"].items()}
    assert shown == {name: record["perplexity"] for name, record in result["policies"].items()}


def test_a_second_call_measures_nothing_again(measured, model, folder, monkeypatch):
    result, fixed = measured
    monkeypatch.setattr(text, "measure", None)
    assert text.run(model, fixed, folder / "out")["stages"] == result["stages"]
    other = dataclasses.replace(fixed, windows=4, sha256="")
    with pytest.raises(InputError, match="holds another evaluation"):
        text.run(model, other, folder / "out")


def test_intervals_resample_documents():
    """Two documents: the interval ends at their means, whatever the windows' spread; bins are means of columns."""
    lines = [{"document": at // 3, "kind": "x", "seconds": 0.0, "nats": [1.0 + 5 * at] * 20} for at in range(6)]
    found = text_summary.summarise({"plain": [{**line, "nats": [1.0] * 20} for line in lines], "b": lines}, "plain")
    (record,) = found["paired"]
    assert record["difference"] == pytest.approx({"value": 12.5, "low": 5.0, "high": 20.0})
    assert [(part["from"], part["to"]) for part in record["by_position"]] == [(0, 16), (16, 20)]
    assert found["policies"]["b"]["perplexity"]["value"] == pytest.approx(np.exp(13.5))


def test_earlier_and_random_states_enter_instead(model):
    """Earlier ones: passes that are handed the states of so many steps before end at the same hidden states.

    Random ones: as long as those that they stand for.
    """
    config = model.with_stream(**LINK).config
    params, tokens, delay = toys.params(config), toys.tokens(2, 8), 2

    def taken_before(entering):  # [L, B, S, D]
        return entering.at[:, :, delay:].set(entering[:, :, :-delay])

    context = decoder.row_context(config, tokens, depth=2)
    wrong = text.earlier_states(3, 2, BACKBONE.d_model, delay)
    found = toys.quick_jit(lambda: links.scan_stack(params, tokens, context, intervene=wrong).hidden[:, :, 0])()

    def settled(change):
        x = links.fixed_point_stack(params, tokens, context, cap=17, intervene=change).x
        return decoder.read_out(config, params, x, 2)[:, :, 0]

    truth, own = toys.quick_jit(lambda: (settled(taken_before), settled(None)))()
    assert np.linalg.norm(found - truth) <= 1e-5 * np.linalg.norm(truth)
    assert np.linalg.norm(found - own) > 1e-2 * np.linalg.norm(own)
    states = np.random.default_rng(0).standard_normal((3, 2, 32)).astype(np.float32)
    _, noise = text.random_states(jax.random.key(0)).change(None, jnp.asarray(states), jnp.int32(3))
    assert np.allclose(np.linalg.norm(noise, axis=-1), np.linalg.norm(states, axis=-1), rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "culprit"),
    [
        ({"baseline": "none"}, "'none' is none of the settings"),
        ({"window": 1}, "window=1"),
        ({"settings": {"plain": {"stream": {"alpha": 2}}}}, "stream.alpha"),
        ({"settings": {"plain": {"stream": "modle"}}}, "stream='modle' is not 'model'"),
        ({"settings": {"plain": {"layers": 2}}}, "has no field layers"),
        ({"choose": {"among": []}}, "among names no setting"),
        ({"windows": 8, "extra": 1}, "unknown key extra"),
    ],
)
def test_a_protocol_that_does_not_hold_is_named(change, culprit, tmp_path):
    (tmp_path / "p.json").write_text(json.dumps({**RECORD, **change}))
    with pytest.raises(InputError, match=culprit):
        protocol.read_protocol(tmp_path / "p.json")


@pytest.mark.slow
def test_evaluations_of_texts_are_compared_over_documents(measured, model, folder):
    """`compare` takes them, and windows of one document count as one; not those that chose among settings."""
    _, fixed = measured
    one = dataclasses.replace(fixed, settings={"plain": fixed.settings["plain"]}, choose={}, sha256="")
    other = dataclasses.replace(
        one, settings={"plain": dataclasses.replace(fixed.settings["weak"], name="plain")}, sha256=""
    )
    for name, mine in (("a", one), ("b", other)):
        text.run(model, mine, folder / name)
    (record,) = evaluation.compare([folder / "a"], [folder / "b"])["comparisons"]
    lines = [json.loads((folder / name / "result.json").read_text()) for name in "ab"]
    means = [line["policies"]["plain"]["nats_per_token"]["value"] for line in lines]
    assert record["over_documents"]["value"] == pytest.approx(means[0] - means[1], abs=1e-6)
    with pytest.raises(InputError, match="chose a setting"):
        evaluation.compare([folder / "out"], [folder / "a"])


@pytest.mark.parametrize(
    ("flags", "culprit"),
    [
        (["--task", "text"], "--task text needs --data FILE"),
        (["--task", "text", "--data", "missing.txt"], "missing.txt: no such file"),
        (["--task", "words", "--window", "64"], "--window goes with --task text"),
        (["--task", "text", "--protocol", "p.json", "--depth", "2"], "--depth is fixed by --protocol p.json"),
        (["--task", "text", "--data", "x.txt", "--grade", "exact"], "--grade is not for --task text"),
    ],
)
def test_flags_that_do_not_fit_are_named(flags, culprit, tmp_path, capsys):
    assert command(evaluate.main, ["--model", "random:tiny", "--out", str(tmp_path / "out"), *flags]) == 2
    assert culprit in capsys.readouterr().err


def test_the_command_measures_a_file(tmp_path, capsys):
    (tmp_path / "book.txt").write_text(WORDS * 3)
    flags = ["--task", "text", "--data", str(tmp_path / "book.txt"), "--window", "32", "--limit", "2"]
    assert command(evaluate.main, ["--model", "random:tiny", "--out", str(tmp_path / "out"), *flags]) == 0
    assert "perplexity" in capsys.readouterr().out
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert (tmp_path / "out" / "by_position.png").is_file()
    assert result["items"] == 2
    assert list(result["policies"]) == ["1"]
