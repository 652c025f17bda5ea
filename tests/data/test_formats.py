"""Row formats and data sets: what a row becomes, and which line, keys seen and keys wanted an error names."""

import json

import pytest

from sst_jax.data.datasets import DATASETS, Files, find, names
from sst_jax.data.documents import Conversation, Item, Pair, Problem
from sst_jax.data.formats import ROW_FORMATS, read_row, recognise
from sst_jax.data.prompts import render, whole_text
from sst_jax.data.records import Record, read_jsonl
from sst_jax.data.tokenizer import ByteTokenizer
from sst_jax.errors import InputError
from tests.support import guides
from tests.support.problems import write_lines

TALK = [{"role": "user", "content": "Hi!"}, {"role": "assistant", "content": "Hello."}]
# By format, a row and what is made of it; rows hold keys that no format wants.
ROWS = {
    "messages": (
        {"messages": [{"role": "system", "content": "Be brief."}, *TALK], "source": "x"},
        Item(Conversation("set/3", ({"role": "system", "content": "Be brief."}, *TALK), 0, "Hello.")),
    ),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": "Hi!"}, {"from": "gpt", "value": "Hello."}]},
        Item(Conversation("set/3", tuple(TALK), 0, "Hello.")),
    ),
    "prompt_completion": (
        {"prompt": "1 + 1 =", "completion": " 2\n", "id": 7},
        Item(Pair("set/3", "1 + 1 =", " 2\n")),
    ),
    "text": ({"text": " A text.\n", "url": "x"}, Item(Problem("set/3", "", "", " A text.\n"))),
    "question_answer": (
        {"question": " Why? ", "answer": "So.\n#### 7\n"},
        Item(Problem("set/3", "Why?", "", "So.\n#### 7")),
    ),
    "instruction": (
        {"instruction": "Sort.", "input": "3, 1", "output": " 1, 3\n", "text": "Below is ..."},
        Item(Problem("set/3", "Sort.\n\n3, 1", "", "1, 3")),
    ),
    "gsm8k": (
        {"question": " Why? ", "answer": "3 * 400 = <<3*400=1200>>1,200.\n#### 1,200"},
        Item(Problem("set/3", "Why?", "3 * 400 = 1,200.", "1200")),
    ),
    "math": (
        {"problem": "Halve $1$.", "solution": "...", "answer": r"\dfrac{1}{2}", "level": 2},
        Item(Problem("set/3", "Halve $1$.\nEnd with the final answer in \\boxed{}.", "...", r"\dfrac{1}{2}")),
    ),
    "gpqa": (
        {
            "Record ID": "r1",
            "Question": "Which is blue?",
            "Correct Answer": "sky",
            **{f"Incorrect Answer {n}": name for n, name in enumerate(("grass", "milk", "coal"), 1)},
        },
        Item(
            Problem(
                "set/r1",
                "Which is blue?\n(A) coal\n(B) grass\n(C) milk\n(D) sky\n"
                'Think step by step, then end with "The answer is (X)", X being the letter of the right choice.',
                "",
                "D",
            ),
            (3, 1, 2, 0),
        ),
    ),
    "arc": (
        {"question": "Hot?", "choices": {"text": ["ice", "fire"], "label": ["1", "2"]}, "answerKey": "2"},
        Item(
            Problem(
                "set/3",
                "Hot?\n(A) ice\n(B) fire\n"
                'Think step by step, then end with "The answer is (X)", X being the letter of the right choice.',
                "",
                "B",
            ),
            (0, 1),
        ),
    ),
}


# Further rows of a format, and what is asked.
ASKED = [
    ("instruction", {"instruction": "Say hello.", "input": "", "output": "Hello."}, "Say hello."),
    ("instruction", {"instruction": "Say hello.", "output": "Hello."}, "Say hello."),
    ("instruction", {"instruction": "Say hello.", "input": None, "output": "Hello."}, "Say hello."),
]


# Messages that are none, and what is said of them.
BAD_MESSAGES = [
    ([], "field 'messages' is not a list of messages"),
    ("Hi!", "field 'messages' is not a list of messages"),
    ([*TALK, {"role": "bot", "content": "x"}], r"messages\[2\] has the role 'bot', which is none of system, "),
    ([*TALK, {"content": "x"}], r"messages\[2\] has the role 'None'"),
    ([TALK[0], {"role": "assistant"}], r"messages\[1\] has no text as its 'content'"),
    ([TALK[0], {"role": "assistant", "content": [{"type": "image"}]}], r"messages\[1\] has a part that is not text"),
    (TALK[:1], "no message is from 'assistant'"),
]


def record(value):
    return Record(3, "a.jsonl, line 4", value)


@pytest.mark.parametrize("name", ROW_FORMATS)
def test_a_row_becomes_an_item(name):
    row, item = ROWS[name]
    assert read_row(ROW_FORMATS[name], record(row), "set") == item


@pytest.mark.parametrize(("name", "row", "asked"), ASKED)
def test_what_may_be_missing(name, row, asked):
    assert read_row(ROW_FORMATS[name], record(row), "set").problem.question == asked


