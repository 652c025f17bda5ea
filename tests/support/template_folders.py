"""Chat templates as model makers publish them, written down from their documentation, and a tokenizer for each."""

import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

TEMPLATES = {
    file.stem: file.read_text(encoding="utf-8")
    for file in sorted((Path(__file__).parent / "chat_templates").glob("*.jinja"))
}
SPECIALS = [
    "<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>",
    "<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>",
    "<|end_of_turn|>", "<|END_OF_TURN_TOKEN|>", "[|endofturn|]", "<|im_sep|>",
]  # fmt: skip
WORDS = ["<think>", "</think>", "<tool_response>", "</tool_response>"]  # added, but not special


def _said(*pairs):
    return [{"role": role, "content": content} for role, content in pairs]


CONVERSATIONS = {
    "one": _said(("user", "How many?")),
    "system": _said(("system", "Be brief."), ("user", "  Hi there \n")),
    "turns": _said(("user", "a"), ("assistant", "b 1"), ("user", "c"), ("assistant", " d ")),
    "twice": _said(("user", "a"), ("user", "b"), ("assistant", "c")),
    "late": _said(("user", "a"), ("assistant", "b"), ("system", "now in French"), ("user", "c")),
    "developer": _said(("developer", "Be brief."), ("user", "a")),
    "tool": _said(("user", "a"), ("assistant", "<think>\nhm\n</think>\n\nI look"), ("tool", '{"x": 1}')),
    "first": _said(("assistant", "Ask me."), ("user", "Zwölf 😀  Boxkämpfer")),
}


def write_byte_level(folder, template, strip=(), more=(), merges=()):
    """A byte-level vocabulary whose tokens in `strip` swallow the spaces behind them, as Phi's do; `more`
    special tokens come last.
    """
    pieces = [*SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet()), *map("".join, merges)]
    made = Tokenizer(models.BPE({piece: index for index, piece in enumerate(pieces)}, list(merges)))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    _finish(made, folder, template, strip, more)


def write_metaspace(folder, template, legacy=False, more=()):
    """A vocabulary that writes spaces as "▁" and puts one before the text: before each of its parts where `legacy`."""
    letters = [chr(code) for code in range(33, 127)] + ["▁"] + [f"<0x{byte:02X}>" for byte in range(256)]
    ids = {piece: index for index, piece in enumerate([*SPECIALS, *letters])}
    made = Tokenizer(models.BPE(ids, [], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if legacy:
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    _finish(made, folder, template, more=more)


def _finish(made, folder, template, strip=(), more=()):
    from tokenizers import AddedToken

    made.add_special_tokens([AddedToken(piece, rstrip=piece in strip, normalized=False) for piece in SPECIALS])
    made.add_tokens([AddedToken(word, normalized=False) for word in WORDS])
    made.add_special_tokens(list(more))
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    folder.mkdir(parents=True, exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>",
        "clean_up_tokenization_spaces": False, **({} if template is None else {"chat_template": template}),
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
