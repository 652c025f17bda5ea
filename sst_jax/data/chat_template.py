"""Chat templates: Jinja programs that lay a conversation out as text, run as transformers runs them, in a sandbox.

What a message holds never becomes a control token: where its text looks like one, MARK is put into it before the
template is filled in, and what tokenises the result takes such a token for its characters.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sst_jax.errors import InputError
from sst_jax.files import read_json
from sst_jax.types import Json, JsonValue

if TYPE_CHECKING:
    import jinja2

Message = Mapping[str, Any]  # "role", "content" (text, or text parts), and what else a template may read

START_OF_TURN, END_OF_TURN = "<start_of_turn>", "<end_of_turn>"
MARK = "\U0010fffe"  # no character, by Unicode's definition
TEMPLATE_FILE = "chat_template.jinja"
_REASONING = ("reasoning_content", "thinking", "reasoning")
_GIVEN = ("messages", "add_generation_prompt", "tools", "documents", "raise_exception", "strftime_now")
_CONTINUED = "CONTINUE_FINAL_MESSAGE_TAG "  # as in transformers, which has templates trim its space

# Gemma's turns, for vocabularies that have their tokens and come without a template.
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% set system = messages[0]['content'] + '\\n\\n' if messages[0]['role'] == 'system' else '' %}"
    "{% for message in (messages[1:] if system else messages) %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' }}"
    "{{ (system if loop.first else '') + (message['content'] | trim) + '<end_of_turn>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)


class ChatTemplate:
    """A chat template, with the special tokens that it may write, by name ("bos_token", ...).

    now  when the template is filled in, for those that write today's date; None: the present
    """

    now: datetime | None = None

    def __init__(self, source: str, specials: Mapping[str, JsonValue] | None = None):
        self.source, self.specials = source, dict(specials or {})

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        variables: Mapping[str, JsonValue] | None = None,
        continue_final: bool = False,
    ) -> str:
        """Return a conversation as text.

        Args:
          messages: as `checked_messages` returns them.
          add_generation_prompt: whether the opening of the model's turn follows.
          variables: others that the template reads, such as {"enable_thinking": False}.
          continue_final: leave the last message open, so that the model continues it.

        Raises: InputError where the template cannot be read or refuses the conversation.
        """
        conversation = [dict(message) for message in messages]
        if not self._takes_parts:
            conversation = [{**message, "content": text_of(message.get("content"))} for message in conversation]
        if continue_final:
            last = conversation[-1]
            if isinstance(last.get("content"), list):
                last["content"] = [*last["content"][:-1], _tagged(last["content"][-1])]
            else:
                last["content"] = f"{last.get('content') or ''}{_CONTINUED}"
        text = self._filled(conversation, add_generation_prompt, variables or {})
        if not continue_final:
            return text
        tag = _CONTINUED.strip()
        end = text.rfind(tag)
        if end < 0:
            raise InputError("chat cannot continue the last message: the chat template does not write it")
        return text[:end] if text.startswith(_CONTINUED, end) else text[:end].rstrip()

    def _filled(
        self, conversation: Sequence[Message], add_generation_prompt: bool, variables: Mapping[str, JsonValue]
    ) -> str:
        given = {**self.specials, **variables, "messages": conversation, "add_generation_prompt": add_generation_prompt}
        template = self._compiled
        try:
            return template.render(**{"tools": None, "documents": None, **given})
        except Exception as error:  # a template from the checkpoint may fail in any way
            raise InputError(f"chat needs a template that takes these messages: {error}") from error

    @functools.cached_property
    def _compiled(self) -> jinja2.Template:
        try:
            return environment(self).from_string(self.source)
        except Exception as error:  # jinja2's own, and Python's on absurd nesting
            raise InputError(f"chat needs a template that can be read: {error}") from error

    @functools.cached_property
    def variables(self) -> frozenset[str]:
        """What the template reads beside the messages: "enable_thinking", "date_string" and the like."""
        from jinja2 import meta, nodes

        self._compiled  # noqa: B018  # says what is wrong with it
        tree = environment(self).parse(self.source)
        set_here = {name.name for name in tree.find_all(nodes.Name) if name.ctx == "store"}
        defaults = {
            test.node.name
            for test in tree.find_all(nodes.Test)
            if test.name in ("defined", "undefined") and isinstance(test.node, nodes.Name)
        }
        read = meta.find_undeclared_variables(tree) - (set_here - defaults)
        return frozenset(read - {*_GIVEN, *self.specials})

    @functools.cached_property
    def _takes_parts(self) -> bool:
        """Whether the template reads text parts, [{"type": "text", "text": ...}], where others expect text."""
        part = {"type": "text", "text": "sst-part"}
        try:
            text = self._filled([{"role": "user", "content": [part]}], False, {})
        except InputError:
            return False
        return "sst-part" in text and "'text'" not in text and '"text"' not in text


@functools.cache
def gemma_turns(bos: str) -> ChatTemplate:
    """Return Gemma's turns, with the vocabulary's piece for BOS."""
    return ChatTemplate(CHAT_TEMPLATE, {"bos_token": bos})


def environment(template: ChatTemplate) -> jinja2.Environment:
    """Return the sandbox that transformers runs templates in (utils/chat_template_utils.py)."""
    import jinja2
    from jinja2 import nodes, parser
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %}, which marks what the model writes, and has a scope of its own."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: parser.Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("_inside"), [], [], body).set_lineno(line)

        def _inside(self, caller: Callable[[], str]) -> str:
            return caller()

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(value: JsonValue, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    def strftime_now(format: str) -> str:
        return (template.now or datetime.now()).strftime(format)

    made = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    made.filters["tojson"] = to_json
    made.globals |= {"raise_exception": refuse, "strftime_now": strftime_now}
    return made


def checked_messages(messages: Sequence[Message]) -> list[Json]:
    """Return messages for a template: fields that are None left out, content as text or text parts.

    Raises: InputError naming the message and what is wrong with it.
    """
    if not messages:
        raise InputError("chat needs at least one message")
    found = []
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InputError(f"chat message {number} must be an object with role and content")
        content = message.get("content")
        if isinstance(content, Sequence) and not isinstance(content, str):
            for part in content:
                if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                    raise InputError(f"chat message {number}: of its content's parts only text is read")
            content = [dict(part) for part in content]
        elif not isinstance(content, str | None):
            raise InputError(f"chat message {number}: its content must be text or text parts")
        elif content is None and not message.get("tool_calls"):
            raise InputError(f"chat message {number} has no content")
        given = {key: value for key, value in {**message, "content": content}.items() if value is not None}
        # Reasoning under its older names, as transformers fills in the one that templates read.
        reasoning = next((given[key] for key in _REASONING if key in given), None)
        found.append(given if reasoning is None else {"thinking": reasoning, **given, "reasoning_content": reasoning})
    return found


def text_of(content: str | Sequence[Mapping[str, str]] | None) -> str | None:
    """Return content as one text; None where there is none."""
    return content if isinstance(content, str | None) else "".join(part["text"] for part in content)


def check_alternating(messages: Sequence[Message]) -> None:
    """Raise InputError unless user and assistant alternate after an optional system message, as Gemma was trained."""
    system = messages[0]["role"] == "system"
    for index, message in enumerate(messages[system:], start=system):
        role = message["role"]
        if role != ("user" if (index - system) % 2 == 0 else "assistant"):
            raise InputError(
                f"chat message {index} is from {role!r}; after an optional system message, user and assistant alternate"
            )
    if len(messages) == system:
        raise InputError("chat needs at least one user message")


def _tagged(part: Mapping[str, str]) -> dict[str, str]:
    return {**part, "text": part["text"] + _CONTINUED}


# ------------------------------------------------------------------------------------------ texts of control tokens


def shared_length(one: Sequence[object], other: Sequence[object]) -> int:
    """Return how many elements two sequences begin with alike."""
    pairs = zip(one, other, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def any_of(pieces: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern that finds any of the pieces, the longest of those that begin at one place; none: nothing."""
    words = sorted(set(pieces))
    try:
        return re.compile(_tree(words) if words else "(?!)")
    except RecursionError:  # thousands of pieces, each the beginning of the next
        return re.compile("|".join(map(re.escape, sorted(words, key=len, reverse=True))))


