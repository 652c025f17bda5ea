"""The OpenAI-compatible responses of the server: whole, and as the events of a stream."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence

from sst_jax.data.tokenizer import Tokenizer
from sst_jax.inference.sampling import Scores
from sst_jax.serving.protocol import Call
from sst_jax.serving.queue import Job
from sst_jax.types import Json


class Writer:
    """Responses to one call."""

    def __init__(self, call: Call, name: str, tokenizer: Tokenizer):
        self._call, self._name, self._tokenizer = call, name, tokenizer
        self._id = ("chatcmpl-" if call.chat else "cmpl-") + uuid.uuid4().hex
        self._created = int(time.time())

    def _wrap(self, kind: str, fields: Json) -> Json:
        return {"id": self._id, "object": kind, "created": self._created, "model": self._name, **fields}

    def whole(self, jobs: Sequence[Job]) -> Json:
        """Return the response once all jobs have ended."""
        choices = []
        for index, job in enumerate(jobs):
            choice: Json = {"index": index, "finish_reason": job.answer.ended}
            if self._call.chat:
                choice["message"] = {"role": "assistant", "content": job.answer.text}
            else:
                echoed = self._call.prompts[index] if self._call.echo else ""
                choice |= {"text": echoed + job.answer.text, "logprobs": self._logprobs(job)}
            choices.append(choice)
        kind = "chat.completion" if self._call.chat else "text_completion"
        return self._wrap(kind, {"choices": choices, "usage": usage(jobs)})

    def begin(self, count: int) -> list[Json]:
        """Return the first event of a streamed response: in a chat, the role."""
        opening = {"role": "assistant", "content": ""}
        return [self._chunk(index, opening, None) for index in range(count)] if self._call.chat else []

    def delta(self, index: int, text: str, reason: str | None) -> list[Json]:
        """Return the event for new text of one answer, and for the reason of its end."""
        chunks = []
        if text:
            chunks.append(self._chunk(index, {"content": text} if self._call.chat else text, None))
        if reason:
            chunks.append(self._chunk(index, {} if self._call.chat else "", reason))
        return chunks

    def end(self, jobs: Sequence[Job]) -> list[Json]:
        """Return the last event of a streamed response."""
        kind = "chat.completion.chunk" if self._call.chat else "text_completion"
        return [self._wrap(kind, {"choices": [], "usage": usage(jobs)})] if self._call.usage else []

    def _chunk(self, index: int, content: str | dict[str, str], reason: str | None) -> Json:
        choice: Json = {"index": index, "finish_reason": reason}
        choice |= {"delta": content} if self._call.chat else {"text": content, "logprobs": None}
        return self._wrap("chat.completion.chunk" if self._call.chat else "text_completion", {"choices": [choice]})

    def _logprobs(self, job: Job) -> Json | None:
        """Return OpenAI's four lists over the tokens, the prompt's too where it is echoed: its first token has no
        score.
        """
        if self._call.logprobs is None:
            return None
        tokens = list(job.answer.tokens)
        scores: list[Scores | None] = list(job.scores)
        if self._call.echo:
            tokens, scores = [*job.request.tokens, *tokens], [None, *job.prompt_scores, *scores]
        pieces: list[str] = []
        tops: list[dict[str, float] | None] = []
        preceded = not self._call.echo and self._tokenizer.has_text(job.request.tokens)
        for token, score in zip(tokens, scores, strict=True):
            pieces.append(self._tokenizer.decode_next([token], preceded))
            tops.append(None if score is None else self._top(score, preceded))
            preceded = preceded or bool(pieces[-1])
        offsets = [0]
        for piece in pieces[:-1]:
            offsets.append(offsets[-1] + len(piece))
        return {
            "tokens": pieces,
            "token_logprobs": [None if score is None else float(score.chosen) for score in scores],
            "top_logprobs": tops,
            "text_offset": offsets[: len(pieces)],
        }

    def _top(self, score: Scores, preceded: bool) -> dict[str, float]:
        """Return the top tokens' scores by their text; of two with equal text, the higher one.

        preceded: whether any text stands before them.
        """
        found: dict[str, float] = {}
        for token, value in zip(score.top_ids[: self._call.logprobs], score.top[: self._call.logprobs], strict=True):
            found.setdefault(self._tokenizer.decode_next([int(token)], preceded), float(value))
        return found


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
