"""The OpenAI-compatible responses of the server: whole, and as the events of a stream."""

from __future__ import annotations

import dataclasses
import time
import uuid
from collections.abc import Sequence

from sst_jax.data.tokenizer import Tokenizer
from sst_jax.inference.sampling import Scores
from sst_jax.serving.protocol import Call
from sst_jax.serving.queue import Job
from sst_jax.types import Json


@dataclasses.dataclass
class Told:
    """How much of an answer's log-probabilities has been written: tokens, characters, and whether any text was."""

    tokens: int = 0
    characters: int = 0
    preceded: bool = False


class Writer:
    """Responses to one call."""

    def __init__(self, call: Call, name: str, tokenizer: Tokenizer):
        self._call, self._name, self._tokenizer = call, name, tokenizer
        self._id = ("chatcmpl-" if call.chat else "cmpl-") + uuid.uuid4().hex
        self._created = int(time.time())
        self._told: dict[int, Told] = {}  # of a stream, by answer

    def _wrap(self, kind: str, fields: Json) -> Json:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._name, **fields}

    def whole(self, jobs: Sequence[Job]) -> Json:
        """Return the response once all jobs have ended."""
        choices = []
        for index, job in enumerate(jobs):
            choice: Json = {"index": index, "finish_reason": job.answer.ended, "logprobs": self._of_answer(job)}
            if self._call.chat:
                choice["message"] = {"role": "assistant", "content": job.answer.text}
            else:
                choice["text"] = (self._call.prompts[index] if self._call.echo else "") + job.answer.text
            choices.append(choice)
        kind = "chat.completion" if self._call.chat else "text_completion"
        return self._wrap(kind, {"choices": choices, "usage": usage(jobs)})

    def begin(self, count: int) -> list[Json]:
        """Return the first event of a streamed response: in a chat, the role."""
        opening = {"role": "assistant", "content": ""}
        return [self._chunk(index, opening, None, None) for index in range(count)] if self._call.chat else []

    def delta(self, index: int, job: Job, text: str, reason: str | None, count: int) -> list[Json]:
        """Return the events for new text of one answer, and for the reason of its end.

        Args:
            index: of the answer.
            job: that it comes from.
            text: what is new.
            reason: of its end; None: more will come.
            count: tokens of the answer by now; log-probabilities go with the text that their tokens settle.
        """
        scores = None
        if self._call.logprobs is not None and (text or reason):
            told = self._told.setdefault(index, self._before(job))
            new = slice(told.tokens, count)
            told.tokens = count
            scores = self._written(told, job.answer.tokens[new], job.scores[new])
        chunks = []
        if text:
            chunks.append(self._chunk(index, {"content": text} if self._call.chat else text, None, scores))
            scores = None
        if reason:
            chunks.append(self._chunk(index, {} if self._call.chat else "", reason, scores))
        return chunks

    def end(self, jobs: Sequence[Job]) -> list[Json]:
        """Return the last event of a streamed response."""
        kind = "chat.completion.chunk" if self._call.chat else "text_completion"
        return [self._wrap(kind, {"choices": [], "usage": usage(jobs)})] if self._call.usage else []

    def _chunk(self, index: int, content: str | dict[str, str], reason: str | None, scores: Json | None) -> Json:
        choice: Json = {"index": index, "finish_reason": reason, "logprobs": scores}
        choice |= {"delta": content} if self._call.chat else {"text": content}
        return self._wrap("chat.completion.chunk" if self._call.chat else "text_completion", {"choices": [choice]})

    def _before(self, job: Job) -> Told:
        """Return the state before the first token that is written: an echoed prompt is, another stands before it."""
        return Told(preceded=not self._call.echo and self._tokenizer.has_text(job.request.tokens))

    def _of_answer(self, job: Job) -> Json | None:
        """Return the log-probabilities of a whole answer, its prompt's too where it is echoed; None: not asked for."""
        if self._call.logprobs is None:
            return None
        tokens = list(job.answer.tokens)
        scores: list[Scores | None] = list(job.scores)
        if self._call.echo:
            tokens, scores = [*job.request.tokens, *tokens], [None, *job.prompt_scores, *scores]
        return self._written(self._before(job), tokens, scores)

    def _written(self, told: Told, tokens: Sequence[int], scores: Sequence[Scores | None]) -> Json:
        """Return tokens and scores as OpenAI writes them, and go on with `told`; a prompt's first has no score."""
        pieces, offsets, tops = [], [], []
        for token, score in zip(tokens, scores, strict=True):
            piece = self._tokenizer.decode_next([token], told.preceded)
            pieces.append(piece)
            offsets.append(told.characters)
            tops.append([] if score is None else self._top(score, told.preceded))
            told.characters += len(piece)
            told.preceded = told.preceded or bool(piece)
        chosen = [None if score is None else float(score.chosen) for score in scores]
        if self._call.chat:
            content = [
                {**_scored(piece, value), "top_logprobs": [_scored(*pair) for pair in top]}
                for piece, value, top in zip(pieces, chosen, tops, strict=True)
            ]
            return {"content": content, "refusal": None}
        return {
            "tokens": pieces,
            "token_logprobs": chosen,
            "top_logprobs": [None if score is None else _by_text(top) for score, top in zip(scores, tops, strict=True)],
            "text_offset": offsets,
        }

    def _top(self, score: Scores, preceded: bool) -> list[tuple[str, float]]:
        """Return the top tokens' texts and scores, best first; `preceded`: whether any text stands before them."""
        best = zip(score.top_ids[: self._call.logprobs], score.top[: self._call.logprobs], strict=True)
        return [(self._tokenizer.decode_next([int(token)], preceded), float(value)) for token, value in best]


def _by_text(top: Sequence[tuple[str, float]]) -> dict[str, float]:
    """Return scores by text; of two tokens with equal text, the more probable one's."""
    found: dict[str, float] = {}
    for piece, value in top:
        found.setdefault(piece, value)
    return found


def _scored(piece: str, value: float | None) -> Json:
    """Return a token of a chat's log-probabilities; the bytes of half a character are not known by its text."""
    return {"token": piece, "logprob": value, "bytes": None if "\ufffd" in piece else list(piece.encode())}


def usage(jobs: Sequence[Job]) -> dict[str, int]:
    """Return token counts, each distinct prompt's once, and the iterations of the stack that the new tokens took."""
    prompt = sum(len(tokens) for tokens in {job.request.tokens for job in jobs})
    new = sum(len(job.answer.tokens) for job in jobs)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "iterations": sum(sum(job.answer.depths) for job in jobs),
    }
