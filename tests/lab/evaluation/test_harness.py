"""The adapter for lm-evaluation-harness: against the harness's own Hugging Face backend, and against our logits."""

import copy
import dataclasses
import json
import shutil
from datetime import datetime

import numpy as np
import pytest

from sst_jax import evaluate
from sst_jax.console.command import run
from sst_jax.data import chat_template, template_date
from sst_jax.data.chat_template import ChatTemplate
from sst_jax.data.tokenizer import load_tokenizer
from sst_jax.errors import InputError
from sst_jax.inference.model import Model
from sst_jax.weights.huggingface import FolderExtras, write_folder
from tests.support.problems import gsm8k_lines, write_lines
from tests.support.template_folders import CONVERSATIONS, TEMPLATES, write_byte_level

pytest.importorskip("lm_eval", reason="the extra eval is not installed")

from lm_eval.api.instance import Instance
from transformers import PreTrainedTokenizerFast

from sst_jax.lab.evaluation import harness

PAIRS = [
    ("Question: 2 + 2?\nAnswer:", " 4"),
    ("Two trailing spaces  ", "moved over"),
    ("", "nothing before"),
    ("émile says", " déjà vu, and more than a window of sixteen positions"),
]
TEXTS = ["A text.", "Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich. " * 3, "x"]
UNTIL = [
    {"until": ["Question:"], "max_gen_toks": 12, "do_sample": False, "temperature": 0.0},
    {"until": "e", "max_gen_toks": 20},
    {"until": ["\x00"], "max_new_tokens": 5},
]


def instances(kind, arguments):
    return [Instance(kind, {}, argument, 0) for argument in arguments]


@pytest.fixture(scope="module")
def ascii_only(plain):
    """A model that writes ASCII: bytes that are no UTF-8 are shown in other ways by the other library."""
    embedding = plain.params["base"]["embed"]["embedding"]
    written = embedding.at[plain.tokenizer.encode_text("~")[0] + 1 :].set(0.0)
    base = {**plain.params["base"], "embed": {"embedding": written}}
    return Model(plain.config, {**plain.params, "base": base}, plain.tokenizer)


@pytest.fixture(scope="module")
def ours(ascii_only):
    return harness.HarnessModel(ascii_only, batch_size=3)


@pytest.fixture(scope="module")
def theirs(ascii_only, tmp_path_factory):
    pytest.importorskip("torch")
    from lm_eval.models.huggingface import HFLM

    folder = tmp_path_factory.mktemp("export") / "tiny"
    files, base = ascii_only.tokenizer.export_files(), ascii_only.params["base"]
    write_folder(folder, ascii_only.config.backbone, base, "float32", extras=FolderExtras(files))
    return HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=2)


def test_texts_become_the_same_tokens(ours, theirs):
    chat = ours.apply_chat_template([{"role": "user", "content": "hello"}])
    for text in [text for pair in PAIRS for text in pair] + TEXTS + [chat, chat[5:] + "<end_of_turn>"]:
        for special in (None, False):
            assert ours.tok_encode(text, add_special_tokens=special) == theirs.tok_encode(text, special), (
                text,
                special,
            )
    assert ours.tok_encode(chat) == ours.model.tokenizer.chat([{"role": "user", "content": "hello"}])


def test_the_chat_template_is_the_exported_one(ours, theirs):
    history = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "hi"},
        {"role": "user", "content": "bye"},
    ]
    assert ours.apply_chat_template(history) == theirs.apply_chat_template(history)
    opened = [*history, {"role": "assistant", "content": "The answer is"}]
    assert ours.apply_chat_template(opened, False) == theirs.apply_chat_template(opened, False)
    assert ours.chat_template(True) == theirs.chat_template(True)
    assert ours.chat_template(False) == ""


