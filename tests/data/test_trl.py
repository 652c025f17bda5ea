"""Rows of prompts and completions, and running text, against TRL's own preprocessing, token for token.

What runs is `SFTTrainer._prepare_dataset` itself, on a stand-in for the trainer: no model is made.
"""

import importlib.util
from types import SimpleNamespace

import pytest

from sst_jax.data.own import Rows
from sst_jax.data.prompts import render
from sst_jax.data.tokenizer import load_tokenizer
from tests.support.problems import write_lines
from tests.support.template_folders import TEMPLATES, write_byte_level

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


def prepared(rows, folder):
    """(ids, labels) of rows as TRL trains on them."""
    pytest.importorskip("torch")
    if importlib.util.find_spec("trl") is None:
        pytest.skip("trl is not installed: pip install --no-deps trl")
    transformers = pytest.importorskip("transformers")
    datasets = pytest.importorskip("datasets")
    trainers = pytest.importorskip("trl.trainer.sft_trainer")
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    trainer = SimpleNamespace(_tokenizer=tokenizer, chat_template=None, completion_only_loss=True, _is_vlm=False)
    args = SimpleNamespace(
        dataset_num_proc=None,
        dataset_text_field="text",
        assistant_only_loss=False,
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
