"""The OpenAI-compatible requests that this server answers: what is read, and what is refused.

A field that is not understood is refused by name, and so is a value that would change the answer and cannot be had:
an evaluation that silently ran with other settings than it asked for would be worse than none.
"""

from __future__ import annotations

import dataclasses
import json
import secrets
from typing import TypeGuard, TypeVar

from sst_jax.data.unicode import check_unicode
from sst_jax.errors import InputError
from sst_jax.inference.model import Model
from sst_jax.inference.policies import Policy, as_policy
from sst_jax.inference.sampling import Sampling
from sst_jax.inference.session import Request, check_policy
from sst_jax.serving.queue import TOP
from sst_jax.types import Json, JsonValue

Number = TypeVar("Number", int, float)
Default = TypeVar("Default", int, float, None)

# Fields that are accepted with the values here, which are what leaving them out means.
NEUTRAL: dict[str, tuple[JsonValue, ...]] = {
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "logit_bias": (None, {}),
    "user": (),
    "best_of": (None, 1),
    "suffix": (None, ""),
    "tools": (None, []),
    "functions": (None, []),
    "store": (None, False),
    "response_format": (None, {"type": "text"}),
    "top_logprobs": (None, 0),
    "metadata": (),
    "tool_choice": (None, "auto", "none"),
    "function_call": (None, "auto", "none"),
    "parallel_tool_calls": (None, True, False),
    "service_tier": (None, "default", "auto"),
    "modalities": (None, ["text"]),
    "prediction": (None,),
    "safety_identifier": (),
    "prompt_cache_key": (),
    # What other servers take, and their clients send.
    "min_p": (None, 0),
    "typical_p": (None, 1),
    "repetition_penalty": (None, 1),
    "length_penalty": (None, 1),
    "min_tokens": (None, 0),
    "ignore_eos": (None, False),
    "use_beam_search": (None, False),
    "stop_token_ids": (None, []),
    "bad_words": (None, []),
    "skip_special_tokens": (None, True),
    "spaces_between_special_tokens": (None, True),
    "include_stop_str_in_output": (None, False),
    "add_generation_prompt": (None, True),
    "continue_final_message": (None, False),
    "prompt_logprobs": (None,),
    "truncate_prompt_tokens": (None,),
    "priority": (None, 0),
}
SHARED = {
    "model",
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "n",
    "stream",
    "stream_options",
    "stop",
    "seed",
    "depth",
}
COMPLETION = SHARED | {"prompt", "echo", "logprobs", "parse_special"}
CHAT = SHARED | {"messages", "max_completion_tokens", "chat_template_kwargs", "logprobs", "top_logprobs"}
MESSAGE = ("role", "content", "name", "tool_call_id", "reasoning_content")
# What a message may say besides, which means as much as leaving it out.
EMPTY: tuple[tuple[str, JsonValue], ...] = (
    ("type", "text"),
    ("annotations", []),
    ("tool_calls", []),
    ("refusal", ""),
)
LEAST_P = 1e-9  # of nucleus sampling, which wants a positive one
STOPS = 16  # stop strings of one request


class Refused(Exception):
    """A request that gets an error instead of an answer: the HTTP status and OpenAI's error fields."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> Json:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


@dataclasses.dataclass(frozen=True)
class Limits:
    """What one request may ask for."""

    positions: int = 4096  # of prompt and answer
    new_tokens: int = 4096
    depth: int = 16
    answers: int = 256  # prompts times n
    body: int = 4 * 2**20  # bytes


@dataclasses.dataclass(frozen=True)
class Call:
    """A call as it was understood: one engine request an answer; `prompts` are their prompts' texts, to be echoed."""

    chat: bool
    requests: list[Request]
    prompts: list[str]
    stream: bool = False
    usage: bool = False  # at the end of a stream
    logprobs: int | None = None  # how many top tokens are told; None: no scores at all
    echo: bool = False


