"""The sections of a recipe that are training's own.

A section is a frozen dataclass that checks itself: its docstring is the place where its knobs are documented, its
defaults are theirs.
"""

from __future__ import annotations

import dataclasses

from sst_jax.data import datasets
from sst_jax.data.formats import ROW_FORMATS
from sst_jax.data.prompts import FORMATS, LEARN
from sst_jax.data.template_date import parse_date
from sst_jax.errors import InputError
from sst_jax.inference import policies
from sst_jax.model import rules
from sst_jax.model.config import StreamConfig, from_mapping
from sst_jax.model.quantization import storages
from sst_jax.training.step import ForwardConfig, ForwardSchedule
from sst_jax.types import Json

HELDOUT_ROWS = 32  # of a held-out batch, where a recipe does not say: the weights are read once for all of them
DTYPES = ("float32", "bfloat16")
DEFAULT_PATH = datasets.GSM8K_HUB
HELDOUT_TASK = "heldout"  # train.eval_task: the run's own held-out questions
KEEP_BEST = ("", "loss", "task")
LOGGERS = ("tensorboard", "wandb")
OWN_FORMATS = tuple(name for name in ROW_FORMATS if name not in datasets.DATASETS)


def field_defaults(section: type) -> Json:
    """Return a dataclass's fields with their defaults, unchecked: a recipe without a source is none yet."""
    return {field.name: field.default for field in dataclasses.fields(section)}


@dataclasses.dataclass(frozen=True)
class SourceConfig:
    """Section `model`: the frozen base.

    source     a folder, a hub id, a GGUF file, "package:NAME" or "random:PRESET"
    dtype      type of the base and of activations: "float32" or "bfloat16"
    quantize   storage of the base's linears: "none", "nf4" or "nf4_double"
    attention  kernel that attends over whole sequences: "auto", "xla", "cudnn", "splash" or "chunked", see
               `model/kernels.py`
    attention_window  positions that a query sees at most, its own included: one number for all layers or one a layer,
               in training, evaluation and decoding alike; (): as the source has them. L layers with windows W reach
               sum(W - 1) positions back: what lies further a model has in its stream or not at all
    """

    source: str = ""
    dtype: str = "bfloat16"
    quantize: str = "none"
    attention: str = "auto"
    attention_window: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        windows = self.attention_window
        if not isinstance(windows, tuple) or not all(type(window) is int and window > 0 for window in windows):
            raise InputError(
                f"model.attention_window={windows!r} must be a number of positions, 1 or more, or one a layer, such as "
                "(5,) or (1,1,17)"
            )
        if self.dtype not in DTYPES:
            raise InputError(f"model.dtype={self.dtype!r} is not one of {', '.join(map(repr, DTYPES))}")
        if self.quantize not in storages.kinds():
            raise InputError(f"model.quantize={self.quantize!r} is not one of {', '.join(storages.kinds())}")
        if not self.source:
            raise InputError("model.source is empty: set --config.model.source to a folder, a hub id or a GGUF file")


