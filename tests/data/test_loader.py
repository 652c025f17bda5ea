"""Rows: nothing lost, nothing leaked, the same again by seed, and an exact resume from anywhere."""

import itertools
import json
import logging
from collections import Counter

import grain.checkpoint
import numpy as np
import orbax.checkpoint as ocp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sst_jax.data.documents import Problem
from sst_jax.data.loader import Layout, fixed_batches, mixed_rows, prepare, rows
from sst_jax.data.problems import word_problems
from sst_jax.data.prompts import Example, render
from sst_jax.data.tokenizer import ByteTokenizer
from sst_jax.errors import InputError
from tests.support.problems import load_gsm8k

KEYS = {"tokens": np.int32, "segment_ids": np.int32, "positions": np.int32, "answer_mask": bool}


def _examples(count: int, longest: int = 30, seed: int = 0) -> list[Example]:
    """Documents told apart by their tokens: document i holds [1000 i + 1, 1000 i + 2, ...]."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, longest + 1, count)
    return [
        Example(np.arange(1, n + 1, dtype=np.int32) + 1000 * i, rng.random(n) < 0.5, f"doc/{i}")
        for i, n in enumerate(lengths)
    ]


def _documents(batches) -> list[tuple[tuple[int, ...], tuple[bool, ...]]]:
    """Reads documents back out of rows, checking each row's layout on the way."""
    found = []
    for batch in batches:
        for tokens, segments, positions, mask in zip(*(batch[key] for key in KEYS), strict=True):
            used = int((segments > 0).sum())
            assert (segments[:used] > 0).all(), "padding only at the end"
            assert not any(values[used:].any() for values in (tokens, positions, mask))
            # Segment ids are 1, 2, ... without a gap, so each document is one contiguous run.
            assert (np.diff(segments[:used], prepend=0) >= 0).all()
            assert set(segments[:used].tolist()) == set(range(1, int(segments.max()) + 1))
            for segment in range(1, int(segments.max()) + 1):
                inside = segments == segment
                assert positions[inside].tolist() == list(range(int(inside.sum())))
                found.append((tuple(tokens[inside].tolist()), tuple(mask[inside].tolist())))
    return found


def _expected(examples) -> Counter:
    return Counter((tuple(e.tokens.tolist()), tuple(e.answer_mask.tolist())) for e in examples)


def _order(batches) -> list[int]:
    return [tokens[0] // 1000 for tokens, _ in _documents(batches)]


def _same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(1, 200),
    length=st.integers(30, 80),
    batch_size=st.integers(1, 5),
    pack=st.booleans(),
    seed=st.integers(0, 5),
    epochs=st.integers(1, 3),
)
def test_an_epoch_holds_every_document_once_and_whole(count, length, batch_size, pack, seed, epochs):
    examples = _examples(count, seed=seed)
    batches = list(rows(examples, Layout(length, batch_size, pack=pack), seed=seed, epochs=epochs))
    for batch in batches:
        assert {key: value.dtype for key, value in batch.items()} == KEYS
        assert {value.shape for value in batch.values()} == {(batch_size, length)}
    found = _documents(batches)
    assert Counter(found) == Counter(dict.fromkeys(_expected(examples), epochs))
    if not pack:
        assert max(batch["segment_ids"].max() for batch in batches) == 1
    # Only the last batch may hold rows of padding.
    assert all((batch["segment_ids"][:, 0] == 1).all() for batch in batches[:-1])


def test_packing_packs():
    examples = _examples(2000)
    packed = list(rows(examples, Layout(128, 8), epochs=1))
    filled = np.mean([(batch["segment_ids"] > 0).mean() for batch in packed])
    assert filled > 0.9
    assert max(batch["segment_ids"].max() for batch in packed) > 5


@pytest.mark.parametrize("pack", [True, False])
def test_order_depends_on_the_seed_alone(pack):
    examples = _examples(60)

    def first(seed):
        return list(itertools.islice(rows(examples, Layout(64, 2, pack=pack), seed=seed), 40))

    assert all(itertools.starmap(_same, zip(first(3), first(3), strict=True)))
    assert _order(first(3)) != _order(first(4))


