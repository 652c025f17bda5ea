"""Rows of one's own: what is found at a path, how it is held out and mixed, and what of it is learned."""

import json
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sst_jax.data import own
from sst_jax.data.documents import Conversation, Pair, Problem
from sst_jax.data.own import Rows, parse_columns, parse_paths
from sst_jax.data.prompts import asked_tokens, render
from sst_jax.data.tokenizer import ByteTokenizer
from sst_jax.errors import InputError
from sst_jax.training.problems import prepare_split, split_problems
from sst_jax.training.recipe import DataConfig
from tests.support.problems import gsm8k_lines, write_lines

TALK = [{"role": "user", "content": "Hi!"}, {"role": "assistant", "content": "Hello."}]
BY_FORMAT = {
    "messages": ({"messages": TALK}, Conversation),
    "sharegpt": ({"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}, Conversation),
    "prompt_completion": ({"prompt": "1 + 1 =", "completion": " 2"}, Pair),
    "instruction": ({"instruction": "Sort.", "input": "", "output": "1"}, Problem),
    "question_answer": ({"question": "Why?", "answer": "So."}, Problem),
    "text": ({"text": "A text."}, Problem),
}


def pairs(count, word="a"):
    return [{"prompt": f"{word} {n}", "completion": f" {n}"} for n in range(count)]


def data(path, **settings):
    return DataConfig(**{"name": "auto", "path": str(path), "heldout": 2, "format": "plain", **settings})


@pytest.mark.parametrize("name", BY_FORMAT)
def test_rows_say_what_they_are(tmp_path, name):
    row, kind = BY_FORMAT[name]
    found = Rows(str(write_lines(tmp_path / "a.jsonl", [row, row]))).read()
    assert found.format == name
    assert [type(document) for document in found.documents] == [kind, kind]
    assert str(found).startswith(f"{tmp_path}/a.jsonl: 2 rows of {name} (")


def test_gsm8k_is_what_every_answer_says_it_is(tmp_path):
    lines = gsm8k_lines("train", 4)
    file = write_lines(tmp_path / "a.jsonl", lines)
    assert Rows(str(file)).read().format == "gsm8k"
    write_lines(file, [*lines, {"question": "The capital?", "answer": "#### Paris"}])
    found = Rows(str(file)).read()
    assert found.format == "question_answer"
    assert found.documents[-1] == Problem("a.jsonl/4", "The capital?", "", "#### Paris")


def test_a_row_of_another_form_is_named_with_line_keys_seen_and_wanted(tmp_path):
    file = write_lines(tmp_path / "a.jsonl", [*pairs(2), {"text": "x"}])
    with pytest.raises(InputError) as error:
        Rows(str(file)).read()
    assert str(error.value) == (
        f"{file}, line 3: field 'prompt' is missing; the row has 'text', and needs 'prompt', 'completion'"
    )


def test_empty_texts_are_counted_and_left_out(tmp_path):
    file = write_lines(tmp_path / "a.jsonl", [{"text": ""}, {"text": "a"}, {"text": " \n"}])
    found = Rows(str(file)).read()
    assert (len(found.documents), found.empty) == (1, 2)
    with pytest.raises(InputError, match="all 1 of its rows are empty"):
        Rows(str(write_lines(file, [{"text": ""}]))).read()
    with pytest.raises(InputError, match=r"data\.path .*a\.jsonl: holds no rows"):
        Rows(str(write_lines(file, []))).read()


def test_of_a_folder_the_files_of_the_split_are_read_else_all(tmp_path):
    write_lines(tmp_path / "b.jsonl", pairs(2, "b"))
    write_lines(tmp_path / "a.jsonl", pairs(1, "a"))
    (tmp_path / "README.md").write_text("x")
    assert [document.prompt for document in Rows(str(tmp_path)).read().documents] == ["a 0", "b 0", "b 1"]
    write_lines(tmp_path / "train-00000-of-00002.jsonl", pairs(1, "first"))
    write_lines(tmp_path / "train-00001-of-00002.jsonl", pairs(1, "second"))
    write_lines(tmp_path / "test.jsonl", pairs(1, "test"))
    assert [document.prompt for document in Rows(str(tmp_path)).read().documents] == ["first 0", "second 0"]
    assert [document.prompt for document in Rows(str(tmp_path), split="test").read().documents] == ["test 0"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no file that is read"):
        Rows(str(tmp_path / "empty")).read()
    with pytest.raises(InputError, match="no such file or folder, nor a hub id"):
        Rows(str(tmp_path / "nothing")).read()


def test_columns_are_renamed(tmp_path):
    file = write_lines(tmp_path / "a.jsonl", [{"ask": "a", "reply": "b", "text": "c"}])
    assert Rows(str(file)).read().format == "text"
    found = Rows(str(file), columns=parse_columns("prompt=ask, completion=reply")).read()
    assert found.documents == [Pair("a.jsonl/0", "a", "b")]
    with pytest.raises(InputError, match=r"line 1: column 'answer' \(data.columns\) is missing; the row has 'ask', "):
        Rows(str(file), columns={"completion": "answer"}).read()
    for bad in ("prompt", "prompt=", "=ask", "frage=ask"):
        with pytest.raises(InputError, match=f"data.columns='{bad}'"):
            parse_columns(bad)


def test_paths_are_separated_by_commas_but_for_one_that_is_there(tmp_path):
    assert parse_paths("a.jsonl, b.jsonl") == ["a.jsonl", "b.jsonl"]
    odd = write_lines(tmp_path / "a,b.jsonl", pairs(1))
    assert parse_paths(str(odd)) == [str(odd)]


# ------------------------------------------------------------------------------------------------------ held-out, mixed


def prompts(documents):
    return [document.prompt for document in documents]


def test_rows_are_held_out_by_number_by_share_and_by_file(tmp_path):
    rows = pairs(40)
    file = write_lines(tmp_path / "a.jsonl", rows)
    for settings_, count in (({"heldout": 3}, 3), ({"heldout": 894}, 4), ({"heldout_share": 0.25}, 10)):
        split = split_problems(data(file, **settings_), seed=1)
        assert len(split.heldout) == count
        assert sorted(prompts([*split.training[0], *split.heldout])) == sorted(row["prompt"] for row in rows)
        assert prompts(split.heldout) == prompts(split_problems(data(file, **settings_), seed=1).heldout)
        assert prompts(split.heldout) != prompts(split_problems(data(file, **settings_), seed=2).heldout)
    other = write_lines(tmp_path / "held.csv", [])
    other.write_text("prompt,completion\nx,y\n")
    split = split_problems(data(file, heldout_path=str(other)), seed=1)
    assert prompts(split.heldout) == ["x"]
    assert prompts(split.training[0]) == [row["prompt"] for row in rows]
    assert [line.partition(":")[0] for line in split.seen] == [str(file), str(other)]
    with pytest.raises(InputError, match="1 row: too few"):
        split_problems(data(write_lines(file, pairs(1))), seed=1)


def test_several_paths_are_one_set_or_a_weighted_mixture(tmp_path):
    files = [write_lines(tmp_path / f"{name}.jsonl", pairs(20, name)) for name in "abc"]
    path = ",".join(map(str, files))
    split = split_problems(data(path, heldout=6), seed=0)
    assert (len(split.training), len(split.training[0]), len(split.heldout)) == (1, 54, 6)
    assert {text[0] for text in prompts(split.heldout)} == {"a", "b", "c"}
    mixed = split_problems(data(path, heldout=6, weights=(3.0, 1.0, 1.0)), seed=0)
    assert [len(source) for source in mixed.training] == [18, 18, 18]
    with pytest.raises(InputError, match=r"data.weights=\(1.0,\) must be as many as data.path has paths, 3"):
        split_problems(data(path, weights=(1.0,)), seed=0)
    assert len(split_problems(data(path, limit=30), seed=0).training[0]) == 30


def test_gsm8ks_folder_is_split_as_it_has_always_been(tmp_path):
    write_lines(tmp_path / "train.jsonl", gsm8k_lines("train", 30))
    split = split_problems(data(tmp_path, heldout=7), seed=3)
    named = split_problems(data(tmp_path, heldout=7, name="gsm8k"), seed=3)
    assert (split.name, split.training, split.heldout) == ("gsm8k", named.training, named.heldout)
    shuffled = list(range(30))
    random.Random(3).shuffle(shuffled)
    assert [document.id for document in split.heldout] == [f"gsm8k/train/{n}" for n in shuffled[:7]]


@pytest.mark.parametrize(
    ("settings_", "said"),
    [
        ({"name": "words", "path": "/nothing"}, r"data.path=/nothing is not read: data.name='words' is generated"),
        ({"name": "rooms:1-4", "path": "x"}, "data.path=x is not read"),
        ({"name": "words:result", "path": "x"}, "data.path=x is not read"),
        ({"name": "gsm8k", "columns": "prompt=a"}, "data.columns='prompt=a' is for rows of one's own"),
        ({"name": "gsm8k", "heldout_share": 0.5}, "data.heldout_share=0.5 is for rows of one's own"),
        ({"name": "messages", "path": ""}, "data.name='messages' needs data.path"),
        ({"learn": "everything"}, "data.learn='everything' is not one of 'assistant', 'last', 'all'"),
        ({"heldout_share": 1.0}, "data.heldout_share=1.0 must be at least 0 and below 1"),
        ({"weights": (1.0, -1.0)}, "must be positive"),
    ],
)
def test_knobs_that_would_not_be_read_are_refused(settings_, said):
    with pytest.raises(InputError, match=said):
        data(**{"path": "a", **settings_})


def test_a_result_alone_is_of_gsm8k(tmp_path):
    with pytest.raises(InputError, match=r"data\.name='auto:result'"):
        split_problems(data(write_lines(tmp_path / "a.jsonl", pairs(9)), name="auto:result"), seed=0)


# -------------------------------------------------------------------------------------------------------------- learned

BYTE = ByteTokenizer()


def test_a_pair_is_taken_word_for_word():
    tokens, mask, _ = render(Pair("p", "1 + 1 =", " 2\n"), BYTE)
    assert tokens.tolist() == [BYTE.bos_id, *BYTE.encode_text("1 + 1 = 2\n"), BYTE.eos_id]
    assert tokens[mask].tolist() == [*BYTE.encode_text(" 2\n"), BYTE.eos_id]
    assert asked_tokens(Pair("p", "1 + 1 =", " 2\n"), BYTE) == tokens[~mask].tolist()


@pytest.mark.parametrize("vocabulary", ["gemma", "smol"])
@settings(max_examples=60, deadline=None)
@given(prompt=st.text("ab \n1.é", max_size=12), completion=st.text("ab \n1.é", min_size=1, max_size=12))
def test_a_pair_is_one_text_unless_a_token_crosses_the_border(request, vocabulary, prompt, completion):
    tokenizer = request.getfixturevalue(vocabulary)
    tokens, mask, _ = render(Pair("p", prompt, completion), tokenizer)
    asked, learned = tokens[~mask].tolist(), tokens[mask].tolist()
    bare = [] if asked else [tokens[0]]  # a text's first token is never learned
    assert asked + bare == tokenizer.encode(prompt) or (not prompt and asked == [tokens[0]])
    whole = tokenizer.encode(prompt + completion)
    apart = [*tokenizer.encode(prompt), *tokenizer.encode_text(completion)]
    ids = [*asked, *learned]
    assert ids[:-1] in (whole, apart)
    assert ids[:-1] == whole or whole[: len(asked)] != asked
    assert ids[-1] == tokenizer.eos_id


def test_of_a_text_all_is_learned_and_its_end():
    tokens, mask, _ = render(Problem("t", "", "", " A text.\n"), BYTE)
    assert tokens.tolist() == [BYTE.bos_id, *BYTE.encode_text(" A text.\n"), BYTE.eos_id]
    assert mask.tolist() == [False] + [True] * (len(tokens) - 1)


@pytest.mark.parametrize("document", [Pair("p", "a", "b"), Problem("q", "a", "", "b")])
def test_all_may_be_learned(document):
    tokens, mask, _ = render(document, BYTE, learn="all")
    assert tokens.tolist() == render(document, BYTE).tokens.tolist()
    assert mask.tolist() == [False] + [True] * (len(tokens) - 1)


def test_messages_need_a_chat():
    with pytest.raises(InputError, match=r"m: messages are put into words by a chat template: set data\.format=chat"):
        render(Conversation("m", tuple(TALK), 0, "Hello."), BYTE, "plain")


def test_a_split_is_prepared_source_by_source(tmp_path):
    files = [write_lines(tmp_path / f"{name}.jsonl", pairs(20, name)) for name in "ab"]
    config = data(",".join(map(str, files)), weights=(1.0, 2.0), length=32)
    sources, heldout = prepare_split(split_problems(config, seed=0), config, BYTE)
    assert [len(source) for source in sources] == [19, 19]
    assert len(heldout) == 2
    with pytest.raises(InputError, match=r"exceed data\.length=8"):
        prepare_split(split_problems(config, seed=0), data(config.path, length=8), BYTE)


@pytest.mark.parametrize("count", [0, 3])
def test_duplicates_are_counted(count):
    documents = [Pair(str(n), "a", "b") for n in range(count + 1)] + [Pair("x", "a", "c"), Problem("y", "a", "b", "c")]
    assert own.duplicates(documents) == count


MUTATIONS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["role", "content", "text"]), inner),
    max_leaves=6,
)
KEYS = sorted({key for row, _ in BY_FORMAT.values() for key in row})


@settings(max_examples=300, deadline=None)
@given(row=st.dictionaries(st.sampled_from(KEYS), MUTATIONS, max_size=4))
def test_any_row_is_read_or_refused_in_words(tmp_path_factory, row):
    file = tmp_path_factory.getbasetemp() / "any.jsonl"
    file.write_text(json.dumps(row) + "\n")
    said = []
    try:
        found = Rows(str(file)).read()
    except InputError as error:
        said.append(str(error))
    if said:
        assert "any.jsonl" in said[0]
        return
    for document in found.documents:
        if not isinstance(document, Conversation):
            tokens, mask, _ = render(document, BYTE)
            assert tokens.dtype == np.int32
            assert mask.any()
