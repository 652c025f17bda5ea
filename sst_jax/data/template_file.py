"""A chat template from a file of the user's."""

from __future__ import annotations

from pathlib import Path

from sst_jax.data.chat_template import ChatTemplate
from sst_jax.data.no_tokenizer import NoTokenizer
from sst_jax.data.tokenizer import Tokenizer
from sst_jax.errors import InputError


def use_template_file(tokenizer: Tokenizer, file: str | Path, setting: str) -> None:
    """Make the chat template of a file the one of a vocabulary.

    Args:
        tokenizer: which is changed.
        file: of a Jinja template, UTF-8.
        setting: the flag or knob that names the file, for messages.

    Raises: InputError where it cannot be read, or is no template, and where there is no vocabulary.
    """
    if isinstance(tokenizer, NoTokenizer):
        raise InputError(f"{setting}={file}: {tokenizer.where} holds no tokenizer, which a template needs")
    path = Path(file).expanduser()
    try:
        source = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{setting}={path} cannot be read: {error}") from None
    if not source.strip():
        raise InputError(f"{setting}={path} is empty")
    try:
        ChatTemplate(source).variables  # noqa: B018  # reads all of it
    except InputError as error:
        raise InputError(f"{setting}={path}: {error}") from None
    tokenizer.use_template(source)
    tokenizer.is_replaced = True