def test_a_models_own_template_is_the_harness_backends(ascii_only, ours, theirs, tmp_path):
    """Text and ids, where the model's turns are not Gemma's."""
    write_byte_level(tmp_path, TEMPLATES["chatml"])
    tokenizer = load_tokenizer(tmp_path)
    mine = harness.HarnessModel(ascii_only)
    mine.model = Model(ascii_only.config, ascii_only.params, tokenizer)
    backend = theirs.tokenizer
    theirs.tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    try:
        for history in CONVERSATIONS.values():
            text = mine.apply_chat_template(history)
            assert text == theirs.apply_chat_template(history)
            assert mine.tok_encode(text, add_special_tokens=False) == theirs.tok_encode(text, False)
            opened = [*history, {"role": "assistant", "content": "The answer is"}]
            assert mine.apply_chat_template(opened, False) == theirs.apply_chat_template(opened, False)
        assert mine.chat_template(True) == theirs.chat_template(True) == TEMPLATES["chatml"]
    finally:
        theirs.tokenizer = backend


def test_log_likelihoods_equal_the_harness_backend(ours, theirs):
    got = ours.loglikelihood(instances("loglikelihood", PAIRS), disable_tqdm=True)
    expected = theirs.loglikelihood(instances("loglikelihood", PAIRS), disable_tqdm=True)
    np.testing.assert_allclose([value for value, _ in got], [value for value, _ in expected], atol=1e-3)
    assert [greedy for _, greedy in got] == [greedy for _, greedy in expected]


@pytest.mark.parametrize("most", [None, 40])
def test_rolling_log_likelihoods_equal_the_harness_backend(ascii_only, theirs, monkeypatch, most):
    """Whole, and in windows of forty positions."""
    ours = harness.HarnessModel(ascii_only, batch_size=3, max_length=most)
    monkeypatch.setattr(theirs, "_max_length", most)
    requests = [(text,) for text in TEXTS]
    got = ours.loglikelihood_rolling(instances("loglikelihood_rolling", requests))
    expected = theirs.loglikelihood_rolling(instances("loglikelihood_rolling", requests), disable_tqdm=True)
    np.testing.assert_allclose(got, expected, atol=1e-3)


def test_greedy_texts_equal_the_harness_backend(ours, theirs):
    requests = [(context, settings) for context, _ in PAIRS if context for settings in UNTIL]
    got = ours.generate_until(instances("generate_until", requests))
    assert got == theirs.generate_until(instances("generate_until", requests), disable_tqdm=True)
    assert len(set(got)) > 3


def test_a_depth_is_the_models_own(streaming):
    ours = harness.HarnessModel(streaming, depth=3)
    context, continuation = PAIRS[0]
    ((value, _),) = ours.loglikelihood(instances("loglikelihood", [PAIRS[0]]), disable_tqdm=True)
    tokens = streaming.tokenizer.encode(context + continuation)
    logits = np.asarray(streaming.logits([tokens], depth=3), np.float64)[0]
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = sum(logprobs[i - 1, tokens[i]] for i in range(len(tokens) - len(continuation), len(tokens)))
    assert value == pytest.approx(expected, abs=1e-3)
    (text,) = ours.generate_until(instances("generate_until", [(context, UNTIL[0])]))
    prompt = streaming.tokenizer.encode(context)
    assert text == streaming.generate([prompt], depth=3, max_new_tokens=12, stop=["Question:"])[0].text


def test_sampling_is_asked_for_by_the_task(ours):
    warm = {"until": ["\x00"], "max_gen_toks": 12, "do_sample": True, "temperature": 1.0}
    first, second = ours.generate_until(instances("generate_until", [("Now", warm), ("Now", warm)]))
    assert first != second


def test_what_cannot_be_is_refused(plain, ours):
    with pytest.raises(InputError, match="depth=2 needs a model with a stream"):
        harness.HarnessModel(plain, 2)
    small = harness.HarnessModel(plain, max_length=64)
    with pytest.raises(InputError, match="max_gen_toks=64 leaves no room"):
        small.generate_until(instances("generate_until", [("x", {"until": [], "max_gen_toks": 64})]))