def _tree(words: Sequence[str]) -> str:
    """Return a regular expression of sorted words in which no character is looked at twice.

    Gemma has 6,000 control tokens that begin with "<": tried one after another, a text of "<" would take minutes.
    """
    ends, branches = "" in words, []
    for _, group in itertools.groupby((word for word in words if word), key=lambda word: word[0]):
        several = list(group)
        shared = shared_length(several[0], several[-1])  # sorted: what these two share, all do
        rest = [word[shared:] for word in several]
        branches.append(re.escape(several[0][:shared]) + ("" if rest == [""] else _tree(rest)))
    return f"(?:{'|'.join(branches)})" + "?" * ends


def mark(value: object, special: re.Pattern[str]) -> Any:
    """Return JSON with MARK in every text that looks like a control token, behind its first character."""
    if isinstance(value, str):
        return special.sub(lambda found: found[0][0] + MARK + found[0][1:], value)
    if isinstance(value, Mapping):
        return {key: mark(part, special) for key, part in value.items()}
    return [mark(part, special) for part in value] if isinstance(value, list | tuple) else value


# -------------------------------------------------------------------------------------------------- where they lie


def read_template(folder: Path) -> str | None:
    """Return the chat template of a folder, where transformers looks for one; None where there is none.

    Raises: InputError naming the file that cannot be read.
    """
    if (folder / TEMPLATE_FILE).is_file():
        try:
            return (folder / TEMPLATE_FILE).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{folder / TEMPLATE_FILE} cannot be read: {error}") from None
    for name in ("tokenizer_config.json", "chat_template.json"):
        if not (folder / name).is_file():
            continue
        value = read_json(folder / name).get("chat_template")
        if isinstance(value, list):  # several by name
            parts = [part for part in value if isinstance(part, Mapping) and part.get("name") == "default"]
            value = parts[-1].get("template") if parts else None
        if isinstance(value, str):
            return value
    return None