def test_every_epoch_is_reshuffled():
    examples = _examples(50)
    order = _order(rows(examples, Layout(30, 1, pack=False), epochs=3))
    epochs = [order[start : start + 50] for start in (0, 50, 100)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert list(range(50)) not in epochs


def test_without_epochs_it_never_ends():
    found = _order(itertools.islice(rows(_examples(40), Layout(30, 4, pack=False)), 200))
    assert Counter(found) == dict.fromkeys(range(40), 20)


BATCHES = 40  # more than one fill of the packer's bins, and more than one epoch


@settings(max_examples=6, deadline=None)
@given(data=st.data(), pack=st.booleans(), seed=st.integers(0, 3), epochs=st.sampled_from([None, 2]))
def test_resume_is_exact_anywhere(data, pack, seed, epochs):
    examples = _examples(data.draw(st.integers(40, 200)), seed=seed)

    def start():
        return rows(examples, Layout(48, 4, pack=pack), seed=seed, epochs=epochs)

    whole = list(itertools.islice(start(), BATCHES))
    before = data.draw(st.integers(0, len(whole)))
    first = start()
    seen = list(itertools.islice(first, before))
    state = json.loads(json.dumps(first.get_state()))
    resumed = start()
    resumed.set_state(state)
    rest = list(itertools.islice(resumed, BATCHES - before))
    assert len(seen) + len(rest) == len(whole)
    assert all(itertools.starmap(_same, zip(seen + rest, whole, strict=True)))
    # A used iterator can be set back as well.
    first.set_state(state)
    assert all(itertools.starmap(_same, zip(itertools.islice(first, 5), whole[before : before + 5], strict=False)))


def test_resume_through_an_orbax_checkpoint(tmp_path):
    examples = _examples(80)
    iterator = rows(examples, Layout(64, 2), seed=1)
    for _ in range(7):
        next(iterator)
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(7, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(iterator)))
    expected = [next(iterator) for _ in range(5)]
    fresh = rows(examples, Layout(64, 2), seed=1)
    with ocp.CheckpointManager(tmp_path) as manager:
        restored = manager.restore(7, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(fresh)))
    assert all(_same(next(restored["data"]), batch) for batch in expected)


def _sources() -> list[list[Example]]:
    """Three sources of unequal size, whose documents are told apart by their tokens."""
    documents = _examples(60)
    return [documents[:5], documents[5:25], documents[25:]]


@pytest.mark.fast_cases(1)
@pytest.mark.parametrize("pack", [True, False])
def test_a_mixture_draws_by_weight_whatever_the_sizes(pack):
    sources, weights = _sources(), (5.0, 1.0, 2.0)
    batches = itertools.islice(mixed_rows(sources, weights, Layout(32, 4, pack), seed=3), 120)
    order = _order(batches)
    ends = (5, 25, 60)
    drawn = [sum(low <= number < high for number in order) for low, high in zip((0, *ends), ends, strict=False)]
    assert np.allclose(np.array(drawn) / len(order), np.array(weights) / 8, atol=0.03)
    assert set(order) == set(range(60))
    again = list(itertools.islice(mixed_rows(sources, weights, Layout(32, 4, pack), seed=3), 3))
    other = list(itertools.islice(mixed_rows(sources, weights, Layout(32, 4, pack), seed=4), 3))
    first = list(itertools.islice(mixed_rows(sources, weights, Layout(32, 4, pack), seed=3), 3))
    assert all(map(_same, again, first))
    assert not all(map(_same, other, first))


@pytest.mark.slow
@settings(max_examples=20, deadline=None)
@given(data=st.data(), pack=st.booleans(), seed=st.integers(0, 99))
def test_a_mixture_resumes_exactly_anywhere(data, pack, seed):
    weights = (1.0, 3.0, 0.5)
    whole = list(itertools.islice(mixed_rows(_sources(), weights, Layout(32, 2, pack), seed=seed), 14))
    stop = data.draw(st.integers(0, 13))
    first = mixed_rows(_sources(), weights, Layout(32, 2, pack), seed=seed)
    for _ in range(stop):
        next(first)
    state = json.loads(json.dumps(first.get_state()))
    rest = mixed_rows(_sources(), weights, Layout(32, 2, pack), seed=seed)
    rest.set_state(state)
    assert all(map(_same, itertools.islice(rest, 14 - stop), whole[stop:]))


