"""GSM8K's records and their errors; generated problems: correct, reproducible, and truly held out."""

import itertools
import json
import re
import sys
import types
from fractions import Fraction

import pytest

from sst_jax.data import problems
from sst_jax.data.documents import Problem
from sst_jax.data.grading import extract_result
from sst_jax.data.problems import SPLITS, TEST_TEMPLATES, TRAIN_TEMPLATES, word_problems
from sst_jax.errors import InputError
from tests.support.problems import load_gsm8k

GOOD = {"question": "How many?", "answer": "He has 2*3=<<2*3=6>>6.\nAnd 6*200=<<6*200=1200>>1,200.\n#### 1,200"}


def _write(folder, *lines, split="train"):
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    (folder / f"{split}.jsonl").write_text(text, "utf-8")
    return str(folder)


def test_gsm8k_folder(gsm8k_folder):
    train, test = load_gsm8k(str(gsm8k_folder), "train"), load_gsm8k(str(gsm8k_folder), "test")
    assert (len(train), len(test)) == (7473, 1319)
    assert train[0] == Problem(
        "gsm8k/train/0",
        "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May. How many clips "
        "did Natalia sell altogether in April and May?",
        "Natalia sold 48/2 = 24 clips in May.\nNatalia sold 48+24 = 72 clips altogether in April and May.",
        "72",
    )
    assert len({problem.id for problem in train + test}) == 7473 + 1319
    for problem in train + test:
        assert re.fullmatch(r"-?\d+", problem.result), problem.id
        assert not re.search(r"<<|>>|####", problem.answer), problem.id
        assert extract_result(f"{problem.answer}\n#### {problem.result}", strict=True) == problem.result


def test_gsm8k_record(tmp_path):
    (problem,) = load_gsm8k(_write(tmp_path, GOOD, ""), "train")
    assert problem == Problem("gsm8k/train/0", "How many?", "He has 2*3=6.\nAnd 6*200=1,200.", "1200")
    # A line separator inside a string is not the end of a record.
    odd = json.dumps(GOOD | {"question": "a\u2028b\x85c"}, ensure_ascii=False)
    assert load_gsm8k(_write(tmp_path, odd), "train")[0].question == "a\u2028b\x85c"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([GOOD, '{"question": '], r"train\.jsonl, line 2: not JSON"),
        ([GOOD, GOOD, "[1, 2]"], r"train\.jsonl, line 3: not a JSON object"),
        ([{"question": "x"}], r"train\.jsonl, line 1: field 'answer'"),
        ([GOOD, {"answer": "#### 1"}], r"train\.jsonl, line 2: field 'question'"),
        ([{"question": "x", "answer": 7}], r"line 1: field 'answer'"),
        ([{"question": "  ", "answer": "#### 7"}], r"line 1: field 'question'"),
        (["", GOOD, {"question": "x", "answer": "It is 7."}], r"train\.jsonl, line 3: .*####"),
        ([{"question": "x", "answer": "So\n#### seven"}], r"line 1: 'seven' after '####' is not a number"),
        ([], r"train\.jsonl: holds no problems"),
        (["", "  "], r"train\.jsonl: holds no problems"),
    ],
)
def test_gsm8k_errors_name_file_and_line(tmp_path, lines, message):
    with pytest.raises(InputError, match=message):
        load_gsm8k(_write(tmp_path, *lines), "train")


def test_gsm8k_source_errors(tmp_path):
    with pytest.raises(InputError, match=r"test\.jsonl: no such file"):
        load_gsm8k(_write(tmp_path, GOOD), "test")
    with pytest.raises(InputError, match="is a file; name the folder"):
        load_gsm8k(str(tmp_path / "train.jsonl"), "train")
    with pytest.raises(InputError, match="no such folder, nor a hub id"):
        load_gsm8k(str(tmp_path / "absent"), "train")
    (tmp_path / "train.jsonl").write_bytes(b'{"question": "\xff"}')
    with pytest.raises(InputError, match="line 1: not UTF-8"):
        load_gsm8k(str(tmp_path), "train")


