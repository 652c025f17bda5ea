"""The public `Model`: what `sst_jax.load` returns and notebooks work with."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypedDict, TypeVar, Unpack, cast

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike
from safetensors.numpy import save

from sst_jax.console import compile_cache
from sst_jax.data.template_file import use_template_file
from sst_jax.data.tokenizer import Tokenizer
from sst_jax.errors import InputError
from sst_jax.inference.detokenizer import IncrementalDetokenizer
from sst_jax.inference.policies import Policy, as_policy
from sst_jax.inference.sampling import Sampling, SpecialTokens
from sst_jax.inference.session import Request, check_policy, generate_tokens
from sst_jax.model import decoder, sharding
from sst_jax.model import rules as forwards
from sst_jax.model.config import ModelConfig, StreamConfig, from_mapping
from sst_jax.types import FieldValue, Json, JsonValue, Logits, PyTree, Tokens
from sst_jax.weights import store
from sst_jax.weights.loading import open_model
from sst_jax.weights.originals import vision_of
from sst_jax.weights.provenance import Provenance

Prompt = str | Sequence[int]
Depth = int | str | Policy
Each = TypeVar("Each")
UNKNOWN = Provenance()  # of a model that is made of its parts


@dataclasses.dataclass(frozen=True)
class Generation:
    """One answer.

    depth     what was asked for: a number, or a policy as it is spelled
    depths    iterations that the position had which each token came from
    finished  that the model ended it (or a stop string did), not the token limit
    """

    text: str
    tokens: list[int]
    prompt_tokens: int
    depth: int | str
    depths: list[int]
    finished: bool


@dataclasses.dataclass(frozen=True)
class TextDelta:
    """New text of one prompt, and its Generation once it has ended: what `Model.generate_iter` yields."""

    index: int
    text: str
    generation: Generation | None = None


class GenerateOptions(TypedDict, total=False):
    """Arguments of `Model.generate` and `Model.generate_iter` beside the prompts."""

    depth: Depth | Sequence[Depth]
    n: int
    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    seed: int | Sequence[int]
    stop: str | Sequence[str]
    chat: bool
    system: str | None
    template_args: Mapping[str, JsonValue] | None
    parse_special: bool


@dataclasses.dataclass(frozen=True)
class PromptReading:
    """How text becomes a prompt; the fields are arguments of `Model.generate`."""

    chat: bool
    system: str | None
    template_args: Mapping[str, JsonValue]
    parse_special: bool

    def __post_init__(self) -> None:
        if not self.chat and (self.system is not None or self.template_args):
            raise InputError("system and template_args are for chat=True")
        if self.chat and self.parse_special:
            raise InputError("parse_special is for prompts as they stand, chat=False")

    def tokens(self, text: str, tokenizer: Tokenizer) -> list[int]:
        """Return a prompt's ids."""
        if not self.chat:
            return tokenizer.encode(text, parse_special=self.parse_special)
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return tokenizer.chat([*system, {"role": "user", "content": text}], variables=self.template_args)