def test_a_mixture_refuses_an_empty_source_and_what_does_not_fit():
    with pytest.raises(InputError, match="a source of the mixture is empty"):
        mixed_rows([_examples(3), []], (1.0, 1.0), Layout(32, 2))
    with pytest.raises(InputError, match=r"needs data\.length="):
        mixed_rows([_examples(3)], (1.0,), Layout(2, 2))


@pytest.mark.parametrize("pack", [True, False])
def test_shards_are_disjoint_and_complete_in_every_epoch(pack):
    examples = _examples(50)
    first, second = ([
        _order(rows(examples, Layout(64, 2, pack=pack), epochs=epochs, shard_index=shard, shard_count=3))
        for shard in range(3)
    ] for epochs in (1, 2))  # fmt: skip
    assert sorted(itertools.chain(*first)) == list(range(50))
    assert [len(order) for order in first] == [17, 17, 16]
    assert sorted(itertools.chain(*second)) == sorted([*range(50), *range(50)])
    assert [set(order) for order in first] != [set(order) for order in second]  # documents change shards


def test_pad_id_fills_padding_and_nothing_else():
    examples = _examples(7)
    make = [
        lambda pad: list(rows(examples, Layout(64, 4, pad_id=pad), epochs=1)),
        lambda pad: list(rows(examples, Layout(64, 4, pack=False, pad_id=pad), epochs=1)),
        lambda pad: fixed_batches(examples, Layout(64, 4, pad_id=pad, pack=False)),
    ]
    for batches in make:
        for plain, padded in zip(batches(0), batches(9), strict=True):
            inside = plain["segment_ids"] > 0
            assert not inside.all()
            assert (padded["tokens"][~inside] == 9).all()
            assert np.array_equal(padded["tokens"][inside], plain["tokens"][inside])
            assert padded["tokens"].dtype == np.int32


# ----------------------------------------------------------------------------------------------------- fixed batches


@pytest.mark.parametrize(
    ("most", "even", "rows"), [(32, 1, [23]), (8, 1, [8] * 3), (20, 2, [12] * 2), (16, 8, [16] * 2)]
)
def test_even_batches_hold_as_little_padding_as_their_number_allows(most, even, rows):
    batches = fixed_batches(_examples(23), Layout(50, most, pack=False), even=even)
    assert [len(batch["tokens"]) for batch in batches] == rows
    assert sum(len(ids) for batch in batches for ids in batch["ids"]) == 23


@pytest.mark.parametrize("pack", [True, False])
def test_fixed_batches(pack):
    examples = _examples(23)
    batches = fixed_batches(examples, Layout(50, 4, pack=pack))
    again = fixed_batches(examples, Layout(50, 4, pack=pack))
    assert all(one["ids"] == other["ids"] for one, other in zip(batches, again, strict=True))
    for batch in batches:
        assert {key: batch[key].dtype for key in KEYS} == KEYS
        assert {batch[key].shape for key in KEYS} == {(4, 50)}
    assert Counter(_documents(batches)) == _expected(examples)
    by_id = {example.id: example for example in examples}
    seen = []
    for batch in batches:
        for row, ids in enumerate(batch["ids"]):
            assert batch["segment_ids"][row].max() == len(ids)
            for segment, id in enumerate(ids, start=1):
                inside = batch["segment_ids"][row] == segment
                assert np.array_equal(batch["tokens"][row][inside], by_id[id].tokens)
                seen.append(id)
    assert sorted(seen) == sorted(by_id)
    if pack:
        assert len(batches) < 6
    else:
        assert seen == [example.id for example in examples]
        assert batches[-1]["ids"][-1] == []  # 23 rows and one of padding
        assert not batches[-1]["segment_ids"][-1].any()