@pytest.fixture(scope="module")
def own_tasks(tmp_path_factory):
    """A folder with two tasks of our own over local files: multiple choice, and generation."""
    folder = tmp_path_factory.mktemp("tasks")
    questions = [{"q": f"{n} + 1 =", "choices": [f" {n + 1}", f" {n}"], "gold": 0} for n in range(3)]
    write_lines(folder / "choices.jsonl", questions)
    write_lines(folder / "test.jsonl", gsm8k_lines("test", 3))
    common = "dataset_path: json\ntest_split: test\nnum_fewshot: 0\n"
    (folder / "sums.yaml").write_text(
        f"task: sst_sums\n{common}dataset_kwargs:\n  data_files:\n    test: {folder}/choices.jsonl\n"
        "output_type: multiple_choice\ndoc_to_text: q\ndoc_to_choice: choices\ndoc_to_target: gold\n"
        "metric_list:\n  - metric: acc\n"
    )
    (folder / "bakers.yaml").write_text(
        f"task: sst_bakers\n{common}dataset_kwargs:\n  data_files:\n    test: {folder}/test.jsonl\n"
        'output_type: generate_until\ndoc_to_text: "Question: {{question}}\\nAnswer:"\ndoc_to_target: answer\n'
        "generation_kwargs:\n  until: ['Question:']\n  max_gen_toks: 6\nmetric_list:\n  - metric: exact_match\n"
    )
    return folder


@pytest.fixture(scope="module")
def manager(own_tasks):
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(own_tasks), include_defaults=False)


def test_tasks_run_through_the_harness_and_stand_when_run_again(streaming, manager, own_tasks, tmp_path, monkeypatch):
    names = ["sst_sums", "sst_bakers"]
    harness.check_names(manager, names)
    config = harness.HarnessConfig(tuple(names), (2,), "plain", batch_size=4)
    results = harness.measure(streaming, 2, config, {"tasks": names}, manager, tmp_path)
    assert results["sst_sums"]["acc,none"] in (0.0, pytest.approx(1 / 3), pytest.approx(2 / 3), 1.0)
    assert results["sst_bakers"]["exact_match,none"] == 0.0
    samples = [json.loads(line) for line in (tmp_path / "samples-sst_bakers-depth-2.jsonl").read_text().splitlines()]
    prompt = f"Question: {gsm8k_lines('test', 3)[0]['question']}\nAnswer:"
    expected = streaming.generate(prompt, depth=2, max_new_tokens=6, stop=["Question:"])[0].text
    assert samples[0]["resps"][0][0] == expected

    monkeypatch.setattr(harness, "simple_evaluate", None)
    assert harness.measure(streaming, 2, config, {"tasks": names}, manager, tmp_path) == results
    with pytest.raises(InputError, match="results of other settings"):
        harness.measure(streaming, 2, config, {"tasks": ["other"]}, manager, tmp_path)
    assert harness.measured(tmp_path, {"tasks": names}) == {"2": results}


def test_patterns_of_names_and_a_system_message(streaming, manager, tmp_path, monkeypatch):
    assert harness.matching(manager, ["sst_*", "sst_sums", "other"]) == ["sst_bakers", "sst_sums", "other"]
    with pytest.raises(InputError, match=r"--tasks nothing_\* is not a task"):
        harness.check_names(manager, ["nothing_*"])
    asked = []
    monkeypatch.setattr(
        harness,
        "simple_evaluate",
        lambda **given: asked.append(given) or {"results": {}, "samples": {}, "versions": {}},
    )
    config = harness.HarnessConfig(("sst_*",), (1,), "chat", system="Be brief.")
    harness.run(streaming, config, tmp_path, manager)
    assert (asked[0]["tasks"], asked[0]["system_instruction"]) == (["sst_bakers", "sst_sums"], "Be brief.")
    with pytest.raises(InputError, match="results of other settings"):
        harness.run(streaming, dataclasses.replace(config, system=None), tmp_path, manager)


