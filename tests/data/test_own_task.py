"""A task of one's own: what is asked, what is right by each grade, and which row or grade is refused."""

import json

import pytest

from sst_jax.data import own_task, tasks
from sst_jax.data.documents import Conversation, Pair, Problem
from sst_jax.data.prompts import asked_tokens, render
from sst_jax.data.tokenizer import ByteTokenizer
from sst_jax.errors import InputError
from tests.support.problems import write_lines

ASKED = [{"role": "user", "content": "2 + 2?"}]


def items(tmp_path, rows, grade, **settings):
    file = write_lines(tmp_path / "mine.jsonl", rows)
    task = tasks.find(f"{file}:{grade}", **settings)
    return task, task.read(None)


# grade, row, then (text, right strictly, right leniently)
GRADED = [
    (
        "exact",
        {"prompt": "Capital?", "answer": " Paris "},
        [("Paris\n", 1, 1), ("Paris.\nNext", 0, 1), ("paris", 0, 0)],
    ),
    (
        "number",
        {"prompt": "2+2", "answer": 4},
        [(" 4", 1, 1), ("3 + 1 = 4.0", 1, 1), ("#### 4, not 5", 1, 0), ("5", 0, 0)],
    ),
    ("number", {"prompt": "Cost?", "answer": "$1,200.50"}, [("It is 1200.5", 1, 1), ("$1,200", 0, 0)]),
    (
        "math",
        {"prompt": "Half?", "answer": r"\dfrac{1}{2}"},
        [(r"\boxed{\frac12}", 0, 0), (r"\boxed{\frac{1}{2}}", 1, 1)],
    ),
    (
        r"regex:answer: (\w+)",
        {"prompt": "?", "answer": "yes"},
        [("answer: no answer: yes", 1, 1), ("Answer: yes", 0, 1)],
    ),
    (r"regex:\d{4}", {"prompt": "When?", "answer": "1969"}, [("In 1969.", 1, 1), ("In 69.", 0, 0)]),
    (
        "choice",
        {"question": "Blue?", "choices": ["grass", "sky"], "answer": "sky"},
        [("The answer is (B)", 1, 1), ("B", 0, 1), ("The answer is (A)", 0, 0)],
    ),
]


@pytest.mark.parametrize(("grade", "row", "texts"), GRADED)
def test_what_is_right(tmp_path, grade, row, texts):
    task, (item,) = items(tmp_path, [row], grade)
    for text, strict, flexible in texts:
        found = [task.grading.is_right(task.grading.extract(text, way), item, text) for way in (True, False)]
        assert found == [bool(strict), bool(flexible)], text


def test_what_is_asked(tmp_path):
    rows = [
        {"prompt": "2 + 2 =", "answer": " 4", "id": "first"},
        {"messages": ASKED, "answer": "4"},
        {"question": "2 + 2?", "answer": "4"},
    ]
    _, found = items(tmp_path, rows, "exact")
    assert [type(item.problem) for item in found] == [Pair, Conversation, Problem]
    assert [item.id for item in found] == ["mine.jsonl/first", "mine.jsonl/1", "mine.jsonl/2"]
    assert [item.problem.result for item in found] == ["4", "4", "4"]
    byte = ByteTokenizer()
    assert byte.decode(asked_tokens(found[0].problem, byte)) == "2 + 2 ="
    assert asked_tokens(found[1].problem, byte, "chat") == byte.chat(ASKED)
    assert byte.decode(asked_tokens(found[2].problem, byte)) == "Question: 2 + 2?\nAnswer:"
    tokens, mask, _ = render(found[1].problem, byte, "chat")
    assert byte.decode(tokens[mask]) == "4"


def test_choices_are_lettered_and_their_answer_may_be_text_letter_or_place(tmp_path):
    row = {"prompt": "Blue?", "choices": ["grass", "sky", "milk"]}
    _, found = items(tmp_path, [{**row, "answer": answer} for answer in ("sky", "b", "B", 1)], "choice")
    assert [item.problem.result for item in found] == ["B"] * 4
    assert found[0].problem.question.startswith("Blue?\n(A) grass\n(B) sky\n(C) milk\n")
    assert found[0].chance(0.0) == 1 / 3


