"""What a measurement on texts is, fixed before its first outcome is read: a JSON file, known by its SHA-256.

    {"data": "texts.jsonl", "window": 512, "windows": 60, "batch_size": 12, "baseline": "plain",
     "settings": {"plain": {"stream": null},
                  "8->3": {"depth": 2, "stream": {"links": [[8, 3]], "alpha": 0.05, "timing": "same"}}},
     "choose": {"among": ["8->3"], "controls": {"random state": {"states": "random"}, "next": {"timing": "next"}}}}

A setting without "stream" has the model's own, null has none. With "choose" the best of `among` is chosen on the
documents of even number and tested on the others, against the baseline and each control: the chosen setting with some
fields changed, those of the stream too. "data" is relative to the file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from sst_jax.errors import InputError
from sst_jax.files import read_json
from sst_jax.model.config import ModelConfig, StreamConfig, from_mapping
from sst_jax.model.fields import fields_of
from sst_jax.types import Json, ReadOnlyJson

STATES = ("own", "earlier", "random")
MODEL = "model"  # a setting's stream: the model's own


def field_names(config: type) -> list[str]:
    """Return the names of a dataclass's fields."""
    return [field.name for field in fields_of(config)]


@dataclasses.dataclass(frozen=True)
class Setting:
    """How a text is read.

    name    of the setting
    stream  fields of a fresh `StreamConfig`, None for no stream, or MODEL for the model's own
    depth   iterations at every position
    prompt  positions at the head that are read as a prompt is, at the depth that `iterate_prompt` gives them
    states  what a link hands on: "own" states, those of "earlier" positions (16 before), or "random" ones as long
    """

    name: str
    stream: str | ReadOnlyJson | None = MODEL
    depth: int = 1
    prompt: int = 0
    states: str = "own"

    def __post_init__(self) -> None:
        if self.depth < 1 or self.prompt < 0:
            raise InputError(f"setting {self.name!r}: depth={self.depth} and prompt={self.prompt} must be 1, 0 or more")
        if self.states not in STATES:
            raise InputError(f"setting {self.name!r}: states={self.states!r} is not one of {', '.join(STATES)}")
        if isinstance(self.stream, str):
            if self.stream != MODEL:
                raise InputError(f"setting {self.name!r}: stream={self.stream!r} is not {MODEL!r}, null or its fields")
        elif self.stream is not None:
            from_mapping(StreamConfig, self.stream)

    def check(self, config: ModelConfig) -> None:
        """Raise InputError where a model's config cannot be read so."""
        stream = config.stream
        if stream is None and (self.depth > 1 or self.states != "own"):
            raise InputError(f"setting {self.name!r}: depth={self.depth}, states={self.states!r} need a stream")
        if self.states != "own" and stream is not None and (not stream.is_linked or self.prompt):
            raise InputError(f"setting {self.name!r}: states={self.states!r} are for links between layers, no prompt")

    def changed(self, name: str, fields: ReadOnlyJson) -> Setting:
        """Return the setting under another name with fields changed, the stream's too; a `stream` replaces it."""
        mine = {field: value for field, value in fields.items() if field in field_names(Setting)}
        stream = {field: value for field, value in fields.items() if field not in mine}
        if stream and "stream" not in mine:
            if isinstance(self.stream, str) or self.stream is None:
                raise InputError(f"control {name!r}: {sorted(stream)[0]} is no field of a setting without a stream")
            mine["stream"] = {**self.stream, **stream}
        return dataclasses.replace(self, name=name, **mine)


@dataclasses.dataclass(frozen=True)
class Protocol:
    """Windows, settings and comparisons; see the module's docstring.

    data        the texts
    settings    by name
    baseline    the setting that others are compared with
    window      tokens of a window
    windows     how many; 0 is all
    batch_size  windows scored together
    choose      {"among": names, "controls": {name: changed fields}}, or empty
    sha256      of the file, or of the same content where there is none
    """

    data: str
    settings: dict[str, Setting]
    baseline: str
    window: int = 512
    windows: int = 0
    batch_size: int = 8
    choose: Json = dataclasses.field(default_factory=dict)
    sha256: str = ""

    def __post_init__(self) -> None:
        for field, least in (("window", 3), ("windows", 0), ("batch_size", 1)):
            value = getattr(self, field)
            if not isinstance(value, int) or value < least:
                raise InputError(f"protocol: {field}={value!r} must be a number of at least {least}")
        unknown = set(self.choose) - {"among", "controls"}
        if unknown:
            raise InputError(f"protocol: choose has among and controls, not {sorted(unknown)[0]}")
        for name in (self.baseline, *self.choose.get("among", ())):
            if name not in self.settings:
                raise InputError(f"protocol: {name!r} is none of the settings {', '.join(self.settings)}")
        if self.choose and not self.choose.get("among"):
            raise InputError("protocol: choose.among names no setting")
        for setting in self.settings.values():
            if setting.prompt >= self.window:
                raise InputError(f"setting {setting.name!r}: prompt={setting.prompt} fills the window of {self.window}")
        if not self.sha256:
            text = json.dumps(self.to_json(), sort_keys=True)
            object.__setattr__(self, "sha256", hashlib.sha256(text.encode()).hexdigest())

    def to_json(self) -> Json:
        """Return the protocol as a file would hold it."""
        return {key: value for key, value in dataclasses.asdict(self).items() if key != "sha256"}

    def tested(self, chosen: str) -> list[Setting]:
        """Return what is tested once a setting has been chosen: the baseline, that setting, and its controls."""
        setting = self.settings[chosen]
        controls = self.choose.get("controls", {})
        return [
            self.settings[self.baseline], setting, *(setting.changed(name, part) for name, part in controls.items())
        ]  # fmt: skip


def read_protocol(path: str | Path) -> Protocol:
    """Return the protocol of a file.

    Raises: InputError naming the file and what is wrong in it.
    """
    file = Path(path)
    if not file.is_file():
        raise InputError(f"--protocol {path}: there is no such file")
    record = read_json(file)
    missing = {"data", "settings", "baseline"} - set(record)
    unknown = set(record) - {*field_names(Protocol)} - {"about"} | ({"sha256"} & set(record))
    if missing or unknown:
        what = f"lacks {sorted(missing)[0]}" if missing else f"has the unknown key {sorted(unknown)[0]}"
        raise InputError(f"--protocol {path} {what}")
    fields = {key: value for key, value in record.items() if key not in ("settings", "about")}
    fields["data"] = str((file.parent / record["data"]).resolve())
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return Protocol(**fields, settings=read_settings(record["settings"]), sha256=digest)


def read_settings(record: ReadOnlyJson) -> dict[str, Setting]:
    """Return settings by name.

    Raises: InputError naming the setting.
    """
    found = {}
    for name, fields in record.items():
        unknown = set(fields) - set(field_names(Setting)) | ({"name"} & set(fields))
        if unknown:
            raise InputError(f"setting {name!r} has no field {sorted(unknown)[0]}: stream, depth, prompt or states")
        found[name] = Setting(name, **fields)
    return found


def of_depths(data: str, depths: Sequence[int], window: int, windows: int, batch_size: int) -> Protocol:
    """Return the protocol of a model as it is at some depths, the first being the baseline."""
    settings = {str(depth): Setting(str(depth), depth=depth) for depth in depths}
    return Protocol(data, settings, str(depths[0]), window, windows, batch_size)