class Model:
    """A decoder with its parameters and tokenizer, and possibly a stream and an adapter."""

    def __init__(
        self, config: ModelConfig, params: decoder.Params, tokenizer: Tokenizer, provenance: Provenance = UNKNOWN
    ):
        dtype = str(params["base"]["embed"]["embedding"].dtype)
        self.config = dataclasses.replace(config, bos_id=tokenizer.bos_id, dtype=dtype)
        self.params, self.tokenizer, self.provenance = params, tokenizer, provenance

    @property
    def dtype(self) -> str:
        """The type of the base's weights and of the activations."""
        return self.config.dtype

    @property
    def prompts(self) -> str:
        """`prompt_format`, by its name in version 0.1.0."""
        warnings.warn("Model.prompts is Model.prompt_format now", DeprecationWarning, stacklevel=2)
        return self.prompt_format

    @property
    def prompt_format(self) -> str:
        """How questions are put to it: as it was trained here, "plain" or "chat"; else "plain"."""
        return self.provenance.prompt_format or "plain"

    @property
    def facts(self) -> Json:
        """The dict of version 0.1.0, now `provenance`."""
        warnings.warn("Model.facts is Model.provenance now, a dataclass", DeprecationWarning, stacklevel=2)
        return self.provenance.to_json()

    def __repr__(self) -> str:
        backbone, stream = self.config.backbone, self.config.stream
        what = "plain" if stream is None else f"stream {stream.state}, {count(self.params['blend']):,} parameters"
        return (
            f"Model({self.provenance.path or backbone.family}: {backbone.num_layers} layers, "
            f"{backbone.num_params / 1e6:,.0f}M parameters, {what}, {self.dtype}"
            + f", {backbone.reach_text}" * bool(backbone.reach_text)
            + ")"
        )

    def logits(
        self,
        tokens: ArrayLike,
        forward: str | None = None,
        *,
        passes: int = 2,
        depth: int = 1,
        segment_ids: ArrayLike | None = None,
        positions: ArrayLike | None = None,
    ) -> Logits:
        """Return logits [B, T, V], float32, of tokens [B, T].

        Args:
          forward: "plain", "two_pass", "k_pass", "local" or "exact" (`model/rules.py`), options behind it as in
            "k_pass:3"; None: "exact", which is what decoding computes, or "plain" without a stream.
          passes: k of k_pass and local where it is not spelled out.
          depth: iterations of the stack at every position.
          segment_ids: [B, T], 0 on padding, one number a document; None: each row is one document.
          positions: [B, T]; None: counted within each document.

        Raises: InputError on tokens outside the vocabulary, or a forward, passes or depth that do not fit together.
        """
        ids, given = self._ids(tokens), {"segment_ids": segment_ids, "positions": positions}
        rows = {key: jnp.asarray(value, jnp.int32) for key, value in given.items() if value is not None}
        for key, value in rows.items():
            if value.shape != ids.shape:
                raise InputError(f"{key} has shape {value.shape}, tokens have {ids.shape}")
        policy = as_policy(depth)
        check_policy(self.config, policy, whole_text=True)
        name = forward or ("plain" if self.config.stream is None else "exact")
        with self._mesh():
            return forwards.logits(
                self.config,
                self.params,
                ids,
                forward=name,
                passes=passes,
                depth=policy.first,
                **rows,
            )

    def _mesh(self) -> contextlib.AbstractContextManager:
        """Return the mesh that the parameters lie on, where they do, as the one in force."""
        place = getattr(self.params["base"]["embed"]["embedding"], "sharding", None)
        if isinstance(place, jax.sharding.NamedSharding) and isinstance(place.mesh, jax.sharding.Mesh):
            return jax.set_mesh(place.mesh)
        return contextlib.nullcontext()

    def _ids(self, tokens: ArrayLike) -> Tokens:
        try:
            ids = np.asarray(tokens)
        except ValueError:  # lists of different lengths
            raise InputError("tokens must be integers [B, T], of rows of one length") from None
        if ids.dtype.kind in "US":
            raise InputError("tokens must be integers [B, T], not text: [model.tokenizer.encode(text)] makes them")
        if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer):
            raise InputError(f"tokens must be integers [B, T], not {ids.dtype} {list(ids.shape)}")
        vocabulary = self.config.backbone.vocab_size
        if ids.size and (ids.min() < 0 or ids.max() >= vocabulary):
            raise InputError(f"tokens must be in [0, {vocabulary}); found {ids.min()} to {ids.max()}")
        return jnp.asarray(ids, jnp.int32)

    @property
    def special_tokens(self) -> SpecialTokens:
        """Tokens that end an answer, and those that its maker has suppressed (`suppress_tokens`)."""
        tokenizer = self.tokenizer
        return SpecialTokens(tuple(sorted(tokenizer.stop_ids)), tokenizer.generation.suppressed)

    def generate_iter(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        depth: Depth | Sequence[Depth] = 1,
        n: int = 1,
        max_new_tokens: int = 64,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | Sequence[int] = 0,
        stop: str | Sequence[str] = (),
        chat: bool = False,
        system: str | None = None,
        template_args: Mapping[str, JsonValue] | None = None,
        parse_special: bool = False,
    ) -> Iterator[TextDelta]:
        """Generate and yield text as it comes; arguments as for `generate`."""
        prompts = _as_list(prompts)
        if n < 1:
            raise InputError(f"n={n} must be at least 1")
        depths = [depth] * len(prompts) if isinstance(depth, int | np.integer | str | Policy) else list(depth)
        policies = [as_policy(each) for each in _one_each(depths, len(prompts), "depth") for _ in range(n)]
        reading = PromptReading(chat, system, template_args or {}, parse_special)
        tokens = [tuple(prompt) for prompt in (self._prompt(prompt, reading) for prompt in prompts) for _ in range(n)]
        # Rows of one prompt drawn with one seed would all be the same text; a list of seeds says otherwise.
        seeds = [seed + row for row in range(len(tokens))] if isinstance(seed, int | np.integer) else list(seed)
        sampling = Sampling(temperature, top_k, top_p)
        requests = [
            Request(prompt, max_new_tokens, policy, sampling, seed)
            for prompt, policy, seed in zip(tokens, policies, _one_each(seeds, len(tokens), "seed"), strict=True)
        ]
        running = generate_tokens(
            self.config, self.params, requests, special=self.special_tokens, pad_id=self.tokenizer.pad_id
        )
        marks = [stop] if isinstance(stop, str) else stop
        answers = [IncrementalDetokenizer(self.tokenizer, marks, prompt) for prompt in tokens]
        with self._mesh():
            chunk = next(running)
        while True:
            for row, answer in enumerate(answers):
                if answer.ended:
                    continue
                new = answer.add(chunk.tokens[row], chunk.depths[row], bool(chunk.done[row]))
                if new:
                    yield TextDelta(row, new)
                if answer.ended:
                    policy, finished = policies[row], answer.ended == "stop"
                    asked = policy.first if policy.is_flat else policy.name
                    yield TextDelta(
                        row,
                        "",
                        Generation(answer.text, answer.tokens, len(tokens[row]), asked, answer.depths, finished),
                    )
            try:
                with self._mesh():
                    chunk = running.send(np.array([answer.ended is not None for answer in answers]))
            except StopIteration:
                return

    def stream(self, prompts: Prompt | Sequence[Prompt], **settings: Unpack[GenerateOptions]) -> Iterator[TextDelta]:
        """Return `generate_iter`, by its name in version 0.1.0."""
        warnings.warn("Model.stream is Model.generate_iter now", DeprecationWarning, stacklevel=2)
        return self.generate_iter(prompts, **settings)

    def generate(self, prompts: Prompt | Sequence[Prompt], **settings: Unpack[GenerateOptions]) -> list[Generation]:
        """Answer to one prompt or many, text or token ids, in one batch.

        Args:
          depth: iterations of the stack at each position from the first generated one: a number, or a policy
            (`inference/policies.py`) or its spelling, such as "until_stable:0.01:4"; one, or one a prompt.
          n: answers to each prompt, side by side in the list; the prompt is prefilled once.
          max_new_tokens: at most so many tokens each.
          temperature, top_k, top_p: sampling; temperature 0 is greedy.
          seed: of sampling; answer number i uses seed + i, or the i-th of a list.
          stop: string or strings that end an answer and are not part of its text.
          chat: wrap each prompt (text) in the chat template's user turn.
          system: with `chat`, a system message before it.
          template_args: with `chat`, variables that the template reads, such as {"enable_thinking": False}.
          parse_special: without `chat`, whether text such as "<|im_start|>" in a prompt is the special token, and not
            its characters.

        Raises: InputError naming the prompt or the argument.
        """
        deltas = self.generate_iter(prompts, **settings)
        ended = {delta.index: delta.generation for delta in deltas if delta.generation is not None}
        return [ended[row] for row in sorted(ended)]

    def _prompt(self, prompt: Prompt, reading: PromptReading) -> list[int]:
        if isinstance(prompt, str):
            prompt = reading.tokens(prompt, self.tokenizer)
        elif reading.chat:
            raise InputError("chat=True takes prompts as text, not as token ids")
        if not len(prompt):
            raise InputError("a prompt is empty: give at least one token")
        return self._ids([list(prompt)])[0].tolist()

    def with_stream(self, seed: int = 0, **fields: FieldValue) -> Model:
        """Return the same backbone with a fresh stream; `fields` are StreamConfig's. A number for alpha fixes it there.

        Raises: InputError on an unknown field or a bad value.
        """
        if "prompt" in fields:
            warnings.warn("with_stream(prompt=...) is iterate_prompt now", FutureWarning, stacklevel=2)
        stream = from_mapping(StreamConfig, fields)
        config = dataclasses.replace(self.config, stream=stream)
        fresh = decoder.init_blend(config, jax.random.key(seed))
        return Model(config, {**self.params, "blend": fresh}, self.tokenizer, self.provenance)

    def without_stream(self) -> Model:
        """Return the same backbone and adapter with the stream taken off."""
        config = dataclasses.replace(self.config, stream=None)
        return Model(config, {**self.params, "blend": {}}, self.tokenizer, self.provenance)

    def save(self, directory: str | Path, vision: bool = True) -> Path:
        """Write a base folder that `load` and every command take; `vision`: with a multimodal base's tower beside it.

        Raises: InputError when the folder is not empty.
        """
        facts = self.provenance.header_record()
        files = self.tokenizer.files()
        if vision and self.provenance.layout not in (None, "text"):
            tower = vision_of(self.provenance)
            if tower.tensors:
                files = {**files, store.VISION: save(tower.tensors, {"format": "pt"}), **tower.files}
                facts["vision_config"] = tower.config
        return store.save_base(directory, self.config.to_dict(), self.params, facts, files)


