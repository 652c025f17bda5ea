"""A task of sixty rows of one's own in every grade: score, interval, regressions and fixes by hand, and after a kill.

Answers are dictated: at depth 1 every third is right, at depth 4 every second, so that all counts are known.
"""

import copy
import json

import pytest
from scipy import stats

import sst_jax
from sst_jax.inference.model import Generation, TextDelta
from sst_jax.lab.evaluation import EvalConfig
from sst_jax.lab.evaluation import run as evaluate
from tests.support.problems import write_lines

ROWS = 60
WORDS = ("north", "south", "east", "west")
# Grade -> (a row's answer, a right text, a wrong text), by the row's number.
GRADES = {
    "exact": lambda n: (WORDS[n % 4], f" {WORDS[n % 4]}", "nowhere"),
    "number": lambda n: (n + 7, f"So {n} + 7 =\n#### {n + 7}", f"#### {n}"),
    "choice": lambda n: ("AB"[n % 2], f"The answer is ({'AB'[n % 2]})", f"The answer is ({'BA'[n % 2]})"),
    "math": lambda n: (f"\\frac{{{n}}}{{7}}", f"It is $\\boxed{{\\dfrac{{{n}}}{{7}}}}$.", "\\boxed{0.5}"),
    "regex:x=(\\w+)": lambda n: (f"v{n}", f"first x=no, then x=v{n}", f"v{n}"),
    "python:{folder}/grade.py": lambda n: (f"key{n}", f"has KEY{n} in it", "has none"),
}


@pytest.fixture(scope="module")
def model():
    return sst_jax.load("random:tiny").with_stream()


def task_file(tmp_path, made):
    rows = []
    for number in range(ROWS):
        row = {"id": f"row{number}", "prompt": f"{number}?", "answer": made(number)[0]}
        rows.append({**row, "choices": ["up", "down"]} if made is GRADES["choice"] else row)
    (tmp_path / "grade.py").write_text("def grade(text, row):\n    return row['answer'].upper() in text\n")
    return write_lines(tmp_path / "task.jsonl", rows)


def dictated(model, made, kill_at=None):
    """The model with its answers dictated; the process "dies" in the middle of a batch."""
    batches = []

    def generate_iter(prompts, depth, max_new_tokens, stop):
        batches.append(depth.name)
        for index, prompt in enumerate(prompts):
            if len(batches) == kill_at and index == len(prompts) // 2:
                raise KeyboardInterrupt
            number = int("".join(c for c in model.tokenizer.decode(list(prompt)).split("?")[0] if c.isdigit()))
            right = number % (3 if depth.name == "1" else 2) == 0
            text = made(number)[1 if right else 2]
            yield TextDelta(index, text, Generation(text, [5], len(prompt), depth.first, [depth.first], True))

    silent = copy.copy(model)
    silent.generate_iter = generate_iter
    return silent, batches


def counted(result):
    timeless = json.loads(json.dumps(result))
    for policy in timeless["policies"].values():
        del policy["seconds"]
    return timeless


@pytest.mark.parametrize("grade", GRADES)
def test_sixty_rows_come_to_the_same_after_a_kill(model, tmp_path, grade):
    made, spelled = GRADES[grade], grade.format(folder=tmp_path)
    task = f"{task_file(tmp_path, made)}:{spelled}"
    config = EvalConfig(task, policies=("1", "4"), batch_size=8, allow_code=True)
    whole, all_batches = dictated(model, made)
    result = evaluate(whole, config, tmp_path / "whole")
    assert len(all_batches) == 16

    for policy, right in (("1", 20), ("4", 30)):
        found = result["policies"][policy]["strict"]
        assert (found["right"], found["of"], found["value"]) == (right, ROWS, right / ROWS)
        interval = stats.binomtest(right, ROWS).proportion_ci(method="wilson")
        assert (found["low"], found["high"]) == pytest.approx((interval.low, interval.high))
    (change,) = result["between_policies"]
    assert change["broken_items"] == [
        f"task.jsonl/row{n}" for n in range(ROWS) if n % 3 == 0 and n % 2
    ]  # 10 regressions
    assert change["mended_items"] == [f"task.jsonl/row{n}" for n in range(ROWS) if n % 3 and n % 2 == 0]  # 20 fixes
    assert change["p"] == pytest.approx(stats.binomtest(10, 30).pvalue)

    killed, seen = dictated(model, made, kill_at=11)
    with pytest.raises(KeyboardInterrupt):
        evaluate(killed, config, tmp_path / "killed")
    file = tmp_path / "killed" / "outcomes.jsonl"
    file.write_bytes(file.read_bytes()[:-25])  # as a kill in the middle of writing leaves it
    resumed, again = dictated(model, made)
    assert counted(evaluate(resumed, config, tmp_path / "killed")) == counted(result)
    assert len(seen) + len(again) == 16 + 2  # the batch that was cut off, and the one whose last line was torn
    lines = [[json.loads(line) for line in (tmp_path / name / "outcomes.jsonl").open()] for name in ("whole", "killed")]
    key = lambda line: (line["policy"], line["id"])  # noqa: E731
    strip = lambda line: {name: value for name, value in line.items() if name != "seconds"}  # noqa: E731
    assert [strip(line) for line in sorted(lines[0], key=key)] == [strip(line) for line in sorted(lines[1], key=key)]
