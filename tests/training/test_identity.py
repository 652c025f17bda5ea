"""A run knows its inputs: what has changed when it resumes is named, or gone on with and recorded."""

import json
import shutil
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest

from sst_jax import export
from sst_jax.console.command import run as command
from sst_jax.data import chat_template, template_date
from sst_jax.data.chat_template import CHAT_TEMPLATE, ChatTemplate
from sst_jax.data.prompts import Example
from sst_jax.data.tokenizer import ByteTokenizer
from sst_jax.data.tokenizer_identity import changes, tokenizer_digests
from sst_jax.errors import InputError
from sst_jax.inference.model import load
from sst_jax.lab.evaluation.evaluation import fixed_date
from sst_jax.training import fit, identity, read_recipe
from sst_jax.training.identity import data_record, examples_digest, sources_digest


def example(tokens, learned, id="a"):
    return Example(tokens=np.asarray(tokens, np.int32), answer_mask=np.asarray(learned, bool), id=id)


def test_a_digest_is_of_tokens_masks_and_order_alone():
    one, two = example([1, 2, 3], [0, 0, 1]), example([4, 5], [0, 1])
    same = examples_digest([one, two])
    assert examples_digest([one._replace(id="z"), two._replace(tokens=two.tokens.astype(np.int64))]) == same
    others = [
        [two, one],
        [one],
        [one, two, two],
        [one._replace(answer_mask=np.array([False, True, True])), two],
        [one._replace(tokens=np.array([1, 2, 9])), two],
        [example([1, 2], [0, 0]), example([3, 4, 5], [1, 0, 1])],
    ]
    assert len({same, *map(examples_digest, others)}) == 1 + len(others)


def test_examples_that_move_to_another_source_are_noticed():
    one, two, three = (example([number], [1]) for number in (1, 2, 3))
    assert sources_digest([[one, two, three]]) == examples_digest([one, two, three])
    assert len({sources_digest(sources) for sources in ([[one, two], [three]], [[one], [two, three]])}) == 2


class Folder(ByteTokenizer):
    """A tokenizer of a folder's files."""

    def __init__(self, **files):
        self._files = files

    def files(self):
        return {name.replace("_json", ".json"): content for name, content in self._files.items()}


def test_a_template_is_told_from_the_rest_of_a_tokenizer():
    config = {"bos_token": "<s>", "chat_template": "{{ a }}"}

    def digests(vocabulary=b"{}", **more):
        return tokenizer_digests(
            Folder(tokenizer_json=vocabulary, tokenizer_config_json=json.dumps(config | more).encode())
        )

    tokenizer, template = digests()
    again = json.dumps(dict(reversed(config.items())), indent=4).encode()
    assert tokenizer_digests(Folder(tokenizer_json=b"{}", tokenizer_config_json=again)) == (tokenizer, template)
    assert digests(chat_template="{{ b }}") == (tokenizer, digests(chat_template="{{ b }}")[1]) != (tokenizer, template)
    assert digests(bos_token="<b>")[1] == digests(vocabulary=b"[]")[1] == template
    assert len({tokenizer, digests(bos_token="<b>")[0], digests(vocabulary=b"[]")[0]}) == 3


def test_only_chat_minds_the_template():
    examples = [example([1, 2], [0, 1])]
    records = {
        (format, template): data_record(
            [examples], examples, Folder(tokenizer_config_json=json.dumps({"chat_template": template}).encode()), format
        )
        for format in ("plain", "chat")
        for template in "ab"
    }
    assert not changes(records["plain", "a"], records["plain", "b"])
    (named,) = changes(records["chat", "a"], records["chat", "b"])
    assert named.startswith("chat template (")
    assert not changes({}, records["chat", "a"])  # what is not recorded is not compared


KNOBS = {
    "model.source": "random:tiny-llama", "train.steps": 2, "train.eval_every": 2, "train.save_every": 1,
    "train.sample_tokens": 2, "train.keep": 9, "data.name": "gsm8k", "data.heldout": 4, "data.batch_size": 2,
    "data.length": 128, "data.format": "chat",
}  # fmt: skip


def write_rows(folder, last="It is", count=20):
    folder.mkdir(exist_ok=True)
    rows = [{"question": f"What is {n}+1?", "answer": f"It is {n + 1}.\n#### {n + 1}"} for n in range(count)]
    rows[7]["answer"] = rows[7]["answer"].replace("It is", last)
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """(Knobs, the folder) of a run of two steps on a file of twenty rows."""
    folder = tmp_path_factory.mktemp("identity")
    write_rows(folder / "data")
    knobs = KNOBS | {"data.path": str(folder / "data")}
    fit(read_recipe("tiny", knobs), folder / "run")
    return knobs, folder / "run"


@pytest.fixture
def stopped(begun, tmp_path):
    """(Knobs, a copy of that run as if killed after its first step)."""
    knobs, run = begun
    run = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "2")
    (run / "manifests" / "2.json").unlink()
    yield knobs, run
    write_rows(Path(knobs["data.path"]))