def load(
    model: str | Path,
    dtype: str | None = None,
    mesh: Mapping[str, int] | None = None,
    *,
    base: str | Path | None = None,
    chat_template: str | Path | None = None,
) -> Model:
    """Open a model.

    Args:
        model: a Hugging Face folder, a hub id ("owner/name", "owner/name@revision"), a GGUF file, a converted folder, a
            training run or an adapter.
        dtype: "float32" or "bfloat16" for the base; None is float32 on a CPU and bfloat16 elsewhere.
        mesh: devices along "data", "fsdp" and "tensor" (see `model/sharding.py`), such as {"tensor": 8}, where one
            device is too small; axes left out have one.
        base: where the base of a run or an adapter lies now, if not where it records; its digest must be the recorded
            one.
        chat_template: file of a Jinja template for chats, in place of the model's own.

    Compiled programs are kept in ~/.cache/sst_jax, or as `SST_JAX_CACHE` says (`console/compile_cache.py`).

    Raises: InputError naming what is missing, damaged or not supported, or an axis that does not divide the model.
    """
    compile_cache.keep_programs()
    if mesh is None:
        return _with_template(Model(*open_model(model, dtype, base=base)), chat_template)
    devices = sharding.make_mesh(from_mapping(sharding.MeshConfig, {"fsdp": 1, **mesh}))
    with jax.set_mesh(devices):
        opened = open_model(model, dtype, base=base)
    sharding.check(devices, opened.config.backbone)
    return _with_template(Model(*opened), chat_template)


def _with_template(model: Model, file: str | Path | None) -> Model:
    if file is not None:
        use_template_file(model.tokenizer, file, "--chat-template")
    return model


def count(tree: PyTree) -> int:
    """Return the number of values in a tree of arrays."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    several = list(prompts)
    if several and all(isinstance(item, int | np.integer) for item in several):
        return [cast(Sequence[int], several)]
    if not several:
        raise InputError("there are no prompts")
    return cast(list[Prompt], several)


def _one_each(values: Sequence[Each], rows: int, name: str) -> list[Each]:
    if len(values) != rows:
        raise InputError(f"{name} has {len(values)} entries for {rows} prompts")
    return list(values)
