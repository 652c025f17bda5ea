"""Where a model's weights come from: what run folders, base folders and exports record, and `Model.provenance` says."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

from sst_jax.errors import InputError
from sst_jax.types import Json


class Origin(NamedTuple):
    """Weights by the kind of their files, path, digest and revision; None where a folder does not say."""

    kind: str | None
    path: str | None
    digest: str | None
    revision: str | None = None  # of a hub id

    def to_json(self) -> Json:
        """Return the record with the keys of version 0.1.0, and a revision where there is one."""
        return {name: value for name, value in self._asdict().items() if name != "revision" or value is not None}


class BaseRecord(NamedTuple):
    """The base that a run or an adapter was trained on; all but the path are None where that is not recorded."""

    path: str
    digest: str | None
    quantize: str | None
    revision: str | None = None  # of a hub id

    @classmethod
    def from_json(cls, record: Mapping[str, object], where: str) -> BaseRecord:
        """Read a record that names a path.

        Raises: InputError, beginning with `where`, for a value that is not text.
        """
        for name in cls._fields:
            if not isinstance(record.get(name), str if name == "path" else str | None):
                raise InputError(f"{where}: {name}={record.get(name)!r} is not text")
        return cls(*(record.get(name) for name in cls._fields))  # type: ignore[arg-type]  # checked above


# Keys in files that are not the names of their fields.
_KEYS = {"prompt_format": "prompts"}
# Fields that a record has even where they are None.
_ALWAYS = ("kind", "path", "digest", "dtype", "layout", "quantize", "stored", "run", "step", "prompt_format")
# Of the others: str.
_TYPES = {"step": int, "recipe": Mapping, "calibration": Mapping, "vision_config": Mapping, "started_from": Mapping}


@dataclasses.dataclass(frozen=True)
class Provenance:
    """Where a model's weights come from.

    Attributes:
      kind: "huggingface", "gguf", "random" or "base" (a base folder of ours).
      path: of the base: a folder or file, a hub id, "package:NAME" or "random:PRESET".
      digest: SHA-256 that the base is recognised by.
      dtype: the type that the base was read in.
      layout: spelling of the source's keys (`key_map.LAYOUTS`); None where it has none, as GGUF.
      quantize: storage of the linears in memory.
      stored: storage of the linears on disk; None before the base has been looked at.
      source: of a base folder, what it was converted from.
      run, step, recipe: of a training run, its folder, the checkpoint that was opened and its recipe.
      prompt_format: how questions are put to a model that was trained here, "plain" or "chat".
      carries: of an export, "sst" (one model with its stream) or "stream" (a backbone with a stream beside).
      adapter: the folder of a PEFT adapter.
      calibration: of a base that was quantised for texts, which ones.
      vision_config: of a base folder with a vision tower, its source's config.json without the text part.
      revision: of a hub id, the commit whose files were read.
      started_from: of a run whose source had been trained already, what its config.json says of that.
    """

    kind: str | None = None
    path: str | None = None
    digest: str | None = None
    dtype: str | None = None
    layout: str | None = None
    quantize: str = "none"
    stored: str | None = None
    source: Origin | None = None
    run: str | None = None
    step: int | None = None
    recipe: Json | None = None
    prompt_format: str | None = None
    carries: str | None = None
    adapter: str | None = None
    calibration: Json | None = None
    vision_config: Json | None = None
    revision: str | None = None
    started_from: Json | None = None

    def to_json(self) -> Json:
        """Return the record that commands write into their results, with the keys of version 0.1.0."""
        record: Json = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None or field.name in _ALWAYS:
                record[_KEYS.get(field.name, field.name)] = value.to_json() if isinstance(value, Origin) else value
        return record

    @classmethod
    def from_json(cls, record: Mapping[str, object], where: str = "provenance") -> Provenance:
        """Read a record of any version; keys that it lacks keep their defaults, and unknown ones are ignored.

        Raises: InputError, beginning with `where`, for a value of another type than its key has.
        """
        values: Json = {}
        for field in dataclasses.fields(cls):
            key = _KEYS.get(field.name, field.name)
            value = record.get(key)
            if value is None:
                continue
            if field.name == "source":
                values["source"] = _origin(value, f"{where}: source")
                continue
            expected = _TYPES.get(field.name, str)
            if not isinstance(value, expected):
                raise InputError(f"{where}: {key}={value!r} is malformed")
            values[field.name] = dict(value) if isinstance(value, Mapping) else value
        return cls(**values)

    @property
    def identity(self) -> Origin:
        """Kind, path, digest and revision of the base itself."""
        return Origin(self.kind, self.path, self.digest, self.revision)

    @property
    def origin(self) -> Origin:
        """The weights that the base was converted from, where that is known; else the base."""
        return self.source if self.kind == "base" and self.source and self.source.path else self.identity

    @property
    def unquantised(self) -> Origin:
        """The weights before quantisation: of a base folder with quantised linears its source, else the base."""
        if self.kind == "base" and self.stored != "none":
            return self.source or Origin(None, None, None)
        return self.identity

    def base_record(self) -> Json:
        """Return base.json of a run folder."""
        return self._record("path", "digest", "dtype", "kind", "quantize")

    def export_record(self) -> Json:
        """Return which base an export stands on, as stream.json and config.json have it."""
        return self._record("path", "digest", "kind", "quantize")

    def conversion_record(self) -> Json:
        """Return the facts in the header of a base folder that a foreign checkpoint is converted into."""
        names = ("kind", "path", "layout", "quantize", "calibration", "vision_config", "digest", "revision")
        record = {name: getattr(self, name) for name in names}
        return {name: value for name, value in record.items() if value is not None or name == "layout"}

    def header_record(self) -> Json:
        """Return the facts in the header of a base folder that a model is saved to, without a vision tower's."""
        kept = {_KEYS.get(name, name): getattr(self, name) for name in ("layout", "run", "step", "prompt_format")}
        return {**self.unquantised.to_json(), **kept}  # a copy of a quantised base comes from where that did

    def _record(self, *names: str) -> Json:
        """Return fields by name, and the revision where there is one."""
        revision = {} if self.revision is None else {"revision": self.revision}
        return {**{name: getattr(self, name) for name in names}, **revision}


def _origin(record: object, where: str) -> Origin:
    record = record if isinstance(record, Mapping) else {}
    values = [record.get(name) for name in Origin._fields]
    if not all(value is None or isinstance(value, str) for value in values):
        raise InputError(f"{where} is malformed")
    return Origin(*values)