def parse(body: bytes) -> Json:
    """Return the JSON object in a body. Raises: Refused."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refused(400, f"the body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise Refused(400, f"the body must be a JSON object, not {type(value).__name__}")
    return value


def read_completion(body: Json, model: Model, name: str, limits: Limits) -> Call:
    """Return a call of /v1/completions. Raises: Refused."""
    _fields(body, COMPLETION, name)
    tokenizer, given, special = model.tokenizer, body.get("prompt"), _flag(body, "parse_special")
    if given is None:
        raise Refused(400, "prompt is missing", "prompt")
    several = isinstance(given, list) and bool(given) and not all(_is_int(item) for item in given)
    prompts = [_tokens(prompt, model, special) for prompt in (given if several else [given])]
    top, echo = _number(body, "logprobs", None, int, 0, TOP), _flag(body, "echo")
    count = _number(body, "max_tokens", 16, int, 0 if echo else 1, limits.new_tokens)
    scored = top is not None
    policy = _policy(body, model, limits)
    if scored and echo and not policy.is_flat:
        raise Refused(400, "the prompt's logprobs are those of one depth: give depth as a number", "depth")
    call = _call(body, False, prompts, count, policy, limits, scored=scored, prompt_scored=scored and echo)
    if call.stream and echo:
        raise Refused(400, "stream cannot be combined with echo", "stream")
    texts = [tokenizer.decode(request.tokens) for request in call.requests] if echo else []
    return dataclasses.replace(call, logprobs=top, echo=echo, prompts=texts)


def read_chat(body: Json, model: Model, name: str, limits: Limits) -> Call:
    """Return a call of /v1/chat/completions. Raises: Refused."""
    _fields(body, CHAT, name)
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise Refused(400, "messages must be a list of at least one message", "messages")
    variables = body.get("chat_template_kwargs") or {}
    if not isinstance(variables, dict):
        raise Refused(400, "chat_template_kwargs must be an object", "chat_template_kwargs")
    try:
        model.tokenizer.check_variables(variables)
    except InputError as error:
        raise Refused(400, f"chat_template_kwargs: {error}", "chat_template_kwargs") from None
    try:
        conversation = [_message(message, number) for number, message in enumerate(messages)]
        tokens = model.tokenizer.chat(conversation, variables=variables)
    except InputError as error:
        raise Refused(400, str(error), "messages") from None
    room = min(limits.new_tokens, limits.positions - len(tokens))
    field = "max_tokens" if body.get("max_completion_tokens") is None else "max_completion_tokens"
    count = _number(body, field, max(room, 1), int, 1, limits.new_tokens)
    scored, top = _flag(body, "logprobs"), _number(body, "top_logprobs", 0, int, 0, TOP)
    if top and not scored:
        raise Refused(400, "top_logprobs needs logprobs to be true", "top_logprobs")
    call = _call(body, True, [tokens], count, _policy(body, model, limits), limits, scored=scored)
    return dataclasses.replace(call, logprobs=top if scored else None)


def _call(
    body: Json,
    chat: bool,
    prompts: list[list[int]],
    count: int,
    policy: Policy,
    limits: Limits,
    scored: bool = False,
    prompt_scored: bool = False,
) -> Call:
    n = _number(body, "n", 1, int, 1, limits.answers)
    if len(prompts) * n > limits.answers:
        raise Refused(400, f"{len(prompts)} prompts with n={n} are more than {limits.answers} answers", "n")
    for prompt in prompts:
        if len(prompt) + count > limits.positions:
            raise Refused(
                400,
                f"a prompt of {len(prompt)} tokens and max_tokens={count} exceed this server's "
                f"{limits.positions} positions",
                "max_tokens",
                "context_length_exceeded",
            )
    try:
        sampling = Sampling(
            _number(body, "temperature", 1.0, float, 0.0, 100.0),
            max(_number(body, "top_k", 0, int, -1, 2**31 - 1), 0),  # -1: all, as 0
            max(_number(body, "top_p", 1.0, float, 0.0, 1.0), LEAST_P),  # 0: the top token alone
        )
    except InputError as error:
        raise Refused(400, str(error), "top_p") from None
    seed = _number(body, "seed", secrets.randbits(31), int, -(2**63), 2**63 - 1)
    requests = [
        Request(tuple(prompt), count, policy, sampling, seed + sample, _stop(body), scored, prompt_scored)
        for prompt in prompts
        for sample in range(n)
    ]
    options = body.get("stream_options") or {}
    if not isinstance(options, dict) or set(options) - {"include_usage", "include_obfuscation"}:
        raise Refused(400, "stream_options may hold include_usage only", "stream_options")
    if options.get("include_obfuscation") not in (None, False):
        raise Refused(400, "include_obfuscation is not supported other than as False", "stream_options")
    return Call(chat, requests, [], _flag(body, "stream"), _flag(options, "include_usage"))


def _fields(body: Json, known: set[str], name: str) -> None:
    for field, value in body.items():
        if field in known:
            continue
        if field not in NEUTRAL:
            raise Refused(400, f"{field} is no field that this server knows", field, "unknown_field")
        if NEUTRAL[field] and value not in NEUTRAL[field]:
            raise Refused(400, f"{field} is not supported other than as {NEUTRAL[field][-1]!r}", field, "unsupported")
    if body.get("model") not in (None, name):
        raise Refused(404, f"the model {body['model']!r} is not served here, {name!r} is", "model", "model_not_found")


def _is_int(value: JsonValue) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(body: Json, name: str, default: Default, kind: type[Number], least: float, most: float) -> Number | Default:
    value = body.get(name)
    if value is None:
        return default
    if not (_is_int(value) or (kind is float and isinstance(value, float))):
        what = "an integer" if kind is int else "a number"
        raise Refused(400, f"{name}={value!r} must be {what}", name)
    if not least <= value <= most:
        raise Refused(400, f"{name}={value!r} must be between {least} and {most}", name)
    return kind(value)


def _flag(body: Json, name: str) -> bool:
    value = body.get(name)
    if value not in (None, True, False):
        raise Refused(400, f"{name}={value!r} must be true or false", name)
    return bool(value)


def _stop(body: Json) -> tuple[str, ...]:
    value = body.get("stop")
    marks = [value] if isinstance(value, str) else value or []
    if not isinstance(marks, list) or not all(isinstance(mark, str) for mark in marks) or len(marks) > STOPS:
        raise Refused(400, f"stop must be a string or a list of at most {STOPS}", "stop")
    return tuple(mark for mark in marks if mark)


def _policy(body: Json, model: Model, limits: Limits) -> Policy:
    value = 1 if body.get("depth") is None else body["depth"]
    if not _is_int(value) and not isinstance(value, str):
        raise Refused(400, f"depth={value!r} must be a number or a policy such as 'until_stable:0.01:4'", "depth")
    try:
        policy = as_policy(value)
    except InputError as error:
        raise Refused(400, str(error), "depth") from None
    if policy.max_depth > limits.depth:
        raise Refused(400, f"depth={policy.name} is more than the {limits.depth} that are allowed", "depth")
    try:
        check_policy(model.config, policy)
    except InputError as error:
        raise Refused(400, str(error), "depth") from None
    return policy


def _tokens(prompt: JsonValue, model: Model, special: bool) -> list[int]:
    if isinstance(prompt, str):
        try:
            tokens = model.tokenizer.encode(prompt, parse_special=special)
        except InputError as error:
            raise Refused(400, f"prompt: {error}", "prompt") from None
    elif isinstance(prompt, list) and all(_is_int(item) for item in prompt):
        tokens, size = prompt, model.config.backbone.vocab_size
        if any(not 0 <= token < size for token in tokens):
            raise Refused(400, f"prompt: token ids must be in [0, {size})", "prompt")
    else:
        raise Refused(400, "prompt must be a string, a list of token ids, or a list of either", "prompt")
    if not tokens:
        raise Refused(400, "prompt is empty: give at least one token", "prompt")
    return tokens


def _message(message: JsonValue, number: int) -> Json:
    # A client that sends an answer back sends its empty fields too, and lm-evaluation-harness says that text is text.
    if not isinstance(message, dict):
        raise InputError(f"message {number} must be an object with role and content")
    given = {key: value for key, value in message.items() if value is not None and (key, value) not in EMPTY}
    for key, value in given.items():
        if key not in MESSAGE:
            raise InputError(f"message {number}: {key} is not supported, only {', '.join(MESSAGE)}")
        if key != "content" and not isinstance(value, str):
            raise InputError(f"message {number}: {key} must be text")
    check_unicode(given, f"message {number}")
    return given