@pytest.mark.parametrize(
    ("grade", "row", "said"),
    [
        ("exact", {"answer": "x", "frage": "y"}, "the row has 'answer', 'frage', and needs 'prompt', 'messages' or"),
        ("exact", {"prompt": "x"}, "field 'answer' is not text"),
        ("exact", {"prompt": "x", "answer": " "}, "field 'answer' is empty"),
        ("exact", {"prompt": 3, "answer": "x"}, "field 'prompt' is not text"),
        ("number", {"prompt": "x", "answer": "Paris"}, "answer 'Paris' is not a number, as --grade number needs"),
        ("number", {"prompt": "x", "answer": True}, "field 'answer' is not text"),
        ("choice", {"prompt": "x", "answer": "x"}, "field 'choices' is not a list of texts"),
        ("choice", {"prompt": "x", "choices": ["a"], "answer": "a"}, "field 'choices' has 1 texts"),
        ("choice", {"prompt": "x", "choices": ["a", "b"], "answer": "c"}, "answer 'c' is none of the choices"),
        ("choice", {"prompt": "x", "choices": ["a", "b"], "answer": 2}, "answer 2 is none of the choices"),
        ("choice", {"messages": ASKED, "choices": ["a", "b"], "answer": 0}, "choices are put behind a 'prompt'"),
        ("exact", {"messages": [{"role": "assistant", "content": "a"}], "answer": "b"}, "the last message is the"),
    ],
)
def test_rows_that_cannot_be_asked_or_graded_are_named(tmp_path, grade, row, said):
    with pytest.raises(InputError) as error:
        items(tmp_path, [{"prompt": "1", "answer": "1", "choices": ["1", "2"]}, row], grade)
    assert str(error.value).startswith(f"{tmp_path}/mine.jsonl, line 2: {said}")


@pytest.mark.parametrize(
    ("grade", "said"),
    [
        ("", r"mine\.jsonl is a file: say with --grade how its answers are graded \(exact, number, "),
        ("best", "--grade best is not one of exact, number, choice, math, regex:PATTERN or python:FILE"),
        ("regex:(", r"--grade regex:\(: not a regular expression"),
        ("python:grade.py", "--grade python:grade.py runs code: read it, then add --allow-code"),
    ],
)
def test_grades_that_are_none_are_refused(tmp_path, grade, said):
    with pytest.raises(InputError, match=said):
        items(tmp_path, [{"prompt": "1", "answer": "1"}], grade)


def test_a_name_that_is_no_file_is_refused_with_the_tasks():
    with pytest.raises(
        InputError, match=r"--task mine\.jsonl is unknown; tasks are gsm8k, .*, or a file of one's own; "
    ):
        tasks.find("mine.jsonl")
    with pytest.raises(InputError, match="is its own data"):
        own_task.OwnTask("a", "exact", own_task.GRADES["exact"]).test("DIR")


CODE = """
def grade(text, row):
    if row["answer"] == "boom":
        raise KeyError("boom")
    return "yes" if row["answer"] == "odd" else text.strip().lower() == row["answer"]
"""


def test_code_of_ones_own_grades_where_it_is_allowed(tmp_path):
    (tmp_path / "grade.py").write_text(CODE)
    rows = [{"prompt": "Capital?", "answer": answer} for answer in ("paris", "boom", "odd")]
    task, found = items(tmp_path, rows, f"python:{tmp_path}/grade.py", allow_code=True)
    assert task.grading.is_right("", found[0], " PARIS ")
    assert not task.grading.is_right("", found[0], "Rome")
    with pytest.raises(InputError, match=r"grade\(\) failed on mine\.jsonl/1: KeyError: 'boom'"):
        task.grading.is_right("", found[1], "x")
    with pytest.raises(InputError, match=r"grade\(\) returned 'yes' for mine\.jsonl/2"):
        task.grading.is_right("", found[2], "x")
    for code, said in (("x = 1", "defines no function grade"), ("1 / 0", "ZeroDivisionError")):
        (tmp_path / "grade.py").write_text(code)
        with pytest.raises(InputError, match=said):
            items(tmp_path, rows, f"python:{tmp_path}/grade.py", allow_code=True)
    assert not (tmp_path / "__pycache__").exists()  # nor is code that was edited within a second taken for this one
    with pytest.raises(InputError, match="no such Python file"):
        items(tmp_path, rows, f"python:{tmp_path}/none.py", allow_code=True)


@pytest.mark.parametrize("suffix", ["json", "csv"])
def test_a_task_may_lie_in_other_containers(tmp_path, suffix):
    file = tmp_path / f"a:b.{suffix}"
    text = json.dumps([{"prompt": "x", "answer": "y"}]) if suffix == "json" else "prompt,answer\nx,y\n"
    file.write_text(text)
    assert [item.problem.result for item in tasks.find(f"{file}:exact").read(None)] == ["y"]