def test_a_run_records_its_data(begun):
    data = json.loads((begun[1] / "config.json").read_text())["data"]
    assert {name: part.get("count") for name, part in data.items()} == {
        "training examples": 16, "held-out examples": 4, "tokenizer": None, "chat template": None,
    }  # fmt: skip
    assert all(len(part["sha256"]) == 64 for part in data.values())


def test_appended_lines_change_what_is_held_out(stopped):
    knobs, run = stopped
    before = (run / "config.json").read_text()
    write_rows(Path(knobs["data.path"]), count=24)
    with pytest.raises(InputError, match=r"other inputs: training examples \(16, .* 20, .*; held-out examples \(4, "):
        fit(read_recipe("tiny", knobs), run)
    assert (run / "config.json").read_text() == before


def test_changed_data_is_refused_by_name_and_gone_on_with_when_told(stopped):
    knobs, run = stopped
    before = json.loads((run / "config.json").read_text())
    write_rows(Path(knobs["data.path"]), last="Yes:")
    with pytest.raises(InputError) as refused:
        fit(read_recipe("tiny", knobs), run)
    assert "training examples (16, " in str(refused.value)
    assert "--allow-changed" in str(refused.value)
    assert not any(name in str(refused.value) for name in ("tokenizer", "template", "held-out"))
    assert json.loads((run / "config.json").read_text()) == before
    fit(read_recipe("tiny", knobs), run, allow_changed=True)
    (changed,) = (now := json.loads((run / "config.json").read_text()))["changed"]
    assert (changed["step"], changed["before"]["data"]) == (1, before["data"])
    (what,) = changed["what"]
    assert what.startswith("training examples (16, ")
    assert now["data"] != before["data"]
    assert {**now, "data": 0, "changed": 0} == {**before, "data": 0, "changed": 0}
    fit(read_recipe("tiny", knobs), run)  # the new data are the run's own from then on
    assert json.loads((run / "config.json").read_text()) == now


@pytest.mark.slow
def test_a_run_resumes_for_more_steps_when_told(stopped):
    """With another rhythm of evaluations; what makes its model stays as it was."""
    knobs, run = stopped
    before = json.loads((run / "config.json").read_text())
    longer = knobs | {"train.steps": 3, "train.eval_every": 1}
    with pytest.raises(
        InputError, match=r"train\.steps \(2 there, 3 now\); train\.eval_every .*--allow-changed resumes"
    ):
        fit(read_recipe("tiny", longer), run)
    with pytest.raises(InputError, match=r"another config \(recipe\.optimizer\.learning_rate"):
        fit(read_recipe("tiny", longer | {"optimizer.learning_rate": 0.5}), run, allow_changed=True)
    assert json.loads((run / "config.json").read_text()) == before
    assert fit(read_recipe("tiny", longer), run, allow_changed=True).steps == 3
    (changed,) = (now := json.loads((run / "config.json").read_text()))["changed"]
    assert (changed["step"], changed["before"]["recipe"]) == (1, before["recipe"])
    assert [what.split()[0] for what in changed["what"]] == ["train.steps", "train.eval_every"]
    assert (now["recipe"]["train"]["steps"], load(run).provenance.step) == (3, 3)
    fit(read_recipe("tiny", longer), run)  # its own from then on


def test_a_run_that_recorded_no_data_resumes_as_before(stopped):
    """As 0.1.0 wrote it."""
    knobs, run = stopped
    config = json.loads((run / "config.json").read_text())
    del config["data"]
    (run / "config.json").write_text(json.dumps(config))
    write_rows(Path(knobs["data.path"]), last="Yes:")
    assert fit(read_recipe("tiny", knobs), run).steps == 2
    assert json.loads((run / "config.json").read_text()) == config


# ---------------------------------------------------------------------------------------------------------- the date

DATED = CHAT_TEMPLATE.replace("{{ bos_token }}", "{{ bos_token }}{{ strftime_now('%d %b %Y') }}\n")


@pytest.fixture
def on(monkeypatch):
    """A function of a day: from then on it is that day, in a new process as far as templates know."""

    def begin(day):
        class Then(datetime):
            @classmethod
            def now(cls, tz=None):
                return cls.fromisoformat(day)

        for module in (chat_template, template_date, identity):
            monkeypatch.setattr(module, "datetime", Then)
        monkeypatch.setattr(ByteTokenizer, "template", ChatTemplate(DATED, {"bos_token": "<bos>"}), raising=False)

    return begin


def asked(tokenizer):
    return tokenizer.decode(tokenizer.chat([{"role": "user", "content": "hi"}]))