def test_gsm8k_from_the_hub(monkeypatch):
    """The hub's client is replaced: what matters is what is asked of it, and what becomes of its answer and errors."""
    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        if args[0] == "some/gated":
            raise ConnectionError("offline")
        return [GOOD, GOOD] if args[0] == "openai/gsm8k" else [GOOD, {"question": "x"}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    found = load_gsm8k(split="test")
    assert asked == [(("openai/gsm8k", "main"), {"split": "test", "revision": None})]
    assert [problem.id for problem in found] == ["gsm8k/test/0", "gsm8k/test/1"]
    assert found[1].result == "1200"
    with pytest.raises(InputError, match=r"some/gated .*offline.*data\.path.*test\.jsonl"):
        load_gsm8k("some/gated", "test")
    with pytest.raises(InputError, match=r"some/broken \(train\), row 1: field 'answer'"):
        load_gsm8k("some/broken", "train")


# -------------------------------------------------------------------------------------------------------- generated

COUNTS = {"train": 3000, "validation": 500, "test": 500}


@pytest.fixture(scope="module")
def generated() -> dict[str, list[Problem]]:
    return {split: list(word_problems(split, count, seed=1)) for split, count in COUNTS.items()}


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


# What a story may imply without writing it in digits: twice and half, a percentage, a dozen.
IMPLIED = {2, 12, 100}
EXACT = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b, "/": Fraction}


def test_every_solution_is_correct(generated):
    """Re-evaluates each equation with exact fractions, and checks that its operands were given or derived before."""
    seen_lengths = set()
    for problem in itertools.chain(*generated.values()):
        known = set(_numbers(problem.question)) | IMPLIED
        lines = problem.answer.split("\n")
        for line in lines:
            ((a, sign, b, c),) = re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", line)
            assert EXACT[sign](int(a), int(b)) == int(c), line
            assert int(a) in known, line
            assert int(b) in known, line
            assert len(_numbers(line)) == 3, line
            assert "-" not in line.replace(f"{a} - {b}", ""), line
            known.add(int(c))
        assert int(problem.result) == int(c) >= 0
        seen_lengths.add(len(lines))
    assert seen_lengths == {2, 3, 4, 5}


# What each story asks, from its numbers in the order of the text: written apart from the steps, to check their meaning.
MEANING = {
    "boxes": lambda boxes, each, given, classes: Fraction(boxes * each - given, classes),
    "change": lambda price, count, drink, paid: paid - price * count - drink,
    "journey": lambda hours, speed, more, slow: hours * speed + more * slow,
    "ages": lambda age, younger, later: 2 * age - younger + later,
    "wages": lambda rate, hours, days, spent: rate * hours * days - spent,
    "orchard": lambda rows, trees, fruits, bad, crate: Fraction(rows * trees * fruits - bad, crate),
    "saving": lambda price, have, weekly: Fraction(price - have, weekly),
    "discount": lambda price, percent, hat: Fraction(price * (100 - percent), 100) + hat,
    "reading": lambda pages, slow, days, fast: Fraction(pages - slow * days, fast),
    "recipe": lambda few, cups, many, have: Fraction(many, few) * cups - have,
    "tank": lambda rate, leak, start, minutes: start + rate * minutes - leak * minutes,
    "collections": lambda count, times, fewer: count + 2 * count * times - fewer,
    "tickets": lambda adults, high, children, low, cost, clubs: Fraction(adults * high + children * low - cost, clubs),
    "bus": lambda start, on, off: Fraction(start + on - off, 2),
    "fence": lambda long, wide, price, gate: 2 * (long + wide) * price + gate,
    "printers": lambda fast, slow, minutes, spoiled: fast * minutes + slow * minutes - spoiled,
    "eggs": lambda hens, each, kept, price: Fraction(hens * each - kept, 12) * price,
    "phone": lambda fee, extra, used, months: months * fee + months * used * extra,
    "pooling": lambda first, second, third, bag, eaten: Fraction(first + second + third, bag) - eaten,
}


