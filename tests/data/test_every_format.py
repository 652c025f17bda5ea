"""Every row format in every container, from a file to tokens: against what transformers' template gives, by hand.

What is learned is found by transformers alone: of a conversation what `apply_chat_template` adds to the messages before
an answer and the header that asks for it, up to the token that ends the turn.
"""

import pytest

from sst_jax.data.own import Rows
from sst_jax.data.prompts import render
from sst_jax.data.tokenizer import load_tokenizer
from tests.support.row_files import write_rows
from tests.support.template_folders import TEMPLATES, write_byte_level

ENDS = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>", "gemma3": "<end_of_turn>"}
CONTAINERS = (".jsonl", ".json", ".parquet", ".csv")
ODD = 'caf\u00e9, "x"\nand \u2028 \U0001f600'


def talk(*texts):
    return [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(texts)]


def parts(messages):
    return [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]


TALKS = [talk("Hi!", "Hello."), talk(ODD, "b 1", "c", "d")]
# By format: rows, and what each is; a text alone, a pair of texts, or messages of which the first so many are given.
ROWS = {
    "messages": [({"messages": found}, (found, 0)) for found in TALKS],
    "parts": [({"messages": parts(found)}, (found, 0)) for found in TALKS],
    "conversations": [
        (
            {
                "conversations": [
                    {"from": {"user": "human"}.get(m["role"], "gpt"), "value": m["content"]} for m in found
                ]
            },
            (found, 0),
        )
        for found in TALKS
    ],
    "prompt and completion as messages": [
        ({"prompt": found[:-1], "completion": found[-1:]}, (found, len(found) - 1)) for found in TALKS
    ],
    "prompt and completion": [({"prompt": p, "completion": c}, (p, c)) for p, c in (("1 + 1 =", " 2"), (ODD, ODD))],
    "question and answer": [
        ({"question": q, "answer": a}, (talk(q, a), 0)) for q, a in (("Why?", "So."), (ODD, "Yes."))
    ],
    "instruction": [
        ({"instruction": "Sort.", "input": given, "output": "1, 3"}, (talk(f"Sort.\n\n{given}", "1, 3"), 0))
        for given in ("3, 1", "1, 3")
    ],
    "text": [({"text": text}, text) for text in ("A text.", ODD)],
}


def is_nested(rows):
    return any(not isinstance(value, str) for row, _ in rows for value in row.values())


CASES = [(name, suffix) for name in ROWS for suffix in CONTAINERS if suffix != ".csv" or not is_nested(ROWS[name])]


@pytest.fixture(scope="module", params=ENDS)
def vocabulary(request, tmp_path_factory):
    """(ours, transformers', the piece that ends a turn) of a vocabulary with one template."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp(request.param)
    write_byte_level(folder, TEMPLATES[request.param])
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    return load_tokenizer(folder), theirs, theirs.convert_tokens_to_ids(ENDS[request.param])


def of_messages(theirs, end, messages, given):
    """(ids, which are learned), the answers found by what the template adds to the messages before them."""
    ids = theirs.apply_chat_template(messages)["input_ids"]
    learned = [False] * len(ids)
    for at, message in enumerate(messages):
        if message["role"] == "assistant" and at >= given:
            start = len(theirs.apply_chat_template(messages[:at], add_generation_prompt=True)["input_ids"])
            stop = ids.index(end, start) + 1
            learned[start:stop] = [True] * (stop - start)
    return ids, learned


def of_texts(theirs, asked, answered):
    """(ids, which are learned) of a text that follows another, with BOS before and EOS behind."""
    before = theirs(asked)["input_ids"]
    after = [*theirs(answered, add_special_tokens=False)["input_ids"], theirs.eos_token_id]
    return before + after, [False] * len(before) + [True] * len(after)


@pytest.mark.parametrize(("name", "suffix"), CASES)
def test_tokens_and_masks_are_those_made_by_hand(vocabulary, tmp_path, name, suffix):
    ours, theirs, end = vocabulary
    file = write_rows(tmp_path / f"rows{suffix}", [row for row, _ in ROWS[name]])
    documents = Rows(str(file)).read().documents
    for document, (_, meant) in zip(documents, ROWS[name], strict=True):
        if isinstance(meant, str):
            expected = {"plain": of_texts(theirs, "", meant)}
        elif isinstance(meant[1], str):  # as a chat, the prompt is a user's turn
            pair = talk(meant[0], meant[1].strip())
            expected = {"plain": of_texts(theirs, *meant), "chat": of_messages(theirs, end, pair, 0)}
        else:
            expected = {"chat": of_messages(theirs, end, *meant)}
        for format, (ids, learned) in expected.items():
            tokens, mask, _ = render(document, ours, format)
            assert tokens.tolist() == ids
            assert mask.tolist() == learned
