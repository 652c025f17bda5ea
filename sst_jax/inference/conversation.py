"""A conversation with a model, whose depth and sampling may change from one answer to the next."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator

from sst_jax.console.progress import counted
from sst_jax.data.tokenizer import Tokenizer
from sst_jax.data.unicode import check_unicode
from sst_jax.errors import InputError
from sst_jax.inference.halting_probe import Probe
from sst_jax.inference.model import Generation, Model
from sst_jax.inference.policies import Policy, parse
from sst_jax.inference.sampling import Sampling
from sst_jax.inference.session import check_policy


@dataclasses.dataclass(frozen=True)
class Settings:
    """How answers are drawn; answer number i of a conversation uses seed + i."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise InputError(f"max_new_tokens={self.max_new_tokens} must be at least 1")
        Sampling(self.temperature, self.top_k, self.top_p)  # its checks

    def with_text(self, assignment: str) -> Settings:
        """Return the settings with one changed, written NAME=VALUE.

        Raises: InputError naming it.
        """
        name, _, value = assignment.partition("=")
        kinds = {name: type(value) for name, value in dataclasses.asdict(self).items()}
        try:
            return dataclasses.replace(self, **{name.strip(): kinds[name.strip()](value)})
        except (KeyError, ValueError):
            raise InputError(f"/set {assignment}: write NAME=VALUE, with one of {', '.join(kinds)}") from None


class Conversation:
    """Messages so far, and how the next answer is made; `note` says what the last answer took.

    Each answer reads the whole conversation again, prefilled at the depth that holds now: what was said at another
    depth before it is text like any other.
    """

    def __init__(self, model: Model, depth: str = "1", system: str | None = None, settings: Settings | None = None):
        """Begin. Raises: InputError where the model has no chat template, or the depth is none for it."""
        self.model, self.settings, self.note = model, settings or Settings(), ""
        self.policy = self._policy(depth)
        self.messages: list[dict[str, str]] = []
        self._begin(system)
        model.tokenizer.chat([*self.messages, {"role": "user", "content": "a"}])  # what it refuses shows now

    def say(self, line: str) -> Iterator[str]:
        """Yield the answer to a line as it comes, or what a command beginning with "/" answers.

        Raises: InputError on an unknown command or a bad value; the conversation stays as it was.
        """
        self.note = ""
        if line.startswith("/"):
            yield from self._command(line)
            return
        check_unicode(line, "what you said")
        yield from self._answer([*self.messages, {"role": "user", "content": line}], self.policy)

    def _command(self, line: str) -> Iterator[str]:
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        match name:
            case "/depth":
                self.policy = self._policy(rest)
                yield f"depth {self.policy.name} from now on"
            case "/again":
                asked = self.messages[:-1] if self.messages and self.messages[-1]["role"] == "assistant" else []
                if not asked:
                    raise InputError("/again: nothing has been answered yet")
                yield from self._answer(asked, self._policy(rest) if rest else self.policy)
            case "/system":
                check_unicode(rest, "/system")
                self._begin(rest or None)
                yield "the conversation begins anew, " + ("with this system message" if rest else "without one")
            case "/set":
                self.settings = self.settings.with_text(rest)
                yield ", ".join(f"{key}={value}" for key, value in dataclasses.asdict(self.settings).items())
            case "/clear":
                self._begin(self._system)
                yield "the conversation begins anew"
            case _:
                raise InputError(f"{name} is not one of /depth, /again, /system, /set, /clear, /help, /quit")

    def _answer(self, messages: list[dict[str, str]], policy: Policy) -> Iterator[str]:
        tokens, started = self.model.tokenizer.chat(messages), time.monotonic()
        most = self.model.config.backbone.position_limit
        if len(tokens) + self.settings.max_new_tokens > most:
            raise InputError(
                f"the conversation has {len(tokens)} tokens, which with max_new_tokens="
                f"{self.settings.max_new_tokens} exceed the model's {most} positions: /clear begins anew"
            )
        settings = dataclasses.asdict(self.settings)
        settings["seed"] += sum(message["role"] == "assistant" for message in messages)
        text, whole = "", None
        try:
            for delta in self.model.generate_iter([tokens], depth=policy, **settings):
                text += delta.text
                whole = delta.generation or whole
                yield delta.text
        finally:  # also where the reader has had enough
            if text or whole is not None:
                self.messages = [*messages, {"role": "assistant", "content": text}]
        assert whole is not None
        self.note = _note(whole, policy, time.monotonic() - started)

    def _policy(self, spelling: str) -> Policy:
        policy = parse(spelling, files=True)
        if isinstance(policy.select_depth, Probe):
            policy.select_depth.check(self.model)
        check_policy(self.model.config, policy)
        return policy

    def _begin(self, system: str | None) -> None:
        self._system = system
        self.messages = [] if system is None else [{"role": "system", "content": system}]


def _note(answer: Generation, policy: Policy, seconds: float) -> str:
    """Return what an answer took, in words."""
    depth = f"depth {policy.name}"
    if not policy.is_flat and answer.depths:
        depth += f", {sum(answer.depths) / len(answer.depths):.2f} iterations per token"
    cut = "" if answer.finished else ", cut off at max_new_tokens"
    return f"[{depth}; {counted(len(answer.tokens), 'token')} in {seconds:.1f} s{cut}]"


def note_on_turns(tokenizer: Tokenizer) -> str | None:
    """Return what is to be said before a chat whose turns the model does not bring; None where it brings them."""
    if tokenizer.template is not None:
        return None
    return (
        "note: no chat template came with this model, so its turns are Gemma's; a base model that was not trained on "
        "them does not answer, it continues the text"
    )