@pytest.mark.parametrize("name", ROW_FORMATS)
def test_a_row_without_one_of_the_keys_is_named_with_keys_seen_and_wanted(name):
    format, (row, _) = ROW_FORMATS[name], ROWS[name]
    for key in format.keys:
        without = {**{other: value for other, value in row.items() if other != key}, "odd": 1}
        with pytest.raises(InputError) as error:
            read_row(format, record(without), "set")
        seen, wanted = (", ".join(map(repr, keys)) for keys in (without, format.keys))
        message = f"a.jsonl, line 4: field {key!r} is missing; the row has {seen}, and needs {wanted}"
        assert str(error.value) == message


@pytest.mark.parametrize("name", ROW_FORMATS)
@pytest.mark.parametrize("bad", [None, 3, ["x"], {"text": "x"}])
def test_a_field_that_is_not_text_is_named(name, bad):
    format, (row, _) = ROW_FORMATS[name], ROWS[name]
    for key in format.keys:
        with pytest.raises(InputError, match=r"^a\.jsonl, line 4: (field|needs a question|messages\[0\])"):
            read_row(format, record({**row, key: bad}), "set")


@pytest.mark.parametrize(("messages", "said"), BAD_MESSAGES)
def test_messages_that_are_none_are_named(messages, said):
    with pytest.raises(InputError, match=f"^a.jsonl, line 4: {said}"):
        read_row(ROW_FORMATS["messages"], record({"messages": messages}), "set")


def test_parts_are_put_together_and_what_else_a_message_holds_is_kept():
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo."}]
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}], "name": None}
    tool = {"role": "tool", "content": "3", "name": "f"}
    rows = {"messages": [TALK[0], call, tool, {"role": "assistant", "content": parts}]}
    found = read_row(ROW_FORMATS["messages"], record(rows), "set").problem
    assert found.messages == (
        TALK[0],
        {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]},
        tool,
        {"role": "assistant", "content": "Hello."},
    )
    assert (found.question, found.result, len(found.asked)) == ("Hi!", "Hello.", 3)


def test_prompt_and_completion_may_be_messages():
    row = {
        "prompt": [*TALK, {"role": "user", "content": "And?"}],
        "completion": [{"role": "assistant", "content": "No."}],
    }
    found = read_row(ROW_FORMATS["prompt_completion"], record(row), "set").problem
    assert (len(found.messages), found.given, found.question, found.result) == (4, 3, "And?", "No.")
    with pytest.raises(InputError, match="no message of the completion is from 'assistant'"):
        read_row(ROW_FORMATS["prompt_completion"], record({**row, "completion": TALK[:1]}), "set")
    with pytest.raises(InputError, match="field 'completion' is empty"):
        read_row(ROW_FORMATS["prompt_completion"], record({"prompt": "a", "completion": ""}), "set")


def test_tools_are_refused_by_name():
    with pytest.raises(InputError, match="line 4: field 'tools' is not supported"):
        read_row(ROW_FORMATS["messages"], record({"messages": TALK, "tools": [{"name": "f"}]}), "set")


@pytest.mark.parametrize(
    "bad", [{"text": ["a", 7], "label": ["1", "2"]}, {"text": ["a"]}, {"text": "ab", "label": "12"}]
)
def test_choices_that_are_none(bad):
    row, _ = ROWS["arc"]
    with pytest.raises(InputError, match="line 4: field 'choices' must hold the lists"):
        read_row(ROW_FORMATS["arc"], record({**row, "choices": bad}), "set")


def test_rows_that_are_no_objects_are_named():
    for value in ([1, 2], "text", 7, None):
        for read in (recognise, lambda row: read_row(ROW_FORMATS["text"], row, "set")):
            with pytest.raises(InputError, match="line 4: not a JSON object"):
                read(record(value))


@pytest.mark.parametrize("name", ROW_FORMATS)
def test_a_format_is_recognised_by_its_keys(name):
    row = {key: value for key, value in ROWS[name][0].items() if name == "text" or key != "text"}
    assert ROW_FORMATS[recognise(record(row))].keys == ROW_FORMATS[name].keys


def test_unknown_rows_are_named_with_the_keys_of_every_format():
    with pytest.raises(InputError) as error:
        recognise(record({"frage": "x", "k" * 100: "y", **dict.fromkeys("abcdefghijklm", "z")}))
    message = str(error.value)
    assert message.startswith(f"a.jsonl, line 4: the row has 'frage', '{'k' * 40}...', 'a', ")
    assert " and 3 more, and needs 'messages'; or 'conversations'; or 'prompt', 'completion'; or " in message
    for format in ROW_FORMATS.values():
        assert ", ".join(map(repr, format.keys)) in message
    with pytest.raises(InputError, match="the row has no keys, and needs"):
        recognise(record({}))


def test_mixed_rows_of_a_named_data_set_are_refused_at_their_line(tmp_path):
    write_lines(tmp_path / "train.jsonl", [ROWS["gsm8k"][0], "", ROWS["text"][0]])
    with pytest.raises(InputError, match=r"train\.jsonl, line 3: field 'question' is missing; the row has 'text', "):
        find("gsm8k").source.problems("train", str(tmp_path), "data.path")


