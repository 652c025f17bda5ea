"""What configs of State Stream Transformers in PyTorch add to their backbone's: options under the key "sst".

    "sst": {"format": "sst_jax.sst", "version": 1, "stream": {...}, "adapter": {...} or null, "forward": "exact"}

`stream` holds the fields of `Stream` below, `adapter` LoRA factors kept apart from the weights, and `forward` what a
call of the model runs unless it is told (see `modeling_sst.py`). Where "attention_window" stands there too, [layers],
each layer sees so many positions at most, its own included.
"""

import dataclasses

from transformers.utils.versions import require_version

require_version("transformers>=5.20")  # the layers that the modelling files call have these arguments since then

FORMAT, VERSION = "sst_jax.sst", 1
FORWARDS = ("plain", "two_pass", "k_pass", "local", "exact")

CHOICES = {
    "state": ("ffn", "block"),
    "norm": ("none", "rms", "match"),
    "granularity": ("dimension", "layer", "scalar"),
    "initial": ("none", "zero", "own", "skip_bos"),
    "propagate": ("scan", "shift"),
    "dtype": ("float32", "bfloat16"),
    "prompt": ("last", "none", "all"),
    "kv": ("overwrite", "first"),
    "prefill": ("sweeps", "sequential"),
    "gate": ("range", "tanh"),
    "timing": ("both", "next", "same"),
    "site": ("ffn", "output"),
    "readout": ("last", "first"),
}


@dataclasses.dataclass(frozen=True)
class Stream:
    """The state stream: what a layer's state is, and how it is blended in, h' = h + alpha * (gain * N(s) - h).

    state        "ffn": the feed-forward block's output f. "block": the layer's output o.
    norm         N: "none", "rms" (unit RMS), "match" (s rescaled to h's RMS).
    alpha        None: learned within alpha_range, lo + (hi - lo) * sigmoid(theta). A number: fixed there.
    alpha_init   where a learned alpha began.
    alpha_warmup optimizer steps over which alpha rose from lo in training; `StreamParameters.warmth` does it here.
    granularity  one alpha a layer and "dimension", one a "layer", or one "scalar".
    gain         factor on N(s); learn_gain: one learned factor a layer.
    decay        s_t = decay * s_{t-1} + (1 - decay) * u_t.
    initial      at a document's first position: "none" (no blend), "zero", "own" (RMSNorm of the layer's input),
                 "skip_bos" (as "none", and a BOS leaves no state either).
    propagate    in forwards with several passes, "scan" carries a block state's linear part exactly, "shift" does not.
    dtype        in which states are kept.
    pass1_grad   whether gradients flow through the states of earlier passes.
    prompt       prompt positions that get the depth asked of `generate`: the "last" one, "none", "all".
    kv           at iteration i > 1 keys and values are written anew ("overwrite") or kept from iteration 1 ("first").
    layers       which layers carry a state; None is all.
    prefill      how a prompt's states are solved for: by parallel "sweeps" inside each layer until they move by less
                 than sweep_tolerance (at most sweep_cap of them, else one by one), or "sequential".
    gate         a learned alpha is "range" (as above) or "tanh": tanh(theta).
    ramp         alpha is scaled by min(position / ramp, 1); 0: not at all.
    links        None, or pairs (source, destination) of layers: the state that the source left one step earlier enters
                 the destination, and no other layer is blended.
    timing       iterations that read a state: "both", "next" (the first alone), "same" (later ones alone).
    site         where it is blended in: "ffn" (before the feed-forward block) or "output" (what leaves the layer).
    readout      the iteration that logits are of, "last" or "first".
    iteration_embedding  how many iterations are told apart by a vector that is added to the embedding (none at the
                 first, the last one's beyond); 0: none are.
    """

    state: str = "ffn"
    norm: str = "none"
    alpha: float | None = None
    alpha_range: tuple = (0.015, 0.10)
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
    prompt: str = "last"
    kv: str = "overwrite"
    layers: tuple | None = None
    prefill: str = "sweeps"
    sweep_tolerance: float = 1e-6
    sweep_cap: int = 12
    gate: str = "range"
    ramp: float = 0.0
    links: tuple | None = None
    timing: str = "both"
    site: str = "ffn"
    readout: str = "last"
    iteration_embedding: int = 0

    def __post_init__(self):
        for field, allowed in CHOICES.items():
            if getattr(self, field) not in allowed:
                raise ValueError(f"sst.stream.{field}={getattr(self, field)!r} is not one of {', '.join(allowed)}")

    @property
    def linear_carry(self):
        """Whether s enters the layer's output linearly with a known factor, so that a scan can carry it exactly."""
        scanned = self.propagate == "scan" and self.site == "ffn" and not self.is_linked
        return self.state == "block" and self.norm == "none" and scanned

    @property
    def is_linked(self):
        """Whether a state enters another layer than the one it came from."""
        return self.links is not None and any(source != destination for source, destination in self.links)

    def source_of(self, layer):
        """The layer whose state enters this one; None: none does."""
        if self.links is not None:
            return {destination: source for source, destination in self.links}.get(layer)
        return layer if self.layers is None or layer in self.layers else None

    def reads(self, iteration):
        """Whether a state enters an iteration, 0 or a later one."""
        return self.timing != ("next" if iteration else "same")

    def carried_by(self, layer):
        """Whether a layer has a state that anything comes of."""
        return self.alpha != 0.0 and self.source_of(layer) is not None


class SSTConfigMixin:
    """Mixin before a backbone's config, which declares `model_type` and `sst`."""

    @property
    def stream(self):
        """The stream's options. Raises ValueError on a version or an option that this file does not know."""
        found = self.sst or {}
        if found.get("format") != FORMAT or found.get("version") != VERSION:
            raise ValueError(
                f"config.json: sst has format {found.get('format')!r} and version {found.get('version')!r}; this file "
                f"reads {FORMAT!r} version {VERSION}: use the modelling files that the export came with"
            )
        known = {field.name for field in dataclasses.fields(Stream)}
        unknown = sorted(set(found["stream"]) - known)
        if unknown:
            raise ValueError(f"config.json: sst.stream has the unknown option {', '.join(unknown)}")
        return Stream(**found["stream"])
