"""Reading tasks: what is asked, what is right, that choices stay where they are, and which line is broken."""

import csv
import pathlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sst_jax.data import tasks
from sst_jax.data.datasets import TESTED
from sst_jax.data.formats import frozen_order
from sst_jax.data.tracking import Stories, parse
from sst_jax.errors import InputError
from tests.support.problems import GPQA, write_lines

GPQA_ROW = dict(zip(GPQA, ("r1", "Which, of\nthese, is blue?", "sky", "grass", "milk", "coal"), strict=True))
ARC_ROW = {
    "id": "a1",
    "question": "What melts?",
    "choices": {"text": ["stone", "ice", "air"], "label": ["1", "2", "3"]},
    "answerKey": "2",
}
MATH_ROW = {"problem": "Halve $1$.", "solution": "...", "answer": r"\dfrac{1}{2}"}


def write_gpqa(folder, rows):
    folder.mkdir(exist_ok=True)
    with (folder / "gpqa_diamond.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, GPQA)
        writer.writeheader()
        writer.writerows(rows)
    return str(folder)


def test_gsm8k(gsm8k):
    items = tasks.find("gsm8k").read(str(gsm8k))
    assert [item.id for item in items] == [f"gsm8k/test/{n}" for n in range(7)]
    assert items[0].problem.result == "8"
    assert "<<" not in items[0].problem.answer
    assert items[0].chance(0.3) == 0.3


def test_gpqa_from_csv_and_json_lines_alike(tmp_path):
    from_csv = tasks.find("gpqa_diamond").read(write_gpqa(tmp_path / "csv", [GPQA_ROW]))
    write_lines(tmp_path / "lines" / "gpqa_diamond.jsonl", [GPQA_ROW])
    from_lines = tasks.find("gpqa_diamond").read(str(tmp_path / "lines"))
    assert from_csv == from_lines
    (item,) = from_csv
    shown = {line[1]: line[4:] for line in item.problem.question.splitlines() if line.startswith("(")}
    assert set(shown.values()) == {"sky", "grass", "milk", "coal"}
    assert shown[item.problem.result] == "sky"
    assert [list(GPQA_ROW.values())[2 + place] for place in item.order] == list(shown.values())
    assert item.chance(0.3) == 0.25
    assert item.id == "gpqa_diamond/r1"


@given(st.text(max_size=20), st.lists(st.text(max_size=8), min_size=2, max_size=5, unique=True))
def test_the_order_of_choices_hangs_on_their_text_alone(question, choices):
    order = frozen_order(question, choices)
    assert sorted(order) == list(range(len(choices)))
    back = list(reversed(choices))
    assert [choices[i] for i in order] == [back[i] for i in frozen_order(question, back)]


def test_frozen_orders_are_frozen():
    """Published permutations: this may never change."""
    assert frozen_order("Which is blue?", ["sky", "grass", "milk", "coal"]) == (3, 1, 2, 0)
    places = [frozen_order(str(n), ["a", "b", "c", "d"]).index(0) for n in range(400)]
    assert all(70 < places.count(place) < 130 for place in range(4))


def test_arc_keeps_the_order_of_the_data(tmp_path):
    write_lines(tmp_path / "ARC-Challenge-Test.jsonl", [ARC_ROW])
    (item,) = tasks.find("arc_challenge").read(str(tmp_path))
    assert item.problem.result == "B"
    assert "(A) stone\n(B) ice\n(C) air\n" in item.problem.question
    assert item.chance(0.0) == pytest.approx(1 / 3)


def test_math_500_reads_plain_formulas(tmp_path):
    file = write_lines(tmp_path / "test.jsonl", [MATH_ROW])
    (item,) = tasks.find("math_500").read(str(file))
    assert item.problem.result == r"\frac{1}{2}"
    assert tasks.find("math_500").grading.extract(r"\boxed{\frac{1}{2}}", True) == item.problem.result


def test_words_are_never_training_problems():
    items = tasks.find("words").read(None)
    assert len(items) == TESTED
    assert all(item.id.startswith("words/test/") for item in items)
    with pytest.raises(InputError, match="takes no data"):
        tasks.find("words").read("folder")


def test_stories_are_tasks_and_no_training_question_is_among_them():
    task = tasks.find("rooms:6")
    items = task.read(None)
    assert len(items) == TESTED
    assert all(item.id.startswith("rooms/6-6/test/") for item in items)
    assert task.worked
    training = {problem.question for problem in Stories(parse("rooms:6"), "train", 2000)}
    assert not training & {item.problem.question for item in items}
    assert task.grading.extract(f" {items[0].problem.result.title()}.", True) == items[0].problem.result
    with pytest.raises(InputError, match="takes no data"):
        task.read("folder")
    with pytest.raises(InputError, match="rooms:none"):
        tasks.find("rooms:none")


@pytest.mark.parametrize(("name", "fewest"), [("rooms:1-4", 500), ("boxes", 500), ("lamp", 400), ("lamp:1", 10)])
def test_no_story_is_asked_twice(name, fewest):
    questions = [item.problem.question for item in tasks.find(name).read(None)]
    assert fewest <= len(questions) == len(set(questions)) <= TESTED


@pytest.mark.parametrize("name", ["gsm8k", "words"])
def test_results_alone(name, gsm8k):
    folder = str(gsm8k) if name == "gsm8k" else None
    whole, hidden = (tasks.find(task).read(folder) for task in (name, f"{name}:result"))
    assert [item.problem._replace(answer="") for item in whole] == [item.problem for item in hidden]
    assert whole[0].problem.answer != ""


def test_unknown_names_are_refused_with_those_there_are():
    for name in ("nothing", "gsm8k:steps", "math_500:result", "gsm8k:"):
        with pytest.raises(InputError, match=rf"--task {name} is unknown; tasks are gsm8k, .*words:result, boxes, "):
            tasks.find(name)


@pytest.mark.parametrize(
    ("task", "name", "lines", "culprit"),
    [
        ("gsm8k", "test.jsonl", [{"question": "x", "answer": "#### 1"}, "{"], r"test\.jsonl, line 2: not JSON"),
        ("gsm8k", "test.jsonl", [{"question": "x", "answer": "It is 7."}], r"line 1: .*####"),
        ("gsm8k", "test.jsonl", [{"question": "x", "answer": "#### many"}], r"line 1: 'many' after '####'"),
        ("gpqa_diamond", "gpqa_diamond.jsonl", [GPQA_ROW, {**GPQA_ROW, "Correct Answer": ""}], r"line 2: field 'Corr"),
        ("gpqa_diamond", "gpqa_diamond.jsonl", [[1]], "line 1: not a JSON object"),
        ("gpqa_diamond", "gpqa_diamond.jsonl", [GPQA_ROW, GPQA_ROW], "two items with the id gpqa_diamond/r1"),
        ("gpqa_diamond", "gpqa_diamond.jsonl", [], r"gpqa_diamond\.jsonl: holds no problems"),
        ("gpqa_diamond", "other.jsonl", [GPQA_ROW], "holds no gpqa_diamond.csv or gpqa_diamond.jsonl"),
        ("arc_challenge", "ARC-Challenge-Test.jsonl", [{**ARC_ROW, "answerKey": "E"}], "line 1: needs a question"),
        ("arc_challenge", "ARC-Challenge-Test.jsonl", ["", {**ARC_ROW, "choices": []}], "line 2: field 'choices'"),
        ("math_500", "test.jsonl", [MATH_ROW, {**MATH_ROW, "answer": 3}], "line 2: field 'answer'"),
    ],
)
def test_the_broken_line_is_named(tmp_path, task, name, lines, culprit):
    write_lines(tmp_path / name, lines)
    with pytest.raises(InputError, match=culprit):
        tasks.find(task).read(str(tmp_path))


def test_a_row_with_too_few_cells_is_named(tmp_path):
    folder = pathlib.Path(write_gpqa(tmp_path / "gpqa", [GPQA_ROW]))
    with (folder / "gpqa_diamond.csv").open("a") as file:
        file.write("r2,half a row\n")
    with pytest.raises(InputError, match=r"gpqa_diamond\.csv, line 4: not as many cells"):
        tasks.find("gpqa_diamond").read(str(folder))


def test_an_unknown_task_lists_those_there_are():
    with pytest.raises(InputError, match="gsm9k is unknown; tasks are gsm8k, gsm8k:result, gpqa_diamond"):
        tasks.find("gsm9k")


@pytest.mark.parametrize(
    ("message", "culprit"),
    [
        ("Dataset 'Idavidrein/gpqa' is a gated dataset on the Hub.", "hf auth login"),
        ("Couldn't reach the Hub\n(offline)", r"Couldn't reach the Hub \(offline\)\. Or give --data a folder"),
    ],
)
def test_a_hub_that_gives_nothing_says_what_to_do(monkeypatch, message, culprit):
    import datasets

    def refuse(*asked, **more):
        assert asked == ("Idavidrein/gpqa", "gpqa_diamond")
        raise RuntimeError(message)

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(InputError, match=culprit):
        tasks.find("gpqa_diamond").read(None)


def test_rows_from_the_hub_are_read_as_rows_from_a_file(monkeypatch, tmp_path):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *asked, **more: [GPQA_ROW])
    assert tasks.find("gpqa_diamond").read(None) == tasks.find("gpqa_diamond").read(
        write_gpqa(tmp_path / "x", [GPQA_ROW])
    )


def test_the_digest_sees_every_change(tmp_path):
    (item,) = tasks.find("gpqa_diamond").read(write_gpqa(tmp_path / "x", [GPQA_ROW]))
    other = item._replace(order=item.order[::-1])
    renamed = item._replace(problem=item.problem._replace(result="Z"))
    assert len({tasks.items_digest(items) for items in ([item], [other], [renamed], [item, item], [])}) == 5