def test_every_result_answers_its_question(generated):
    for problem in itertools.chain(*generated.values()):
        name = problem.id.split("/")[2]
        assert MEANING[name](*_numbers(problem.question)) == int(problem.result), problem.question


def test_text_is_whole(generated):
    for problem in itertools.chain(*generated.values()):
        text = f"{problem.question}\n{problem.answer}"
        assert not re.search(r"[{}|]|  |<<|####", text), text
        assert problem.question[0].isupper()
        assert problem.question.endswith("?")
        assert all(line.endswith(".") for line in problem.answer.split("\n"))


def test_every_template_uses_all_its_numbers_and_steps():
    for template in TRAIN_TEMPLATES + TEST_TEMPLATES:
        for name in template.numbers:
            assert template.question.count(f"{{{name}}}") == 1, (template.name, name)
            assert any(re.search(rf"\b{name}\b", step) for step, _ in template.steps), (template.name, name)
        for step, sentence in template.steps:
            assert sentence.count("{" + step.split()[0] + "}") == 1, (template.name, step)
        assert not re.search(r"\d", template.question), template.name
        assert 2 <= len(template.steps) <= 5


def test_splits_share_no_template_no_numbers_and_no_question(generated):
    # The proof: disjoint template names, and residue classes of the sum of a question's numbers that do not meet.
    train_names, test_names = ({t.name for t in templates} for templates in (TRAIN_TEMPLATES, TEST_TEMPLATES))
    assert len(train_names) == len(TRAIN_TEMPLATES) >= 12
    assert len(test_names) == len(TEST_TEMPLATES) >= 5
    assert not train_names & test_names
    for one, other in itertools.combinations(SPLITS.values(), 2):
        assert not set(one) & set(other)
    for split, found in generated.items():
        for problem in found:
            assert sum(_numbers(problem.question)) % 5 in SPLITS[split], problem.question
    # And what follows from it, seen in a sample.
    names, tuples, questions = (
        {split: {key(problem) for problem in found} for split, found in generated.items()}
        for key in (lambda p: p.id.split("/")[2], lambda p: tuple(_numbers(p.question)), lambda p: p.question)
    )
    assert names == {"train": train_names, "validation": train_names, "test": test_names}
    for one, other in itertools.combinations(SPLITS, 2):
        assert not tuples[one] & tuples[other]
        assert not questions[one] & questions[other]
    assert len(questions["train"]) > 0.99 * COUNTS["train"]


def test_generation_is_lazy_and_depends_on_seed_and_index_alone(monkeypatch):
    made = []
    work = problems._work
    monkeypatch.setattr(problems, "_work", lambda *args: made.append(args) or work(*args))
    many = word_problems("train", 10**9, seed=5)
    assert len(many) == 10**9
    assert len(made) < 100  # not 10^9; a check of types at run time looks at one
    made.clear()
    last = many[10**9 - 1]
    assert made
    assert last == many[10**9 - 1]
    few = list(word_problems("train", 50, seed=5))
    assert few == [many[index] for index in range(50)]
    assert len({problem.id for problem in few}) == 50
    others = word_problems("train", 50, seed=6)
    assert sum(a.question == b.question for a, b in zip(few, others, strict=True)) < 5
    with pytest.raises(IndexError):
        few = word_problems("train", 50)[50]


def test_generation_stays_as_it_is():
    """A pinned problem: a change here changes every result that was measured on generated problems."""
    assert word_problems("test", 1, seed=0)[0] == Problem(
        "words/test/fence/0-0",
        "A garden is 26 meters long and 7 meters wide. Rosa puts a fence all the way around it, at $11 for every "
        "meter, and "
        "a gate for $76. What does it cost in dollars?",
        "Two sides together measure 26 + 7 = 33 meters.\nThe way around is 33 * 2 = 66 meters.\n"
        "The fence costs 66 * 11 = 726 dollars.\nWith the gate it costs 726 + 76 = 802 dollars.",
        "802",
    )


def test_generated_errors():
    with pytest.raises(InputError, match=r"dev.*train, validation, test"):
        word_problems("dev", 5)
    with pytest.raises(InputError, match="count=0"):
        word_problems("train", 0)
