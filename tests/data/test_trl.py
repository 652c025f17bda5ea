"""Rows of prompts and completions, and running text, against TRL's own preprocessing, token for token.

What runs is `SFTTrainer._prepare_dataset` itself, on a stand-in for the trainer: no model is made.
"""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest

from sst_jax.data.own import Rows
from sst_jax.data.prompts import render
from sst_jax.data.tokenizer import load_tokenizer
from tests.support.problems import write_lines
from tests.support.template_folders import CONVERSATIONS, TEMPLATES, write_byte_level

PAIRS = [
    {"prompt": "1 + 1 =", "completion": " 2"},
    {"prompt": "Zwölf 😀\n", "completion": "Boxkämpfer <|im_start|>x"},
    {"prompt": "", "completion": "from nothing"},
    {"prompt": "a  b", "completion": "\n\n  c\n"},
]
TALKS = [
    {"prompt": [{"role": "user", "content": "Hi!"}], "completion": [{"role": "assistant", "content": "Hello."}]},
    {
        "prompt": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "b"},
            {"role": "user", "content": "c"},
        ],
        "completion": [{"role": "assistant", "content": "d 1"}],
    },
]
TEXTS = [{"text": "A text."}, {"text": "\nTwo  lines\nand <|im_end|>"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A byte-level vocabulary in which "ab" is a token, and ChatML's turns."""
    made = tmp_path_factory.mktemp("trl")
    write_byte_level(made, TEMPLATES["qwen2.5"], merges=(("a", "b"),))
    return made


def prepared(rows, folder, assistant=None):
    """(ids, labels) of rows as TRL trains on them; `assistant`: on the parts that this template of theirs marks."""
    pytest.importorskip("torch")
    if importlib.util.find_spec("trl") is None:
        pytest.skip("trl is not installed: pip install --no-deps trl")
    transformers = pytest.importorskip("transformers")
    datasets = pytest.importorskip("datasets")
    trainers = pytest.importorskip("trl.trainer.sft_trainer")
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    trainer = SimpleNamespace(
        _tokenizer=tokenizer, chat_template=assistant, completion_only_loss=assistant is None, _is_vlm=False
    )
    args = SimpleNamespace(
        dataset_num_proc=None,
        dataset_text_field="text",
        assistant_only_loss=assistant is not None,
        max_length=None,
        packing=False,
        shuffle_dataset=False,
    )
    given = datasets.Dataset.from_list(rows)
    found = trainers.SFTTrainer._prepare_dataset(trainer, given, tokenizer, args, False, None, "train")
    return [(row["input_ids"], row["labels"]) for row in found]


def ours(rows, folder, tmp_path, format):
    tokenizer = load_tokenizer(folder)
    documents = Rows(str(write_lines(tmp_path / "rows.jsonl", rows))).read().documents
    return [(document, *render(document, tokenizer, format)[:2]) for document in documents], tokenizer


def test_pairs_are_trls_token_for_token(folder, tmp_path):
    """A prompt that looks like a control token is its characters here; TRL's tokenizer takes it for the token."""
    rows = [row for row in PAIRS if "<|" not in str(row)]
    found, tokenizer = ours(rows, folder, tmp_path, "plain")
    for (_, tokens, mask), (ids, labels) in zip(found, prepared(rows, folder), strict=True):
        assert tokens.tolist() == ids
        learned = [label != -100 for label in labels]
        learned[0] = False  # nothing stands before it that could predict it
        assert mask.tolist() == learned
        assert ids[-1] == tokenizer.eos_id
    found, tokenizer = ours(PAIRS[1:2], folder, tmp_path, "plain")
    assert tokenizer.specials["<|im_start|>"] not in found[0][1].tolist()


def test_where_a_token_crosses_the_border_the_prompt_stays_whole(folder, tmp_path):
    """TRL trains on the token that generation never sees ("ab"), and says so; here the prompt is what is asked."""
    rows = [{"prompt": "x a", "completion": "b c"}]
    ((_, tokens, mask),), tokenizer = ours(rows, folder, tmp_path, "plain")
    ((ids, _),) = prepared(rows, folder)
    assert tokens.tolist() != ids
    assert tokenizer.decode(tokens.tolist()) == tokenizer.decode(ids)
    assert tokens[~mask].tolist() == tokenizer.encode("x a")


def test_texts_are_trls_token_for_token(folder, tmp_path):
    rows = TEXTS[:1]
    found, _ = ours(rows, folder, tmp_path, "plain")
    for (_, tokens, mask), (ids, labels) in zip(found, prepared(rows, folder), strict=True):
        assert tokens.tolist() == ids == labels
        assert mask.tolist() == [False] + [True] * (len(ids) - 1)


def test_completions_of_messages_are_trls_but_for_the_templates_own_line_break(folder, tmp_path):
    found, tokenizer = ours(TALKS, folder, tmp_path, "chat")
    for (_, tokens, mask), (ids, labels) in zip(found, prepared(TALKS, folder), strict=True):
        assert tokens.tolist() == ids
        more = [label != -100 and not learned for label, learned in zip(labels, mask, strict=True)]
        assert tokenizer.decode([index for index, extra in zip(ids, more, strict=True) if extra]).strip() == ""
        assert all(label != -100 for label, learned in zip(labels, mask, strict=True) if learned)


@pytest.mark.parametrize("template", ["qwen2_5", "llama3", "gemma3"])
def test_assistants_turns_are_trls_but_for_the_templates_own_line_break(template, tmp_path):
    """`assistant_only_loss` with the marked template that TRL puts in the place of a model's own."""
    found = importlib.util.find_spec("trl")
    if found is None or found.origin is None:
        pytest.skip("trl is not installed: pip install --no-deps trl")
    templates = Path(found.origin).parent / "chat_templates"
    plain, marked = ((templates / f"{template}{part}.jinja").read_text("utf-8") for part in ("", "_training"))
    write_byte_level(tmp_path / "folder", plain)
    rows = [{"messages": CONVERSATIONS["turns"]}]
    rows.append({"messages": [*CONVERSATIONS["turns"], {"role": "user", "content": "e"}, *CONVERSATIONS["turns"][1:2]]})
    found, tokenizer = ours(rows, tmp_path / "folder", tmp_path, "chat")
    for (_, tokens, mask), (ids, labels) in zip(found, prepared(rows, tmp_path / "folder", marked), strict=True):
        assert tokens.tolist() == ids
        learned = [label != -100 for label in labels]
        more = [index for index, theirs, own in zip(ids, learned, mask, strict=True) if theirs and not own]
        assert tokenizer.decode(more).strip() == ""
        assert all(theirs for theirs, own in zip(learned, mask, strict=True) if own)
        assert mask.sum() > 4