# ------------------------------------------------------------------------------------------------------------ errors


def test_prepare_checks_lengths_before_anything_trains(byte, caplog):
    problems = list(word_problems("train", 39))
    problems.insert(7, Problem("long/1", "How many? " * 60, "4 + 1 = 5", "5"))
    sizes = [len(render(problem, byte).tokens) for problem in problems]
    longest = 7
    assert max(sizes) == sizes[longest]
    fitting = prepare(problems, byte, length=max(sizes))
    assert [example.id for example in fitting] == [problem.id for problem in problems]
    with pytest.raises(InputError, match=rf"1 of 40 .*{problems[longest].id}, needs {max(sizes)}.*overlong=drop"):
        prepare(problems, byte, length=max(sizes) - 1)
    with caplog.at_level(logging.WARNING, logger="sst_jax"):
        kept = prepare(problems, byte, length=max(sizes) - 1, overlong="drop")
    assert [example.id for example in kept] == [p.id for i, p in enumerate(problems) if i != longest]
    assert "dropped: 1 of 40" in caplog.text
    with pytest.raises(InputError, match="leaves none"):
        prepare(problems, byte, length=10, overlong="drop")
    with pytest.raises(InputError, match="empty"):
        prepare([], byte, length=10)
    with pytest.raises(InputError, match="overlong='cut'"):
        prepare(problems, byte, length=10, overlong="cut")


def test_prepare_tokenises_each_problem_once():
    class Counting(ByteTokenizer):
        calls = 0

        def encode_text(self, text):
            Counting.calls += 1
            return super().encode_text(text)

    examples = prepare(word_problems("train", 30), Counting(), length=600)
    assert Counting.calls == 60  # a prompt and an answer each
    list(rows(examples, Layout(600, 4), epochs=2))
    assert Counting.calls == 60


@pytest.mark.parametrize(
    ("layout", "change", "message"),
    [
        ({"length": 0}, {}, "data.length=0"),
        ({"batch_size": 0}, {}, "data.batch_size=0"),
        ({}, {"epochs": 0}, "data.epochs=0"),
        ({}, {"shard_count": 0}, "data.shard_count=0"),
        ({}, {"shard_index": 2, "shard_count": 2}, "data.shard_index=2"),
        ({}, {"shard_index": -1}, "data.shard_index=-1"),
        ({}, {"shard_count": 21}, "20 examples cannot feed 21 shard"),
        ({"length": 5}, {}, r"example doc/\d+ needs data.length=\d+, more than 5"),
    ],
)
def test_rows_refuses(layout, change, message):
    with pytest.raises(InputError, match=message):
        rows(_examples(20), Layout(**{"length": 40, "batch_size": 2, **layout}), **change)


def test_empty_and_overlong_are_refused_everywhere():
    with pytest.raises(InputError, match="0 examples"):
        rows([], Layout(8, 2))
    with pytest.raises(InputError, match="empty"):
        fixed_batches([], Layout(8, 2, pack=False))
    with pytest.raises(InputError, match="batch_size=0"):
        fixed_batches(_examples(3), Layout(40, 0, pack=False))
    with pytest.raises(InputError, match=r"doc/\d+ needs"):
        fixed_batches(_examples(20), Layout(5, 2, pack=False))


@pytest.mark.slow
def test_gsm8k_rows_with_gemma(gemma, gsm8k_folder):
    """The real thing, end to end: every answer of the split comes out of the rows once, word for word."""
    problems = load_gsm8k(str(gsm8k_folder), "test")
    examples = prepare(problems, gemma, length=1024, format="chat")
    answers = Counter()
    for batch in rows(examples, Layout(1024, 4), seed=0, epochs=1):
        for row in range(4):
            for segment in range(1, batch["segment_ids"][row].max() + 1):
                inside = (batch["segment_ids"][row] == segment) & batch["answer_mask"][row]
                answers[gemma.decode(batch["tokens"][row][inside])] += 1
    assert answers == Counter(f"{problem.answer}\n#### {problem.result}" for problem in problems)
