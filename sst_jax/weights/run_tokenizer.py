"""The tokenizer that a run was trained with: its base's or one that it keeps, with its template and its date."""

from __future__ import annotations

import logging
from datetime import datetime
from pathlib import Path

from sst_jax.data.chat_template import TEMPLATE_FILE
from sst_jax.data.template_date import fix_date, parse_date
from sst_jax.data.template_file import use_template_file
from sst_jax.data.tokenizer import Tokenizer, adapter_tokenizer
from sst_jax.data.tokenizer_identity import changes, tokenizer_record
from sst_jax.types import Json

TOKENIZER_FOLDER = "tokenizer"  # of a run that does not take its base's


def run_tokenizer(path: Path, base: Tokenizer, content: Json, prompt_format: str | None) -> Tokenizer:
    """Return the tokenizer that a run was trained with; warn where it is another one by now.

    Args:
        path: the run folder.
        base: its base's tokenizer, which is changed where the run has a template or a date of its own.
        content: of config.json.
        prompt_format: that the run put its questions in; None: not known.

    Raises: InputError naming the file that is malformed.
    """
    own = path / TOKENIZER_FOLDER
    tokenizer = adapter_tokenizer(own, base) if own.is_dir() else base
    if (path / TEMPLATE_FILE).is_file():
        use_template_file(tokenizer, path / TEMPLATE_FILE, "chat template")
    fix_date(tokenizer, recorded_date(content, path / "config.json"))
    recorded = content.get("data")
    now = tokenizer_record(tokenizer, prompt_format or "plain")
    if isinstance(recorded, dict) and (differing := changes(recorded, now)):
        logging.getLogger(__name__).warning(
            "%s was trained with another tokenizer: %s; answers are of the present one. Put the files of its base back",
            path,
            "; ".join(differing),
        )
    return tokenizer


def recorded_date(content: Json, where: Path) -> datetime | None:
    """Return the date that chat templates wrote for a run, by its config.json; None where it does not say.

    Raises: InputError, beginning with `where`, where it is none.
    """
    date = content.get("date")
    if date is None:
        return None
    return parse_date(str(date), f"{where}: date")