def test_the_whole_text_of_a_row(tmp_path):
    file = write_lines(tmp_path / "a.jsonl", [ROWS[name][0] for name in ("text", "question_answer")])
    texts = [whole_text(read_row(ROW_FORMATS[recognise(row)], row, "a").problem) for row in read_jsonl(file)]
    assert texts == [" A text.\n", "Question: Why?\nAnswer: So.\n#### 7"]


# ------------------------------------------------------------------------------------------------------- data sets


def test_an_instruction_is_asked_and_its_output_learned():
    byte, problem = ByteTokenizer(), ROWS["instruction"][1].problem
    for format, asked, learned in (
        ("plain", "Question: Sort.\n\n3, 1\nAnswer:", " 1, 3"),
        ("chat", "user\nSort.\n\n3, 1\nmodel\n", "1, 3"),
    ):
        tokens, mask, _ = render(problem, byte, format)
        end = byte.eos_id if format == "plain" else byte.turn_end_id
        assert byte.decode(tokens[: mask.argmax()]) == asked
        assert tokens[mask].tolist() == [*byte.encode_text(learned), end]


def row_of(format, number):
    """A row of a format that differs from those of other numbers."""
    row = dict(ROWS[format][0])
    key = ROW_FORMATS[format].keys[0]
    return {**row, key: f"{row[key]} {number}", **({"Record ID": str(number)} if format == "gpqa" else {})}


FILES = {name: dataset.source for name, dataset in DATASETS.items() if isinstance(dataset.source, Files)}


@pytest.mark.parametrize("name", FILES)
def test_every_data_set_of_files_reads_every_split_from_a_folder(name, tmp_path):
    source = FILES[name]
    for split, (files, _) in source.splits.items():
        folder = tmp_path / split
        with pytest.raises(InputError, match=r"no such folder, nor a hub id"):
            source.read(split, str(folder), "--data")
        folder.mkdir()
        with pytest.raises(InputError, match=files[0].replace(".", r"\.")):
            source.read(split, str(folder), "--data")
        file = write_lines(folder / files[-1], [row_of(source.format, number) for number in range(5)])
        items = source.read(split, str(folder), "--data")
        assert len({item.id for item in items}) == 5
        assert all(item.id.startswith(f"{name}/") for item in items)
        assert all(item.problem.question and item.problem.result for item in items)
        if len(source.splits) == 1:
            assert source.read(split, str(file), "--data") == items
        else:
            with pytest.raises(InputError, match="is a file; name the folder"):
                source.read(split, str(file), "--data")


@pytest.mark.parametrize("name", [name for name, dataset in DATASETS.items() if dataset.source.trains])
def test_every_data_set_that_trains_holds_out_what_it_does_not_train_on(name, tmp_path):
    source = DATASETS[name].source
    if name in FILES:
        write_lines(tmp_path / source.splits["train"].files[0], [row_of(source.format, number) for number in range(30)])
    training, heldout = source.training(str(tmp_path), heldout=7, limit=20, seed=3)
    assert (len(training), len(heldout)) == (20, 7)
    again = source.training(str(tmp_path), heldout=7, limit=20, seed=3)
    assert [list(part) for part in again] == [list(training), list(heldout)]
    assert list(heldout) != list(source.training(str(tmp_path), heldout=7, limit=20, seed=4)[1])
    assert not {problem.question for problem in training} & {problem.question for problem in heldout}


def test_names_and_options():
    assert find("nothing") is find("gsm8k:steps") is find("gsm8k:") is find("math_500:result") is None
    assert find("rooms:8").name == "rooms:8"
    assert find("words:result").worked
    trains = set(names(lambda dataset: dataset.source.trains))
    assert {"gsm8k", "gsm8k:result", "words", "words:result", "boxes"} <= trains
    assert not {"gpqa_diamond", "arc_challenge", "math_500"} & trains
    assert all(find(name) is not None for name in names(lambda dataset: True))
    for name, dataset in DATASETS.items():
        assert dataset.name == name
        if isinstance(dataset.source, Files):
            assert dataset.source.name == name
            assert dataset.source.format in ROW_FORMATS
            assert set(dataset.source.splits) <= {"train", "test"}
            assert (dataset.grading is None) == ("test" not in dataset.source.splits)


def test_the_guide_quotes_the_files_that_it_writes():
    """Every block of code in docs/adding-a-dataset.md stands in one of them, line for line."""
    files = ("sst_jax/data/formats.py", "sst_jax/data/datasets.py", "tests/data/test_formats.py")
    guides.check_quotes("adding-a-dataset.md", files, least=4)


def test_a_folder_that_is_named_like_a_hub_id_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "openai/gsm8k").mkdir(parents=True)
    (tmp_path / "openai/gsm8k/train.jsonl").write_text(json.dumps(ROWS["gsm8k"][0]))
    assert len(find("gsm8k").source.read("train", "openai/gsm8k", "data.path")) == 1
