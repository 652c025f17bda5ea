"""Conversations under published templates: which tokens are learned, worked out by hand, and what ends a turn."""

import importlib.util
import re
from pathlib import Path

import pytest

from sst_jax.data import conversations
from sst_jax.data.chat_template import ChatTemplate
from sst_jax.data.documents import Conversation, Problem
from sst_jax.data.prompts import asked_tokens, render
from sst_jax.data.tokenizer import ByteTokenizer, load_tokenizer
from sst_jax.errors import InputError
from tests.support.template_folders import CONVERSATIONS, SPECIALS, TEMPLATES, write_byte_level, write_metaspace

# These write something in front of an answer's words, and behind them.
WRITES_BEFORE = ("deepseek-llm", "deepseek-r1", "llama2", "mistral-nemo", "openchat", "qwen3", "vicuna")
# The control tokens of all templates, so that they are no mere characters.
PIECES = {piece for template in TEMPLATES.values() for piece in re.findall(r"<[|｜][^|｜<>{}'\"]+[|｜]>", template)}
MORE = sorted(PIECES - set(SPECIALS))
THINK = "<think>\n\n</think>\n\n"
# Of the conversation "turns" (a, "b 1", c, " d "), what the assistant has to write, read off the templates.
LEARNED = {
    "chatml": ["b 1<|im_end|>", " d <|im_end|>"],
    "command-r": ["b 1<|END_OF_TURN_TOKEN|>", "d<|END_OF_TURN_TOKEN|>"],
    "deepseek-llm": [" b 1</s>", "  d </s>"],
    "deepseek-r1": ["b 1<｜end▁of▁sentence｜>", " d <｜end▁of▁sentence｜>"],
    "exaone3": ["b 1[|endofturn|]", " d [|endofturn|]"],
    "falcon3": ["b 1</s>", " d </s>"],
    "gemma2": ["b 1<end_of_turn>", "d<end_of_turn>"],
    "gemma3": ["b 1<end_of_turn>", "d<end_of_turn>"],
    "granite3": ["b 1<|end_of_text|>", " d <|end_of_text|>"],
    "internlm2": ["b 1<|im_end|>", " d <|im_end|>"],
    "llama2": [" b 1 </s>", " d </s>"],
    "llama3": ["b 1<|eot_id|>", "d<|eot_id|>"],
    "llama3.2": ["b 1<|eot_id|>", "d<|eot_id|>"],
    "mistral-nemo": [" b 1</s>", "  d </s>"],
    "mistral": ["b 1</s>", " d </s>"],
    "olmo2": ["b 1</s>", " d </s>"],
    "openchat": [" b 1<|end_of_turn|>", "  d <|end_of_turn|>"],
    "phi3": ["b 1<|end|>", " d <|end|>"],
    "phi4": ["b 1<|im_end|>", " d <|im_end|>"],
    "phi4-mini": ["b 1<|end|>", " d <|end|>"],
    "qwen2.5": ["b 1<|im_end|>", " d <|im_end|>"],
    "qwen3": ["b 1<|im_end|>", f"{THINK} d <|im_end|>"],  # the last answer gets a place to think, which it must write
    "smollm2": ["b 1<|im_end|>", " d <|im_end|>"],
    "smollm3": ["b 1<|im_end|>", " d <|im_end|>"],
    "solar": ["b 1", " d </s>"],  # what ends a turn stands behind the last one alone
    "tulu": ["b 1</s>", " d </s>"],
    "vicuna": [" b 1</s>", " d</s>"],
    "zephyr": ["b 1</s>", " d </s>"],
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    found = {}
    for write in (write_byte_level, write_metaspace):
        folder = tmp_path_factory.mktemp(write.__name__)
        write(folder, TEMPLATES["chatml"], more=MORE)
        found[write.__name__] = load_tokenizer(folder)
    return found


@pytest.fixture(params=["write_byte_level", "write_metaspace"])
def tokenizer(request, folders):
    return folders[request.param]


def use(tokenizer, template):
    tokenizer.template = ChatTemplate(template, {"bos_token": "<s>", "eos_token": "</s>"})
    return tokenizer


def conversation(name, given=0):
    messages = CONVERSATIONS[name] if isinstance(name, str) else name
    return Conversation(str(name), tuple(messages), given, "")


def runs(tokenizer, ids, mask):
    """The learned runs, as texts with their control tokens."""
    pieces = {index: piece for piece, index in tokenizer.specials.items()}
    found, before = [], False
    for index, learned in zip(ids, mask, strict=True):
        if learned:
            found += [""] * (not before)
            found[-1] += pieces.get(index) or tokenizer.decode([index])
        before = learned
    return found


def eos_of(template, tokenizer):
    """What is put behind the last answer where the template ends no turn."""
    return [tokenizer.eos_id] if template == "solar" else []


def spaceless(texts):
    return [text.replace(" ", "") for text in texts]


@pytest.mark.parametrize("template", TEMPLATES)
def test_answers_and_their_ends_are_learned(tokenizer, template):
    ids, mask = conversations.render(conversation("turns"), use(tokenizer, TEMPLATES[template]))
    assert ids == tokenizer.chat(CONVERSATIONS["turns"], add_generation_prompt=False) + eos_of(template, tokenizer)
    # Token by token a vocabulary that writes spaces into its pieces drops them: it is compared without.
    assert spaceless(runs(tokenizer, ids, mask)) == spaceless(LEARNED[template])
    ends = [index for index, learned, after in zip(ids, mask, [*mask[1:], False], strict=True) if learned > after]
    assert len(ends) == 2
    ends = ends[template == "solar" :]
    assert set(ends) <= tokenizer.stop_ids
    _, last = conversations.render(conversation("turns"), tokenizer, last=True)
    assert spaceless(runs(tokenizer, ids, last)) == spaceless(LEARNED[template][1:])


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_what_is_learned_stands_where_generation_would_begin(folders, template, name):
    """Of every conversation that the template takes; what is asked and what is learned make up its beginning."""
    tokenizer, talk = use(folders["write_byte_level"], TEMPLATES[template]), conversation(name)
    answers = [at for at, message in enumerate(talk.messages) if message["role"] == "assistant"]
    try:
        whole = tokenizer.chat(talk.messages, add_generation_prompt=False)
    except InputError:
        answers = []
    if not answers:
        return
    if template == "deepseek-r1" and name in ("late", "first"):  # it moves messages about
        with pytest.raises(InputError, match="rewrites earlier turns"):
            conversations.render(talk, tokenizer)
        return
    ids, mask = conversations.render(talk, tokenizer)
    assert ids == whole + (eos_of(template, tokenizer) if answers[-1] == len(talk.messages) - 1 else [])
    assert len(runs(tokenizer, ids, mask)) == len(answers)
    if answers[0]:
        asked = asked_tokens(talk, tokenizer, "chat")
        _, last = conversations.render(talk, tokenizer, last=True)
        begins = last.index(True)
        assert asked[:begins] == ids[:begins]
        # DeepSeek's opens with a place to think, which its answers do not keep.
        assert tokenizer.decode(asked[begins:]).strip() == ("<think>" if template == "deepseek-r1" else "")


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_question_and_its_answer_are_the_templates_own_conversation(folders, template):
    tokenizer = use(folders["write_byte_level"], TEMPLATES[template])
    tokens, mask, _ = render(Problem("p", "How many?", "2 + 2 = 4.", "4"), tokenizer, "chat")
    talk = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "2 + 2 = 4.\n#### 4"}]
    expected, learned = conversations.render(Conversation("p", tuple(talk), 0, "4"), tokenizer)
    if template in WRITES_BEFORE:
        assert tokens[mask][-1] == expected[len(learned) - 1 - learned[::-1].index(True)]
    else:
        assert tokens.tolist() == expected
        assert mask.tolist() == learned


