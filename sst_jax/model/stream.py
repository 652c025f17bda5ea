"""The config of the state stream: what the V2 paper leaves open is a field with a default, never a silent choice."""

from __future__ import annotations

import dataclasses
from typing import TypeVar

from sst_jax.model.fields import check_numbers, check_one_of, require

Default = TypeVar("Default")


def _since(default: Default) -> Default:
    """Return a field that version 0.1.0 did not have, which is written down only where it has another value."""
    return dataclasses.field(default=default, metadata={"since": "0.2.0"})


@dataclasses.dataclass(frozen=True)
class StreamConfig:
    """The state stream: what a layer's state is, and how it is blended in.

    state        "ffn": the feed-forward block's output f. "block": the layer's output o (V1's cached state).
    norm         N in h' = h + alpha * (gain * N(s) - h): "none", "rms" (unit RMS), "match" (s rescaled to h's RMS).
    alpha        None: learned within alpha_range from alpha_init. A number: fixed there, outside the range too.
    alpha_range  alpha = lo + (hi - lo) * sigmoid(theta); (0, 1) is "free".
    alpha_init   where learned alphas begin.
    gate         a learned alpha as a function of its parameter: "range" (as above), or "tanh": tanh(theta) from 0, so
                 that training starts from the plain backbone (T2MLR); alpha_range and alpha_init are unused.
    ramp         positions of a document over which alpha rises: it is scaled by min(position / ramp, 1). 0 is none.
    links        which state enters which layer. None: every layer's own ("layers" may name some). Else (source,
                 destination) pairs of layers from 0, at most one for a destination: the state that the source left
                 one step earlier enters the destination, and no other layer is blended. The recurrence is then one of
                 the whole stack (`model/links.py`), unless all links lead from a layer to itself.
    timing       which iterations read a state: "both" (the first from the position before, later ones from the
                 iteration before), "next" (the first alone), "same" (later ones alone: replay of the same token).
    site         where it is blended in: "ffn" (the residual stream before the feed-forward block) or "output" (what
                 leaves the layer, which a state="block" then is).
    iteration_embedding  how many iterations of a position are told apart by a learned vector each, which is added to
                 the token's embedding before the first layer; 0: none are. The first iteration has none, so that
                 depth 1 is as without; those beyond the number have the last one's; training begins from zeros.
    readout      iteration whose hidden state gives a position's logits, "last" or "first"; caches keep the last one's.
    alpha_warmup optimizer steps over which alpha rises from the range's lower end, in training alone: held-out losses
                 and decoding use the full alpha. 0 is none.
    granularity  how many alphas: "dimension" (one a layer and dimension), "layer" (one a layer), "scalar" (one).
    gain         factor on N(s).
    learn_gain   whether the gain is trained, one a layer, from that value.
    decay        0: a state is the previous position's. lambda in (0, 1): s_t = lambda s_{t-1} + (1 - lambda) u_t.
    initial      at a document's first position: "none" (no blend), "zero", "own" (RMSNorm of the layer's input, V1),
                 "skip_bos" (as "none", and a BOS leaves no state either).
    propagate    in forwards with several passes. "scan": for state="block" the linear carry of s through o is exact;
                 "shift": the states of the pass before, shifted by one step, and nothing more.
    dtype        how states are kept in caches; the blend itself is always float32 or wider.
    pass1_grad   whether gradients flow through the states of earlier passes.
    iterate_prompt  which positions of a prompt get the depth asked of `generate`: "last" (only the last one, whose
                 output is the first generated token), "none" (depth begins where the first generated token is fed),
                 "all". In files and PyTorch exports its key is "prompt", as version 0.1.0 called it.
    kv           at iteration i > 1 a position's keys and values are computed again ("overwrite") or kept from
                 iteration 1 ("first", V1's frozen cache).
    layers       which layers carry a state; None is all.
    prefill      how a prompt's states are solved for: "sweeps" (in parallel, inside each layer, until they stand
                 still; a sweep is over all steps at once, or through many spans of them) or "sequential" (position by
                 position).
    sweep_tolerance  what sweeps may change states by, in relation to their norm, for these to count as still; at least
                 the rounding of the activations' type (float32 1.2e-7, bfloat16 7.8e-3).
    sweep_cap    sweeps of a layer; where they do not suffice, it goes position by position.
    """

    state: str = "ffn"
    norm: str = "none"
    alpha: float | None = None
    alpha_range: tuple[float, float] = (0.015, 0.10)
    alpha_init: float = 0.027
    alpha_warmup: int = 0
    granularity: str = "dimension"
    gain: float = 1.0
    learn_gain: bool = False
    decay: float = 0.0
    initial: str = "none"
    propagate: str = "scan"
    dtype: str = "float32"
    pass1_grad: bool = True
    iterate_prompt: str = dataclasses.field(default="last", metadata={"written": "prompt"})
    kv: str = "overwrite"
    layers: tuple[int, ...] | None = None
    prefill: str = "sweeps"
    sweep_tolerance: float = 1e-6
    sweep_cap: int = 12
    gate: str = _since("range")
    ramp: float = _since(0.0)
    links: tuple[tuple[int, int], ...] | None = _since(None)
    timing: str = _since("both")
    site: str = _since("ffn")
    readout: str = _since("last")
    iteration_embedding: int = _since(0)

    def __post_init__(self) -> None:
        check_one_of("stream", "prefill", self.prefill, ("sweeps", "sequential"))
        check_one_of("stream", "state", self.state, ("ffn", "block"))
        check_one_of("stream", "norm", self.norm, ("none", "rms", "match"))
        check_one_of("stream", "granularity", self.granularity, ("dimension", "layer", "scalar"))
        check_one_of("stream", "initial", self.initial, ("none", "zero", "own", "skip_bos"))
        check_one_of("stream", "propagate", self.propagate, ("scan", "shift"))
        check_one_of("stream", "dtype", self.dtype, ("float32", "bfloat16"))
        check_one_of("stream", "iterate_prompt", self.iterate_prompt, ("last", "none", "all"))
        check_one_of("stream", "kv", self.kv, ("overwrite", "first"))
        check_one_of("stream", "gate", self.gate, ("range", "tanh"))
        check_one_of("stream", "timing", self.timing, ("both", "next", "same"))
        check_one_of("stream", "site", self.site, ("ffn", "output"))
        check_one_of("stream", "readout", self.readout, ("last", "first"))
        for field, kind in (("alpha_range", int | float), ("layers", int)):
            value = getattr(self, field)
            if value is not None or field == "alpha_range":
                several = isinstance(value, list | tuple) and all(isinstance(item, kind) for item in value)
                require(several, f"stream.{field}={value!r} must be a list of numbers")
                object.__setattr__(self, field, tuple(value))
        check_numbers(
            "stream", self, "alpha_init", "alpha_warmup", "gain", "decay", "ramp", "sweep_tolerance", "sweep_cap"
        )
        require(len(self.alpha_range) == 2, f"stream.alpha_range={self.alpha_range} must be two numbers")
        lo, hi = self.alpha_range
        require(0.0 <= lo < hi <= 1.0, f"stream.alpha_range={self.alpha_range} must satisfy 0 <= lo < hi <= 1")
        if self.alpha is None:
            require(
                self.gate == "tanh" or lo < self.alpha_init < hi,
                f"stream.alpha_init={self.alpha_init} must lie strictly inside alpha_range={self.alpha_range}; "
                "a fixed alpha is set with stream.alpha",
            )
        else:
            check_numbers("stream", self, "alpha")
            require(0.0 <= self.alpha <= 1.0, f"stream.alpha={self.alpha} must be in [0, 1]")
        require(0.0 <= self.decay < 1.0, f"stream.decay={self.decay} must be in [0, 1)")
        require(self.sweep_tolerance > 0, f"stream.sweep_tolerance={self.sweep_tolerance} must be positive")
        require(self.sweep_cap >= 2, f"stream.sweep_cap={self.sweep_cap} must be at least 2")
        require(self.alpha_warmup >= 0, f"stream.alpha_warmup={self.alpha_warmup} must not be negative")
        require(self.ramp >= 0, f"stream.ramp={self.ramp} must not be negative")
        marks = self.iteration_embedding
        require(
            type(marks) is int and (marks == 0 or marks >= 2),
            f"stream.iteration_embedding={marks!r} must be a number of iterations, 2 or more, or 0 for none",
        )
        self._check_links()

    def _check_links(self) -> None:
        """Make `links` tuples, and refuse what a stream between layers cannot be."""
        if self.links is None:
            return
        pairs = isinstance(self.links, list | tuple) and all(
            isinstance(link, list | tuple) and len(link) == 2 and all(type(layer) is int for layer in link)
            for link in self.links
        )
        require(pairs, f"stream.links={self.links!r} must be pairs (source, destination) of layers, such as ((11, 4),)")
        links = tuple((source, destination) for source, destination in self.links)
        object.__setattr__(self, "links", links)
        require(
            bool(links), "stream.links is empty: name at least one link, or leave it None for every layer's own state"
        )
        destinations = [destination for _, destination in links]
        twice = sorted({layer for layer in destinations if destinations.count(layer) > 1})
        require(
            not twice, f"stream.links={links} has two links into layer {twice and twice[0]}: one state enters a layer"
        )
        require(self.layers is None, f"stream.layers={self.layers} and stream.links={links}: links name the layers")
        require(
            not (self.decay and self.is_linked),
            f"stream.decay={self.decay} averages a layer's own states; a link between layers has decay 0",
        )

    @property
    def is_linked(self) -> bool:
        """Whether a state enters another layer than the one it came from."""
        return self.links is not None and any(source != destination for source, destination in self.links)

    @property
    def carriers(self) -> tuple[int, ...] | None:
        """The layers that a state enters; None: all."""
        return self.layers if self.links is None else tuple(destination for _, destination in self.links)

    @property
    def linear_carry(self) -> bool:
        """Whether s enters the layer's output linearly with a known factor, so that a scan can carry it exactly."""
        scanned = self.propagate == "scan" and self.site == "ffn" and not self.is_linked
        return self.state == "block" and self.norm == "none" and scanned
