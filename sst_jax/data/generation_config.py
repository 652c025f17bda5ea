"""Which tokens end an answer by the files of a folder, which it never has, and how its maker would have it sampled.

transformers and vLLM stop at `eos_token_id` of generation_config.json, a token or a list, else at config.json's; chat
models often name the end of a turn there alone.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

from sst_jax.errors import InputError
from sst_jax.files import read_json
from sst_jax.types import Json, JsonValue

GENERATION_CONFIG = "generation_config.json"
SUPPRESSED = "suppress_tokens"  # of it, and of `tokenizer.ggml` in a GGUF: tokens that no answer has


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """What a folder says of answers.

    settings  generation_config.json as it stands; exports carry it on
    eos_ids   tokens that end an answer, by generation_config.json and config.json
    """

    settings: Json = dataclasses.field(default_factory=dict)
    eos_ids: tuple[int, ...] = ()

    @property
    def suppressed(self) -> tuple[int, ...]:
        """Tokens that are never chosen."""
        return tuple(token_ids(self.settings.get(SUPPRESSED), SUPPRESSED))


def read_generation_config(folder: Path) -> GenerationConfig:
    """Return what generation_config.json and config.json of a folder say, where they are there.

    Raises: InputError naming the file, where it is malformed.
    """
    file, config_file = folder / GENERATION_CONFIG, folder / "config.json"
    settings = read_json(file) if file.is_file() else {}
    ids = token_ids(settings.get("eos_token_id"), f"{file}: eos_token_id")
    token_ids(settings.get(SUPPRESSED), f"{file}: {SUPPRESSED}")
    if config_file.is_file():
        config = read_json(config_file)
        text = config.get("text_config")
        for level in (config, text if isinstance(text, dict) else {}):
            ids += token_ids(level.get("eos_token_id"), f"{config_file}: eos_token_id")
    return GenerationConfig(settings, tuple(dict.fromkeys(ids)))


def token_ids(value: JsonValue, where: str) -> list[int]:
    """Return the tokens that a field names: none, one, or a list; negative numbers stand for none.

    Raises: InputError beginning with `where`.
    """
    found = []
    for index in value if isinstance(value, list) else [] if value is None else [value]:
        if not isinstance(index, int) or isinstance(index, bool) or index >= 2**31:
            raise InputError(f"{where}={value!r} must be a token id or a list of them")
        found.append(index)
    return [index for index in found if index >= 0]