def test_given_messages_are_never_learned(folders):
    tokenizer = use(folders["write_byte_level"], TEMPLATES["chatml"])
    ids, mask = conversations.render(conversation("turns", given=3), tokenizer)
    assert runs(tokenizer, ids, mask) == [" d <|im_end|>"]


def test_the_built_in_turns():
    byte = ByteTokenizer()
    ids, mask = conversations.render(conversation("turns"), byte)
    assert runs(byte, ids, mask) == ["b 1<end_of_turn>", "d<end_of_turn>"]
    assert byte.turn_end == ([byte.piece_id("<end_of_turn>")], byte.encode_text("\n"))


BARE = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def test_a_template_that_ends_no_turn_gets_eos_behind_the_last(folders):
    tokenizer = use(folders["write_byte_level"], BARE)
    assert tokenizer.turn_end == ([tokenizer.eos_id], [])
    ids, mask = conversations.render(conversation("turns"), tokenizer)
    assert ids == [*tokenizer.chat(CONVERSATIONS["turns"], add_generation_prompt=False), tokenizer.eos_id]
    assert runs(tokenizer, ids, mask) == ["b 1", " d ", "</s>"]


def test_space_that_a_vocabulary_joins_to_the_header_is_left_out(tmp_path):
    """A vocabulary with a piece of two line breaks would begin an answer in the middle of it."""
    write_byte_level(tmp_path, TEMPLATES["chatml"], merges=[("Ċ", "Ċ")])
    tokenizer = load_tokenizer(tmp_path)
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "\n\nb"}]
    ids, mask = conversations.render(conversation(talk), tokenizer)
    assert runs(tokenizer, ids, mask) == ["b<|im_end|>"]
    assert ids[: mask.index(True)] == tokenizer.chat(talk[:1])


