"""Stories: their answers found again from the text alone, splits that share nothing, and no shortcut to the answer."""

import collections
import itertools
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sst_jax.data import tracking
from sst_jax.data.problems import SPLITS
from sst_jax.data.tracking import Stories, parse
from sst_jax.errors import InputError

kinds = st.sampled_from(sorted(tracking.STORIES))


def read_swaps(text):
    """From the text alone: a list of [colour, thing] pairs, swapped by exchanging the colours."""
    pairs = [list(pair) for pair in re.findall(r"[Tt]he (\w+) (?:box|shelf) has the (\w+)", text)]
    for a, b in re.findall(r"Swap (\w+) and (\w+)\.", text):
        for pair in pairs:
            pair[0] = {a: b, b: a}.get(pair[0], pair[0])
    (asked,) = re.findall(r"What is in the (\w+) ", text)
    return dict(pairs)[asked], len(re.findall("Swap", text))


def read_rooms(text):
    where = dict(re.findall(r"(\w+) is in the (\w+)\.", text))
    moves = re.findall(r"(\w+) goes to (the )?(\w+)\.", text)
    for person, the, target in moves:
        assert (target in tracking.ROOMS) == bool(the)
        new = target if the else where[target]
        assert new != where[person]  # every move is one
        where[person] = new
    (asked,) = re.findall(r"Where is (\w+)\?", text)
    return where[asked], len(moves)


def read_chain(text):
    (value,) = re.findall(r"Begin with (\d)\.", text)
    steps = re.findall(r"(Add|Multiply by) (\d)\.", text)
    value = int(value)
    for verb, number in steps:  # the whole number; its last digit only at the end
        value = value + int(number) if verb == "Add" else value * int(number)
    return str(value)[-1], len(steps)


def read_lamp(text):
    presses, waits = text.count(" presses."), text.count(" waits.")
    begins = re.search(r"is (on|off)\. ", text)[1]
    return (begins if presses % 2 == 0 else {"on": "off", "off": "on"}[begins]), presses + waits


def read_clock(text):
    (hour,) = re.findall(r"It is (\d+) o'clock", text)
    passing = [int(hours) for hours in re.findall(r"(\d+) hours pass", text)]
    hour = int(hour)
    for _ in range(sum(passing)):
        hour = 1 if hour == 12 else hour + 1
    return str(hour), len(passing)


READERS = {
    "boxes": read_swaps, "shelves": read_swaps, "rooms": read_rooms, "chain": read_chain, "lamp": read_lamp,
    "clock": read_clock,
}  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(kinds, st.integers(1, 20), st.integers(0, 4), st.sampled_from(sorted(SPLITS)), st.integers(0, 10**6))
def test_the_answer_follows_from_the_text(kind, fewest, more, split, seed):
    stories = Stories(tracking.Spec(kind, fewest, fewest + more), split, 2, seed)
    for problem in stories:
        answer, steps = READERS[kind](problem.question)
        assert answer == problem.result
        assert fewest <= steps <= fewest + more
        assert problem.answer == ""
        assert tracking.residue(problem.question) in SPLITS[split]
    assert list(stories) == list(Stories(stories.spec, split, 2, seed))


@pytest.mark.parametrize("kind", tracking.STORIES)
def test_splits_share_no_question_whatever_the_seeds(kind):
    asked = {
        split: {problem.question for seed in (0, 1) for problem in Stories(parse(kind), split, 300, seed)}
        for split in SPLITS
    }
    for one, other in itertools.combinations(asked.values(), 2):
        assert not one & other
    assert all(len(questions) > 200 for questions in asked.values()) or kind == "lamp"


@pytest.mark.parametrize("kind", tracking.STORIES)
def test_steps_are_spread_evenly(kind):
    counts = collections.Counter(READERS[kind](problem.question)[1] for problem in Stories(parse(kind), "train", 800))
    assert set(counts) == {1, 2, 3, 4}
    assert min(counts.values()) > 130 or kind in ("lamp", "chain", "clock")


@pytest.mark.parametrize(("kind", "chance"), [("boxes", 1 / 3), ("shelves", 1 / 5)])
def test_no_shortcut_to_what_is_in_a_box(kind, chance):
    stories = list(Stories(parse(f"{kind}:8"), "train", 1500))
    named = [re.findall("has the (\\w+)", problem.question) for problem in stories]
    for place in range(round(1 / chance)):  # the thing that is named first, second, ...
        share = sum(things[place] == problem.result for things, problem in zip(named, stories, strict=True)) / 1500
        assert abs(share - chance) < 0.05
    stays = 0
    for problem in stories:  # the thing that was there at the beginning
        (asked,) = re.findall(r"What is in the (\w+) ", problem.question)
        stays += f"{asked} {kind[:3]}" in problem.question and bool(
            re.search(rf"{asked} \w+ has the {problem.result}\b", problem.question, re.IGNORECASE)
        )
    assert abs(stays / 1500 - chance) < 0.06


def test_rooms_are_even_and_the_room_that_was_named_last_is_seldom_the_answer():
    stories = list(Stories(parse("rooms:8"), "train", 1500))
    counts = collections.Counter(problem.result for problem in stories)
    assert all(abs(count / 1500 - 1 / 4) < 0.05 for count in counts.values())
    last = [[word for word in re.findall(r"\w+", p.question) if word in tracking.ROOMS][-1] for p in stories]
    assert sum(room == problem.result for room, problem in zip(last, stories, strict=True)) / 1500 < 0.5
    # Nor does it help to find where the person was last said to go, unless one follows whom they followed.
    own = []
    for problem in stories:
        (asked,) = re.findall(r"Where is (\w+)\?", problem.question)
        own.append(re.findall(rf"{asked} (?:is in|goes to) the (\w+)\.", problem.question)[-1])
    assert sum(room == problem.result for room, problem in zip(own, stories, strict=True)) / 1500 < 0.65


@pytest.mark.parametrize(("kind", "results"), [("chain", 10), ("lamp", 2), ("clock", 12)])
def test_results_are_even(kind, results):
    counts = collections.Counter(problem.result for problem in Stories(parse(f"{kind}:6"), "train", 1200))
    assert len(counts) == results
    assert all(abs(count / 1200 - 1 / results) < 0.06 for count in counts.values())


def test_names():
    assert parse("boxes") == ("boxes", 1, 4)
    assert parse("rooms:8") == ("rooms", 8, 8)
    assert parse("clock:2-16") == ("clock", 2, 16)
    assert parse("gsm8k") is None
    assert parse("words:result") is None
    for bad in ("boxes:", "boxes:0", "boxes:4-2", "boxes:many", "boxes:1-", "boxes:-3"):
        with pytest.raises(InputError, match=f"{bad}.*boxes:1-4"):
            parse(bad)


def test_bad_requests_name_the_culprit():
    with pytest.raises(InputError, match="no split 'dev'"):
        Stories(parse("boxes"), "dev", 1)
    with pytest.raises(InputError, match="count=0"):
        Stories(parse("boxes"), "train", 0)
    with pytest.raises(IndexError):
        Stories(parse("boxes"), "train", 1)[1]