def test_other_definitions_of_a_task_are_another_test(own_tasks, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(own_tasks, copy)
    assert harness.definitions(None) is None
    assert harness.definitions(str(own_tasks)) == harness.definitions(str(copy))
    (copy / "sums.yaml").write_text((copy / "sums.yaml").read_text().replace("num_fewshot: 0", "num_fewshot: 1"))
    assert harness.definitions(str(own_tasks)) != harness.definitions(str(copy))


def test_the_command_keeps_the_depths_that_were_measured_before(plain, own_tasks, tmp_path, capsys):
    folder = str(plain.with_stream(alpha=0.5).save(tmp_path / "model"))
    out = tmp_path / "out"
    arguments = ["--model", folder, "--tasks", "sst_sums", "--include", str(own_tasks), "--out", str(out)]
    assert run(evaluate.main, [*arguments, "--depth", "2"]) == 0
    assert run(evaluate.main, [*arguments, "--depth", "1"]) == 0
    assert list(json.loads((out / "result.json").read_text())["policies"]) == ["1", "2"]
    assert run(evaluate.main, [*arguments, "--limit", "2"]) == 2
    assert "results of other settings" in capsys.readouterr().err
    (out / "evaluation.json").write_text("{}")
    assert run(evaluate.main, arguments) == 2
    assert "holds an evaluation of --task" in capsys.readouterr().err


def test_a_depth_measured_on_another_day_writes_the_date_of_the_first(streaming, manager, tmp_path, monkeypatch):
    source = "{{ strftime_now('%d %b %Y') }}: {% for m in messages %}{{ m['content'] }}{% endfor %}"
    asked, config = [], harness.HarnessConfig(("sst_sums",), (1,), "chat", batch_size=4)

    def measure(model, depth, config, header, manager, out):
        asked.append(harness.HarnessModel(model, depth).apply_chat_template([{"role": "user", "content": "hello"}]))
        harness.write_json(out / f"depth-{depth}.json", {"settings": {**header, "depth": depth}, "results": {}})
        return {}

    monkeypatch.setattr(harness, "measure", measure)
    for day, depth in (("2026-01-02", 2), ("2026-01-03", 1)):
        tokenizer = copy.copy(streaming.tokenizer)
        tokenizer.template = ChatTemplate(source, {"bos_token": "<bos>"})
        model = Model(streaming.config, streaming.params, tokenizer, streaming.provenance)
        monkeypatch.setattr(chat_template, "datetime", clock(day))
        monkeypatch.setattr(template_date, "datetime", clock(day))
        harness.run(model, dataclasses.replace(config, depths=(depth,)), tmp_path, manager)
    assert asked == ["02 Jan 2026: hello"] * 2
    assert json.loads((tmp_path / "result.json").read_text())["date"] == "2026-01-02T00:00:00"


def clock(day):
    """The class `datetime` of a day."""

    class Then(datetime):
        @classmethod
        def now(cls, tz=None):
            return cls.fromisoformat(day)

    return Then


def test_unknown_names_and_missing_data_are_named(manager, own_tasks, tmp_path):
    with pytest.raises(InputError, match="--tasks sst_sum is not a task of the harness; near it: sst_sums"):
        harness.check_names(manager, ["sst_sum"])
    from lm_eval.tasks import TaskManager

    text = (own_tasks / "sums.yaml").read_text().replace("choices.jsonl", "gone.jsonl")
    (tmp_path / "gone.yaml").write_text(text)
    with pytest.raises(InputError, match="the data cannot be read"):
        harness.check_names(TaskManager(include_path=str(tmp_path), include_defaults=False), ["sst_sums"])
    with pytest.raises(InputError, match="is not a folder"):
        harness.task_manager(str(tmp_path / "nowhere"))