@pytest.mark.slow
def test_a_run_goes_on_with_the_date_that_it_began_with(on, begun, tmp_path):
    on("2026-01-02T10:00")
    write_rows(tmp_path / "data")
    knobs = begun[0] | {"data.path": str(tmp_path / "data")}
    whole = fit(read_recipe("tiny", knobs), tmp_path / "run")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["date"] == "2026-01-02T10:00:00"
    run = shutil.copytree(tmp_path / "run", tmp_path / "stopped")
    shutil.rmtree(run / "checkpoints" / "2")
    on("2026-01-03T09:00")
    assert asked(ByteTokenizer()).startswith("03 Jan 2026")
    assert fit(read_recipe("tiny", knobs), run).heldout_loss == whole.heldout_loss
    on("2026-01-04T09:00")
    assert asked(load(run).tokenizer).startswith("02 Jan 2026")  # as it was trained
    with pytest.raises(InputError, match=r"data\.date: '' there, '2026-01-03' now"):
        fit(read_recipe("tiny", knobs | {"data.date": "2026-01-03"}), run)


def test_a_recipe_sets_the_date(on, tmp_path):
    on("2026-01-02")
    recipe, tokenizer = read_recipe("tiny", {"data.date": "2025-12-24"}), ByteTokenizer()
    identity.fix_run_date(tokenizer, recipe.data, tmp_path)
    assert asked(tokenizer).startswith("24 Dec 2025")
    assert identity.date_record(tokenizer, "chat") == {"date": "2025-12-24T00:00:00"}
    assert identity.date_record(tokenizer, "plain") == {}
    (tmp_path / "config.json").write_text("{}")  # of 0.1.0
    identity.fix_run_date(tokenizer, recipe.data, tmp_path)
    assert asked(tokenizer).startswith("02 Jan 2026")
    (tmp_path / "config.json").write_text('{"date": "yesterday"}')
    with pytest.raises(InputError, match=r"config\.json: date='yesterday' is no date"):
        identity.fix_run_date(tokenizer, recipe.data, tmp_path)
    with pytest.raises(InputError, match=r"data\.date='24\.12\.' is no date: write it as"):
        read_recipe("tiny", {"data.date": "24.12."})


def test_an_evaluation_goes_on_with_its_date(on, tmp_path):
    file = tmp_path / "evaluation.json"
    on("2026-01-02")
    assert fixed_date(ByteTokenizer(), None, file, "plain") == {}
    date = fixed_date(ByteTokenizer(), None, file, "chat")
    assert date == {"date": "2026-01-02T00:00:00"}
    on("2026-01-03")
    tokenizer = ByteTokenizer()
    assert fixed_date(tokenizer, date, file, "chat") == date
    assert asked(tokenizer).startswith("02 Jan 2026")
    assert fixed_date(tokenizer, {}, file, "chat") == {}  # of 0.1.0
    with pytest.raises(InputError, match=r"evaluation\.json: date='once' is no date"):
        fixed_date(tokenizer, {"date": "once"}, file, "chat")


# ------------------------------------------------------------------------------------------------ opening a run


def said(caplog, run):
    """What is warned of when a run opens."""
    caplog.clear()
    load(run)
    return [record.getMessage() for record in caplog.records]


def test_a_run_whose_bases_tokenizer_or_template_changed_opens_with_a_word(begun, caplog, monkeypatch):
    run = begun[1]
    assert said(caplog, run) == []
    monkeypatch.setattr(ByteTokenizer, "template", ChatTemplate(DATED, {"bos_token": "<bos>"}), raising=False)
    (line,) = said(caplog, run)
    assert line.startswith(f"{run} was trained with another tokenizer: chat template (")
    monkeypatch.undo()
    monkeypatch.setattr(ByteTokenizer, "files", lambda self: {"tokenizer.json": b"another"})
    assert "another tokenizer: tokenizer (" in said(caplog, run)[0]


@pytest.mark.slow
def test_a_run_from_an_adapter_or_a_run_with_a_template_keeps_it(begun, tmp_path, caplog):
    """Though the base under both has another; so does the adapter that is made of it."""
    (tmp_path / "own.jinja").write_text(DATED.replace("strftime_now('%d %b %Y')", "'Hear me'"))
    write_rows(tmp_path / "data")
    knobs = begun[0] | {"data.path": str(tmp_path / "data"), "train.steps": 1, "train.eval_every": 1}
    fit(read_recipe("tiny", knobs | {"data.chat_template": str(tmp_path / "own.jinja")}), tmp_path / "0")
    for source, target in (("0", "adapter"), ("1", "last")):
        if source == "1":
            fit(read_recipe("tiny", knobs | {"model.source": str(tmp_path / "adapter")}), tmp_path / "1")
        argv = ["--from", str(tmp_path / source), "--to", str(tmp_path / target), "--format", "adapter"]
        assert command(export.main, [*argv, "--no-measure-gap"]) == 0
    fit(read_recipe("tiny", knobs | {"model.source": str(tmp_path / "1")}), tmp_path / "2")
    expected = None
    for name in ("0", "adapter", "1", "last", "2"):
        assert said(caplog, tmp_path / name) == []
        tokenizer = load(tmp_path / name).tokenizer
        expected = expected or tokenizer.chat([{"role": "user", "content": "hi"}])
        assert asked(tokenizer).startswith("Hear me"), name
        assert tokenizer.chat([{"role": "user", "content": "hi"}]) == expected