COUNTS = "{% for m in messages %}{{ messages | length }}{{ m.content }}<|im_end|>{% endfor %}"


def test_templates_that_rewrite_the_past_are_refused_with_the_way_out(folders):
    tokenizer = use(folders["write_byte_level"], COUNTS)
    with pytest.raises(InputError, match=r"turns: the chat template rewrites earlier turns, .*data\.learn=last"):
        conversations.render(conversation("turns"), tokenizer)


def test_what_the_template_refuses_is_named(folders):
    tokenizer = use(folders["write_byte_level"], TEMPLATES["gemma3"])
    with pytest.raises(InputError, match=r"^twice: chat needs a template that takes these messages: .*must alternate"):
        conversations.render(conversation("twice"), tokenizer)


# ---------------------------------------------------------------------------------------------------------------- TRL

# Templates of which TRL ships a copy with the assistant's part marked, {% generation %}.
MARKED = (
    "cohere", "cohere2", "gemma", "gemma3", "lfm2", "lfm2_v2", "llama3", "phi3", "phi3_5", "qwen2_5", "qwen2_5_vl",
    "qwen3_instruct_2507", "qwen3_vl",
)  # fmt: skip


@pytest.mark.parametrize("template", MARKED)
def test_what_is_learned_is_what_trl_learns_but_for_the_templates_own_space(template, tmp_path):
    found = importlib.util.find_spec("trl")
    if found is None or found.origin is None:
        pytest.skip("trl is not installed: pip install --no-deps trl")
    transformers = pytest.importorskip("transformers")
    folder = Path(found.origin).parent / "chat_templates"
    plain, marked = ((folder / f"{template}{part}.jinja").read_text(encoding="utf-8") for part in ("", "_training"))
    pieces = re.findall(r"<[|｜][^|｜<>{}'\"]+[|｜]>|<\w+_of_\w+>", plain)
    write_byte_level(tmp_path, plain, more=sorted(set(pieces) - set(SPECIALS)))
    ours, theirs = load_tokenizer(tmp_path), transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    compared = 0
    for name, messages in CONVERSATIONS.items():
        if (template, name) == ("cohere2", "tool") or all(message["role"] != "assistant" for message in messages):
            continue  # Cohere's copy for training leaves thoughts out
        try:
            expected = theirs.apply_chat_template(
                messages, chat_template=marked, return_assistant_tokens_mask=True, return_dict=True
            )
        except Exception:  # the template refuses it
            continue
        ids, mask = conversations.render(conversation(name), ours)
        assert ids == expected["input_ids"], name
        more = [bool(theirs_) - learned for theirs_, learned in zip(expected["assistant_masks"], mask, strict=True)]
        assert min(more) == 0, name  # nothing is learned that TRL does not learn
        beside = [index for index, extra in zip(ids, more, strict=True) if extra]
        assert ours.decode(beside).strip() == "", name
        assert set(beside) & set(ours.specials.values()) <= {ours.eos_id}, name
        compared += 1
    assert compared