@dataclasses.dataclass(frozen=True)
class StreamSection:
    """Section `stream`, whose knobs stand side by side in a recipe: `on`, those of `StreamConfig`, those of
    `ForwardSchedule`.

    on        whether the model has a stream; without it the plain backbone trains its adapter
    state     the mechanism
    schedule  which forward trains it at which step
    """

    on: bool = True
    state: StreamConfig = dataclasses.field(default_factory=StreamConfig)
    schedule: ForwardSchedule = dataclasses.field(default_factory=ForwardSchedule)

    @classmethod
    def from_knobs(cls, knobs: Json) -> StreamSection:
        """Return the section of a recipe's knobs.

        Raises: InputError naming the knob.
        """
        scheduling = field_defaults(ForwardSchedule)
        return cls(
            knobs["on"],
            from_mapping(StreamConfig, {key: value for key, value in knobs.items() if key not in ("on", *scheduling)}),
            from_mapping(ForwardSchedule, {key: knobs[key] for key in scheduling}),
        )

    def to_knobs(self) -> Json:
        """Return the knobs as `from_knobs` takes them."""
        return {**dataclasses.asdict(self.state), "on": self.on, **dataclasses.asdict(self.schedule)}

    @property
    def config(self) -> StreamConfig | None:
        """The mechanism, None where it is off."""
        return self.state if self.on else None

    def forward(self, remat: str, dtype: str = "float32", attention: str = "xla") -> ForwardConfig:
        """Return the forward that trains: the schedule's, "plain" without a stream; computed as ForwardConfig says."""
        schedule: Json = dataclasses.asdict(self.schedule) if self.on else {"forward": "plain"}
        return ForwardConfig(**schedule, remat=remat, dtype=dtype, attention=attention)


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Section `data`: what is learned, and how it is put into rows.

    name           a data set of `data/datasets.py` that has problems to train on, such as "gsm8k", "words" (the
                   embedded word problems) or the stories "boxes:1-4"; or how the rows at `path` are written, a key of
                   `data/formats.py` such as "messages"; or "auto": what is found there, and without a path words. With
                   ":result" behind gsm8k, words and auto only the result is learned, without the steps.
    path           a file (.jsonl, .json, .csv, .parquet), a folder of files, a hub id, or several separated by commas;
                   for a named data set a folder with its files, or a hub id
    config         configuration of a hub set ("": the only one)
    split          of a hub set or a folder, which is trained on
    columns        other names of keys: "prompt=ask,completion=reply"
    weights        how often each path is drawn from, beside the others; (): as often as it has rows
    learn          what of a document is learned: "assistant" (all that the model is to write: completions, answers, a
                   conversation's assistant turns, whole texts), "last" (of conversations the last such turn alone), or
                   "all" tokens
    length         positions of a row
    batch_size     rows of a batch
    eval_batch_size  rows of a held-out batch, at most; 0: batch_size, or 32 where that is less, as "exact" reads all
                   weights at every position, for one row as for many
    pack           whether a row holds several documents
    format         how questions, and prompts without messages, are asked: "plain" or as a "chat"
    heldout        examples kept out of training by seed, for the loss before, during and after; of GSM8K they come
                   from the training split, the test split is never read here; of one's own rows at most a tenth
    heldout_share  the part of one's own rows that is held out; 0: `heldout` says how many
    heldout_path   one's own held-out rows, a file, a folder or a hub id: then none are taken from `path`
    limit          use at most so many training examples (0: all)
    overlong       what an example that does not fit a row is: an "error", or left out ("drop")
    date           that a chat template writes which writes one, such as "2026-11-30"; "": when the run begins
    chat_template  file of a Jinja template for chats, which the run keeps; "": the model's own
    """

    name: str = "gsm8k"
    path: str = DEFAULT_PATH
    config: str = ""
    split: str = "train"
    columns: str = ""
    weights: tuple[float, ...] = ()
    learn: str = "assistant"
    length: int = 512
    batch_size: int = 8
    eval_batch_size: int = 0
    pack: bool = True
    format: str = "chat"
    heldout: int = 894
    heldout_share: float = 0.0
    heldout_path: str = ""
    limit: int = 0
    overlong: str = "error"
    date: str = ""
    chat_template: str = ""

    def __post_init__(self) -> None:
        dataset = datasets.find(self.dataset)
        if self.is_own:
            if not self.path:
                raise InputError(f"data.name={self.name!r} needs data.path: a file, a folder or a hub id")
        elif dataset is None or not dataset.source.trains:
            trains = datasets.names(lambda dataset: dataset.source.trains)
            known = ", ".join(map(repr, ("auto", *trains, *OWN_FORMATS)))
            raise InputError(f"data.name={self.name!r} is not one of {known}")
        if not self.is_auto:
            self._check_used(dataset)
        for field in ("length", "batch_size", "heldout"):
            if getattr(self, field) < 1:
                raise InputError(f"data.{field}={getattr(self, field)} must be at least 1")
        if self.date:
            parse_date(self.date, "data.date")
        if self.eval_batch_size < 0:
            raise InputError(f"data.eval_batch_size={self.eval_batch_size} must not be negative; 0 chooses")
        if self.chat_template and self.format != "chat":
            raise InputError(f"data.chat_template={self.chat_template} is for data.format=chat, not {self.format!r}")
        if self.limit < 0:
            raise InputError(f"data.limit={self.limit} must not be negative; 0 is all")
        if not 0.0 <= self.heldout_share < 1.0:
            raise InputError(f"data.heldout_share={self.heldout_share} must be at least 0 and below 1")
        if any(weight <= 0 for weight in self.weights):
            raise InputError(f"data.weights={self.weights} must be positive")
        for field, values in (("format", FORMATS), ("learn", LEARN)):
            if getattr(self, field) not in values:
                raise InputError(f"data.{field}={getattr(self, field)!r} is not one of {', '.join(map(repr, values))}")

    def _check_used(self, dataset: datasets.Dataset | None) -> None:
        """Raise InputError where a knob is set that this data set never reads."""
        if dataset is not None and dataset.is_generated and self.path not in ("", DEFAULT_PATH):
            raise InputError(
                f"data.path={self.path} is not read: data.name={self.name!r} is generated. To train on what is there, "
                "set data.name=auto"
            )
        if not self.is_own:
            defaults = field_defaults(DataConfig)
            for field in ("config", "columns", "weights", "heldout_share", "heldout_path"):
                if getattr(self, field) != defaults[field]:
                    raise InputError(
                        f"data.{field}={getattr(self, field)!r} is for rows of one's own, and not read with "
                        f"data.name={self.name!r}: set data.name=auto"
                    )

    @property
    def heldout_rows(self) -> int:
        """Rows of a held-out batch, at most."""
        return self.eval_batch_size or max(self.batch_size, HELDOUT_ROWS)

    @property
    def is_auto(self) -> bool:
        """Whether what lies at `path` says what it is."""
        return self.name.partition(":")[0] == "auto" and bool(self.path)

    @property
    def is_own(self) -> bool:
        """Whether `name` says how rows of one's own are written."""
        return self.name in OWN_FORMATS

    @property
    def dataset(self) -> str:
        """`name`, with "auto" decided as far as it can be without reading."""
        kind, colon, part = self.name.partition(":")
        return ("gsm8k" if self.path else "words") + colon + part if kind == "auto" else self.name


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """Section `train`: how long a run is, and what it measures and keeps on its way.

    steps          batches that are trained on
    seed           of the data's order, of fresh parameters, of dropout and of drawn forwards
    log_every      steps between two lines of metrics.jsonl
    eval_every     steps between two held-out losses
    eval_forward   forward that the held-out loss is evaluated with, as `rules.bind` reads it; without a stream "plain"
    eval_task      questions answered and graded with each held-out loss: a task of `evaluate`, "FILE:GRADE", or
                   "heldout" for the held-out questions themselves; "": none
    eval_items     at most so many of them, the first ones
    eval_depth     depth policy of these answers, as --depth takes it
    sample_every   steps between two answers to the first held-out question, from before the first step on; 0: at the
                   end alone
    save_every     steps between two checkpoints
    keep           checkpoints that stay
    keep_best      what decides which checkpoint the run opens as, and which stays in any case: the lowest held-out
                   "loss", the highest score on the "task", or "" for the newest one
    patience       evaluations without a better one, by keep_best (by loss where it is ""), that end the run; 0: never
    loggers        where metrics go beside metrics.jsonl: "tensorboard", "wandb", both by a comma, or ""
    remat          activations kept for the backward pass, see `remat.REMAT`
    max_skipped    steps skipped one after another, for numbers that are not finite, that end the run
    sample_tokens  length of these answers, and of those written at the end
    """

    steps: int = 100
    seed: int = 0
    log_every: int = 1
    eval_every: int = 50
    eval_forward: str = "exact"
    eval_task: str = ""
    eval_items: int = 64
    eval_depth: str = "1"
    sample_every: int = 0
    save_every: int = 50
    keep: int = 2
    keep_best: str = ""
    patience: int = 0
    loggers: str = "tensorboard"
    remat: str = "layer"
    max_skipped: int = 10
    sample_tokens: int = 64

    def __post_init__(self) -> None:
        ones = "steps log_every eval_every eval_items save_every keep max_skipped sample_tokens"
        for fields, least in ((ones, 1), ("seed sample_every patience", 0)):
            for field in fields.split():
                if getattr(self, field) < least:
                    wanted = "be at least 1" if least else "not be negative"
                    raise InputError(f"train.{field}={getattr(self, field)} must {wanted}")
        if self.keep_best not in KEEP_BEST:
            raise InputError(f"train.keep_best={self.keep_best!r} is not one of {', '.join(map(repr, KEEP_BEST))}")
        if self.keep_best == "task" and not self.eval_task:
            raise InputError("train.keep_best='task' needs train.eval_task")
        for name in self.logger_names:
            if name not in LOGGERS:
                raise InputError(f"train.loggers={self.loggers!r}: {name!r} is not one of {', '.join(LOGGERS)}")
        for field, read in (("eval_forward", rules.bind), ("eval_depth", policies.parse)):
            try:
                read(getattr(self, field))
            except InputError as error:
                raise InputError(f"train.{field}={getattr(self, field)!r}: {error}") from None

    @property
    def logger_names(self) -> tuple[str, ...]:
        """The names in `loggers`."""
        return tuple(name.strip() for name in self.loggers.split(",") if name.strip())
