"""Files that tokenizers are stored in and exported to."""

from __future__ import annotations

from collections.abc import Mapping

from sst_jax.data import vocabulary as vocabularies
from sst_jax.data.chat_template import CHAT_TEMPLATE, START_OF_TURN
from sst_jax.files import json_bytes

MARKER = "sst_tokenizer.json"  # says which of our own tokenizers a folder holds
NAMED = {"unk": "unknown", "bos": "bos", "eos": "eos", "pad": "padding"}  # special tokens, as GGUF names them


def tokenizer_config(named: Mapping[str, str], add_bos: bool, template: str | None) -> bytes:
    """Return a tokenizer_config.json; `named` are the pieces of NAMED that there are."""
    config = {
        # The class that takes tokenizer.json as it stands; GemmaTokenizer would rebuild parts of it.
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": add_bos,
        **{f"{name}_token": piece for name, piece in named.items()},
        "clean_up_tokenization_spaces": False,
        "model_max_length": 131_072,
        "padding_side": "left",
    }
    return json_bytes(config if template is None else {**config, "chat_template": template})


def exported(vocabulary: vocabularies.Vocabulary, add_bos: bool, template: str | None) -> dict[str, bytes]:
    """Return the files of a vocabulary; Gemma's turns are the template of one that has them and no other."""
    ids = {"unk": vocabulary.unk_id, "bos": vocabulary.bos_id, "eos": vocabulary.eos_id, "pad": vocabulary.pad_id}
    named = {name: vocabulary.pieces[index] for name, index in ids.items() if index is not None}
    if template is None and START_OF_TURN in vocabulary.pieces:
        template = CHAT_TEMPLATE
    return {
        "tokenizer.json": vocabularies.to_tokenizers_json(vocabulary, add_bos),
        "tokenizer_config.json": tokenizer_config(named, add_bos, template),
    }
