"""The state stream over any decoder of transformers: what a backbone's own modelling file needs to be given one.

A layer's state is what it computed in a step (`Stream.state` says which output); one step later it is blended into the
residual stream between attention and feed-forward. A step is one iteration of one position: with `depth` I a position
is I steps, whose queries see the keys of earlier positions as their last iteration left them, and the position's own of
the same step.

    forward   how the recurrence is solved                                                             cache
    exact     attention over all steps at once, then the feed-forward step after step, layer by layer  yes
    two_pass  the stack without states, then once more blended with its states, shifted by one step
    k_pass    the same with `passes` passes
    local     inside each layer: attention once, the feed-forward `passes` times, states shifted by one step in between
    plain     the backbone: no states                                                                  yes

Where `Stream.links` lead from layer to layer, `exact` runs the whole stack again and again with the states of the time
before until these stand still, of S steps S times at most; `local` is refused.

A backbone is four small classes over its own config, layer, model and causal LM: see a `modeling_sst_*.py` beside this.
"""

import dataclasses

import torch
from torch import nn
from torch.nn import functional as F
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

from .configuration_sst import FORWARDS

EPS = 1e-6
# What transformers calls a cache, as argument and in outputs: "past_key_values" before 5.24. Both are taken here.
CACHE = next(f.name for f in dataclasses.fields(BaseModelOutputWithPast) if f.name in ("cache", "past_key_values"))
LINEARS = {
    "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.o_proj",
    "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
}  # fmt: skip


# ------------------------------------------------------------------------------------------------- the mechanism


def unit_rms(x):
    """x divided by its root mean square over the last axis, in float32."""
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)


def safe_sqrt(x):
    """The root of x >= 0, with gradient 0 where x is 0: a padding row's embedding may be zero."""
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1.0).sqrt(), 0.0)


def blend(stream, alpha, gain, h, s, where):
    """h moved by alpha towards the state where there is one, h itself elsewhere; float32, [B, S, D]."""
    n = s.float() if stream.norm == "none" else unit_rms(s)
    if stream.norm == "match":
        n = n * safe_sqrt(h.square().mean(-1, keepdim=True))
    return torch.where(where, h + alpha * (gain * n - h), h)


def kept_as(stream, u):
    return u.bfloat16() if stream.dtype == "bfloat16" else u.float()


def initial(stream, x):
    """The state entering a document's first step, from the layer's input x. Read only where one begins."""
    return kept_as(stream, unit_rms(x) if stream.initial == "own" else torch.zeros_like(x))


def decay_state(stream, s, u, where):
    """Return the state after one step: a decaying average, or u alone where no state entered."""
    if stream.decay == 0.0:
        return u
    return torch.where(where, stream.decay * s.float() + (1.0 - stream.decay) * u.float(), u.float()).to(u.dtype)


def linear_scan(a, b):
    """m_t = a_t m_{t-1} + b_t over axis 1, from m = 0, by doubling."""
    reach = 1
    while reach < b.shape[1]:
        b = torch.cat([b[:, :reach], b[:, reach:] + a[:, reach:] * b[:, :-reach]], dim=1)
        a = torch.cat([a[:, :reach], a[:, reach:] * a[:, :-reach]], dim=1)
        reach *= 2
    return b


class StreamParameters(nn.Module):
    """theta [L, D] or [L, 1] or [1, 1] (where alpha is learned), gain [L, 1] (where it is) and the iterations' vectors,
    float32.

    `warmth` in [0, 1] scales a learned alpha up from the range's lower end; a trainer may raise it over alpha_warmup.
    """

    def __init__(self, config):
        super().__init__()
        stream, layers, self.warmth = config.stream, config.num_hidden_layers, 1.0
        if stream.alpha is None:
            lo, hi = stream.alpha_range
            share = torch.tensor((stream.alpha_init - lo) / (hi - lo) if stream.gate == "range" else 0.5)
            shape = {"dimension": (layers, config.hidden_size), "layer": (layers, 1), "scalar": (1, 1)}
            self.theta = nn.Parameter(torch.logit(share).repeat(shape[stream.granularity]))
        if stream.learn_gain:
            self.gain = nn.Parameter(torch.full((layers, 1), float(stream.gain)))
        if stream.iteration_embedding:
            self.iteration = nn.Parameter(torch.zeros(stream.iteration_embedding - 1, config.hidden_size))

    def marked(self, x, iteration):
        """x [B, S, D] with the vectors of the steps' iterations [S] added, counted from 0: that one has none."""
        if not hasattr(self, "iteration"):
            return x
        rows = F.pad(self.iteration, (0, 0, 1, 0))
        return x + rows[iteration.clamp(max=len(self.iteration))].to(x.dtype)

    def of(self, stream, layer, device):
        """alpha and gain of a layer."""
        alpha, gain = torch.full((1,), stream.alpha or 0.0), torch.full((1,), float(stream.gain))
        if stream.alpha is None:
            lo, hi = stream.alpha_range
            theta = self.theta[0 if stream.granularity == "scalar" else layer].float()
            if stream.gate == "tanh":
                alpha = torch.tanh(theta) * self.warmth
            else:
                alpha = lo + (hi - lo) * torch.sigmoid(theta)
                alpha = lo + (alpha - lo) * self.warmth
        if stream.learn_gain:
            gain = self.gain[layer].float()
        return alpha.to(device), gain.to(device)


class LoRALinear(nn.Linear):
    """y = W x + b + scale * B A x: a linear with its LoRA factors kept apart, which are float32 whatever W is."""

    def __init__(self, linear, rank, scale):
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None)
        self.lora_A = nn.Linear(linear.in_features, rank, bias=False)
        self.lora_B = nn.Linear(rank, linear.out_features, bias=False)
        self.scale = scale

    def forward(self, x):
        low = F.linear(F.linear(x, self.lora_A.weight.to(x.dtype)), self.lora_B.weight.to(x.dtype))
        return super().forward(x) + low * self.scale


# ------------------------------------------------------------------------------------- steps, masks and the cache


class StreamLayer(DynamicLayer):
    """One layer's keys and values (of a sliding layer its window's) and its state [B, D], which enters the next step.

    Of the steps of one call, attention sees the keys of all; those of `kept` stay, one a position, unless it is frozen.
    """

    def __init__(self, window):
        super().__init__()
        self.window, self.kept, self.state, self.is_frozen = window, None, None, False

    def update(self, key_states, value_states, *args, **kwargs):
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        seen = []
        for name, new in (("keys", key_states), ("values", value_states)):
            past = getattr(self, name)
            seen.append(torch.cat([past, new], dim=-2))
            if self.is_frozen:
                continue
            stay = torch.cat([past, new[:, :, self.kept]], dim=-2)
            setattr(self, name, stay if self.window is None else stay[:, :, max(stay.shape[-2] - self.window + 1, 0) :])
        return tuple(seen)

    def map_rows(self, change):
        for name in ("keys", "values", "state"):
            if getattr(self, name) is not None:
                setattr(self, name, change(getattr(self, name)))


class StreamCache(Cache):
    """Decoding state: `StreamLayer`s, the document number of every position so far [B, P] (0 on padding), and whether
    the layers have a state, `live` [B]. It cannot be cropped: a state does not say which was before it."""

    def __init__(self, config):
        super().__init__(layers=[StreamLayer(window) for window in layer_windows(config)])
        self.segments = self.live = None

    def get_seq_length(self, layer_idx=0):
        return 0 if self.segments is None else self.segments.shape[1]

    def map_rows(self, change):
        for layer in self.layers:
            layer.map_rows(change)
        if self.segments is not None:
            self.segments, self.live = change(self.segments), change(self.live)

    def reorder_cache(self, beam_idx):
        self.map_rows(lambda part: part.index_select(0, beam_idx.to(part.device)))

    def batch_repeat_interleave(self, repeats):
        self.map_rows(lambda part: part.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices):
        self.map_rows(lambda part: part[indices, ...])

    def reset(self):
        self.__dict__.update(segments=None, live=None)
        for layer in self.layers:
            layer.reset()
            layer.state = None

    def crop(self, *args, **kwargs):
        raise NotImplementedError("the states of a stream cannot be rolled back: begin again with a new cache")


def layer_kinds(config):
    """Every layer's attention, "sliding_attention" or "full_attention". A backbone that does not say has the first in
    all layers where it has a window, else the second."""
    one = "full_attention" if getattr(config, "sliding_window", None) is None else "sliding_attention"
    return getattr(config, "layer_types", None) or [one] * config.num_hidden_layers


def layer_windows(config):
    """How many positions every layer sees, its own included; None: all up to its own."""
    asked = (config.sst or {}).get("attention_window") or [None] * config.num_hidden_layers
    found = []
    for kind, window in zip(layer_kinds(config), asked, strict=True):
        both = [window, config.sliding_window if kind == "sliding_attention" else None]
        found.append(min((one for one in both if one is not None), default=None))
    return found


@dataclasses.dataclass
class Steps:
    """What all layers share in one call: T positions are S steps, `place` [S] the position of each.

    live, begins   where a state enters, bool [B, S, 1]: from the step before, or the document's initial one
    masks          additive, by the layers' window, [B, 1, S, past + S]
    rotations      cosines and sines of each kind of layer
    """

    forward: str
    passes: int
    stream: object
    place: torch.Tensor
    last: torch.Tensor  # [T], the last step of each position
    live: torch.Tensor
    begins: torch.Tensor
    masks: dict
    rotations: dict
    positions: torch.Tensor  # [B, S], of each step in its document
    ramp: torch.Tensor | None  # [B, S, 1], what alpha is scaled by
    solve: str  # how "exact" solves: "sweeps" or "sequential"

    @property
    def blends(self):
        return self.live | self.begins


def iterations(depth, positions):
    """The number of steps of each of T positions, from one number for all or one for each."""
    depths = [depth] * positions if isinstance(depth, int) else [int(value) for value in depth]
    if len(depths) != positions or min(depths) < 1:
        raise ValueError(f"depth={depth!r} must be a number >= 1, or one for each of the {positions} positions")
    return torch.tensor(depths)


def attention_mask_of(config, window, segments, place, seen, dtype):
    """The additive mask [B, 1, S, past + S] of the layers that see `window` positions, None: all before.

    `segments` [B, P + T] numbers the documents of past and present positions, `seen` are the steps [T] whose keys and
    values later positions see. With kv="first" they are also what a position's own later iterations see.
    """
    past = segments.shape[1] - len(seen)
    held = past if window is None else min(past, window - 1)
    at = past + place
    keys = torch.cat([torch.arange(past - held, past, device=place.device), at])
    steps = torch.arange(len(place), device=place.device)
    is_seen = F.pad(torch.isin(steps, seen), (held, 0), value=True)
    distance = at[:, None] - keys[None, :]
    if config.stream.kv == "first":
        visible = is_seen & (distance >= 0)
    else:
        visible = (is_seen & (distance > 0)) | F.pad(steps[:, None] == steps, (held, 0))
    if window is not None:
        visible = visible & (distance < window)
    visible = visible & (segments[:, at, None] == segments[:, None, keys])
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, torch.finfo(dtype).min)[
        :, None
    ]


class StreamModel:
    """Mixin before a transformers decoder: its layers become `layer_class`, and `forward` runs steps through them."""

    layer_class: type

    def __init__(self, config):
        super().__init__(config)
        adapter = config.sst.get("adapter")
        for index in range(config.num_hidden_layers):
            layer = self.layers[index] = self.layer_class(config, index)
            for name in adapter["targets"] if adapter else ():
                path, _, attribute = LINEARS[name].partition(".")
                owner = layer.get_submodule(path)
                if getattr(owner, attribute) is None:  # of a layer whose values are its keys
                    continue
                linear = LoRALinear(getattr(owner, attribute), adapter["rank"], adapter["alpha"] / adapter["rank"])
                setattr(owner, attribute, linear)
        self.stream = StreamParameters(config)
        self.post_init()

    def scale_embeddings(self, x):
        """What enters the first layer, of embeddings: a backbone that multiplies them in its own model does it here."""
        return x

    def rotations(self, x, position_ids):
        """Cosines and sines for each kind of layer."""
        return dict.fromkeys(layer_kinds(self.config), self.rotary_emb(x, position_ids))

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        use_cache=None,
        depth=1,
        forward=None,
        passes=2,
        cache=None,
        **kwargs,
    ):
        """Final hidden states [B, T, D] after each position's last iteration; arguments as for the causal LM."""
        config, stream = self.config, self.config.stream
        forward = forward or config.sst.get("forward") or "exact"
        cache = past_key_values if cache is None else cache
        self.check(forward, passes, depth, attention_mask, cache, input_ids, kwargs)
        x = self.scale_embeddings(self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds)
        if use_cache is None:  # without being asked, only where nothing is trained and the forward has one
            use_cache = config.use_cache and forward in ("plain", "exact") and not torch.is_grad_enabled()
        if (use_cache or cache is not None) and forward not in ("plain", "exact"):
            raise ValueError(f"forward={forward!r} has no cache: pass use_cache=False, or forward='exact'")
        if not isinstance(cache, StreamCache):  # none, or an empty one of another kind that a caller made by habit
            cache = StreamCache(config) if use_cache else None

        device, (rows, length) = x.device, x.shape[:2]
        counts = iterations(depth, length).to(device)
        place = torch.repeat_interleave(torch.arange(length, device=device), counts)
        last = counts.cumsum(0) - 1
        seen = last - counts + 1 if stream.kv == "first" else last
        segments, position_ids = self.documents(rows, length, attention_mask, position_ids, cache, device)
        live, begins, alive = self.entries(segments, length, place, last - counts + 1, input_ids, cache)
        windows = set(layer_windows(config))
        masks = {window: attention_mask_of(config, window, segments, place, seen, x.dtype) for window in windows}
        steps = Steps(
            forward,
            2 if forward == "two_pass" else passes,
            stream,
            place,
            last,
            live[..., None],
            begins[..., None],
            masks,
            self.rotations(x, position_ids[:, place]),
            position_ids[:, place],
            (position_ids[:, place, None] / stream.ramp).clamp(max=1.0) if stream.ramp else None,
            "sequential" if torch.is_grad_enabled() else stream.prefill,
        )
        if cache is not None:
            cache.segments, cache.live = segments, alive & (forward == "exact")  # plain leaves no states
            for layer in cache.layers:
                layer.kept = seen

        first = last - counts + 1
        x = self.stream.marked(x[:, place], torch.arange(len(place), device=device) - first[place])
        if stream.is_linked and stream.alpha != 0.0 and forward != "plain":
            out = self.linked(x, steps, cache)
        else:
            streams = (x,) * (steps.passes if forward in ("two_pass", "k_pass") else 1)
            for index, layer in enumerate(self.layers):
                alpha, gain = self.alpha_and_gain(index, steps)
                streams = layer(alpha, gain, *streams, steps=steps, past_key_values=cache)
            out = streams[-1]
        hidden = self.norm(out[:, last if stream.readout == "last" else last - counts + 1])
        return BaseModelOutputWithPast(last_hidden_state=hidden, **{CACHE: cache if use_cache else None})

    def alpha_and_gain(self, index, steps):
        """Alpha of a layer, at every step where it rises with the position, and gain."""
        alpha, gain = self.stream.of(steps.stream, index, steps.place.device)
        return (alpha if steps.ramp is None else alpha * steps.ramp), gain

    def linked(self, x, steps, cache):
        """The residual stream behind the last layer, where states enter other layers: by passes of the whole stack.

        The first pass blends no state but those in the cache; a further one has the states of the one before. Of S
        steps S passes are exact; where nothing is trained they end once the states change by sweep_tolerance at most.
        Keys and states of the last pass alone stay in the cache.
        """
        stream, held = steps.stream, [] if cache is None else cache.layers
        before = [layer.state for layer in held] or [None] * len(self.layers)
        passes, states = x.shape[1] if steps.forward == "exact" else steps.passes, None

        def size(part):
            return torch.where(steps.live, part.float(), 0.0).square().sum((1, 2)).sqrt()

        for number in range(passes, 0, -1):
            for layer in held:
                layer.is_frozen = number > 1
            out, new = self.linked_pass(x, steps, cache, before, states)
            if states is not None and steps.forward == "exact" and steps.solve == "sweeps" and number > 1:
                apart = [
                    (size(a.float() - b.float()) / size(a).clamp(min=1e-30)).max()
                    for a, b in zip(new, states, strict=True)
                ]
                states = new
                if max(apart) <= stream.sweep_tolerance:
                    for layer in held:
                        layer.is_frozen = False
                    out, new = self.linked_pass(x, steps, cache, before, states)
                    break
            states = new
        for layer, state in zip(held, new[: len(held)], strict=True):
            layer.state, layer.is_frozen = state[:, -1], False
        return out

    def linked_pass(self, x, steps, cache, before, states):
        """One pass of the stack: its residual stream, and the state after every step of every layer."""
        stream, found = steps.stream, []
        for index, layer in enumerate(self.layers):
            recurrence = _Recurrence(layer, *self.alpha_and_gain(index, steps), steps)
            source, s = stream.source_of(index), None
            if source is not None and states is not None:
                kept = states[source] if stream.pass1_grad else states[source].detach()
                s = recurrence.shift_right(x, kept, before[source])
            elif source is not None and steps.forward == "exact":
                s = recurrence.shift_right(x, torch.zeros_like(kept_as(stream, x)), before[source])
            x, state_out = recurrence.pass_once(x, layer.attend(x, steps, cache), s)
            found.append(state_out)
        return x, found

    def check(self, forward, passes, depth, attention_mask, cache, input_ids, rest):
        """Raises ValueError on arguments that do not fit together, or ask for what is not here."""
        if forward not in FORWARDS:
            raise ValueError(f"forward={forward!r} is not one of {', '.join(FORWARDS)}")
        if forward == "local" and self.config.stream.is_linked:
            raise ValueError("forward='local' refines states inside a layer, and links carry them between: use 'exact'")
        if passes < 1 or (forward == "two_pass" and passes != 2):
            raise ValueError(f"passes={passes} does not fit forward={forward!r}: k_pass and local take passes >= 1")
        if forward == "plain" and depth != 1:
            raise ValueError("forward='plain' has no state, so a second iteration would repeat the first: use depth=1")
        if attention_mask is not None and getattr(attention_mask, "ndim", 0) != 2:
            raise ValueError("attention_mask must be [B, T]: the stream needs to know where padding is")
        if cache is not None and cache.get_seq_length() and not isinstance(cache, StreamCache):
            raise ValueError(f"a {type(cache).__name__} holds no states: continue from a StreamCache")
        if self.config.stream.initial == "skip_bos" and input_ids is None:
            raise ValueError("initial='skip_bos' looks for BOS among the tokens: pass input_ids, not inputs_embeds")
        for name in ("output_attentions", "output_hidden_states"):
            if rest.get(name):
                raise ValueError(f"{name} is not supported: a position is several steps, and a layer several streams")

    def documents(self, rows, length, attention_mask, position_ids, cache, device):
        """(document number of every position so far [B, P + T], 0 on padding; position_ids [B, T]).

        A new document begins where position_ids go back to 0, so that packed rows keep their documents apart.
        """
        past = None if cache is None else cache.segments
        real = torch.ones(rows, length, dtype=torch.long, device=device)
        if attention_mask is not None:
            real = (attention_mask[:, -length:] != 0).long().to(device)
        if position_ids is None:
            before = 0 if past is None else (past > 0).sum(1, keepdim=True)
            position_ids = (before + real.cumsum(1) - 1).clamp(min=0)
        position_ids = position_ids.to(device).expand(rows, -1)
        before = 1 if past is None else past.amax(1, keepdim=True)
        segments = (before + (position_ids == 0).cumsum(1)) * real
        return segments if past is None else torch.cat([past, segments], dim=1), position_ids

    def entries(self, segments, length, place, first, input_ids, cache):
        """live and begins [B, S], see `Steps`, and whether the last position leaves a state, [B]."""
        real = segments[:, -length:] > 0
        leaves = real
        if self.config.stream.initial == "skip_bos":
            leaves = real & (input_ids != self.config.bos_token_id)
        enters = torch.zeros_like(real)
        if cache is not None and cache.live is not None:
            enters[:, 0] = cache.live
        enters[:, 1:] = leaves[:, :-1]
        before = F.pad(segments, (1, 0))[:, -length - 1 : -1]
        enters = enters & real & (segments[:, -length:] == before)
        is_first = torch.isin(torch.arange(len(place), device=place.device), first)
        first_reads, later_read = (self.config.stream.reads(iteration) for iteration in (0, 1))
        live = torch.where(is_first, enters[:, place] & first_reads, leaves[:, place] & later_read)
        begins = torch.zeros_like(live)
        if self.config.stream.initial in ("zero", "own") and first_reads:
            begins = is_first & (real & ~enters)[:, place]
        return live, begins, leaves[:, -1]


class StreamLayerMixin:
    """Mixin before a transformers decoder layer, cut in two halves: `attention_input` begins attention's and `rejoin`
    ends it, `feed_forward` is the other. Here are those of Llama's layout; a backbone with other norms has its own."""

    output_scale = 1.0  # what the layer's output is multiplied by

    def attention_input(self, x):
        """What attention reads of the layer's input."""
        return self.input_layernorm(x)

    def attention_arguments(self, steps):
        """What attention is given beside input, rotations, mask and cache."""
        return {}

    def rejoin(self, x, out):
        """h, float32: the residual stream after attention."""
        return x.float() + out.float()

    def feed_forward(self, mixed, dtype):
        """f, float32, of the residual stream that enters the feed-forward half; linears run in `dtype`."""
        return self.mlp(self.post_attention_layernorm(mixed).to(dtype)).float()

    def forward(self, alpha, gain, *streams, steps, past_key_values=None):
        """The streams [B, S, D] that leave the layer, from those that enter it."""
        index = self.self_attn.layer_idx
        if steps.forward == "plain" or not steps.stream.carried_by(index):
            return tuple(self.feed(self.attend(x, steps, past_key_values), x.dtype)[0] for x in streams)
        layer = _Recurrence(self, alpha, gain, steps)
        if steps.forward == "exact":
            (x,), state = streams, None if past_key_values is None else past_key_values.layers[index].state
            o, state = layer.exact(x, self.attend(x, steps, past_key_values), state)
            if past_key_values is not None:
                past_key_values.layers[index].state = state
            return (o,)
        if steps.forward == "local":
            (x,), state_out = streams, None
            h = self.attend(x, steps)
            for _ in range(steps.passes):
                o, state_out = layer.pass_once(x, h, layer.next_pass_states(x, state_out))
            return (o,)
        outputs, state_out, entered = [], None, None
        for x in streams:
            if x is not entered:  # all passes enter the first layer as the same embeddings
                h, entered = self.attend(x, steps), x
            o, state_out = layer.pass_once(x, h, layer.next_pass_states(x, state_out))
            outputs.append(o)
        return tuple(outputs)

    def attend(self, x, steps, cache=None):
        config, index = self.self_attn.config, self.self_attn.layer_idx
        out, _ = self.self_attn(
            hidden_states=self.attention_input(x),
            position_embeddings=steps.rotations[layer_kinds(config)[index]],
            attention_mask=steps.masks[layer_windows(config)[index]],
            **{CACHE: cache},
            **self.attention_arguments(steps),
        )
        return self.rejoin(x, out)

    def feed(self, mixed, dtype):
        """(o in `dtype`, f in float32)."""
        f = self.feed_forward(mixed, dtype)
        return self.leave(mixed + f).to(dtype), f

    def leave(self, o):
        """What leaves the layer, of the residual stream behind its halves."""
        return o * self.output_scale


class _Recurrence:
    """One layer's recurrence over the steps of a call: s is the state entering a step, state_out the one after it."""

    def __init__(self, layer, alpha, gain, steps):
        self.layer, self.alpha, self.gain, self.steps, self.stream = layer, alpha, gain, steps, steps.stream

    def state_update(self, o, f):
        return kept_as(self.stream, f if self.stream.state == "ffn" else o)

    def next_pass_states(self, x, state_out):
        """Return the states that a pass over x blends in, from those of the pass before; none in the first."""
        if state_out is None:
            return None
        return self.shift_right(x, state_out if self.stream.pass1_grad else state_out.detach())

    def pass_once(self, x, h, s, before=None):
        """Return o and the state after every step, [B, S, D], of all steps at once.

        `s` holds the states entering the steps, None: none enters any; `before` [B, D] is the one that enters the first
        step from an earlier call.
        """
        stream, steps = self.stream, self.steps
        o, f = self.feed(h, s, slice(None), x.dtype)
        u = self.state_update(o, f)
        if stream.decay == 0.0 and not stream.linear_carry:
            return o, u
        through, rest = torch.zeros_like(self.alpha), u.float()
        if stream.linear_carry:  # o = (1 - alpha) h + alpha gain s + f wherever a state is blended in, times the scale
            through, rest = self.alpha * self.gain, torch.where(steps.blends, (1.0 - self.alpha) * h, h) + f
            through, rest = through * self.layer.output_scale, rest * self.layer.output_scale
        a = (stream.decay + (1.0 - stream.decay) * through).expand_as(rest)
        b = torch.where(steps.blends, (1.0 - stream.decay) * rest, rest)
        b = b + torch.where(steps.begins, a * initial(stream, x).float(), 0.0)
        a = torch.where(steps.live, a, 0.0)
        if before is not None:
            b = torch.cat([b[:, :1] + a[:, :1] * before[:, None].float(), b[:, 1:]], dim=1)
        return o, linear_scan(a, b).to(u.dtype)

    def feed(self, h, s, at, dtype):
        """(o, f) of the steps `at`, with the states s that enter them blended in; None: none enters."""
        stream, where = self.stream, self.steps.blends[:, at]
        alpha = self.alpha if self.steps.ramp is None else self.alpha[:, at]
        if s is None:
            return self.layer.feed(h, dtype)
        if stream.site == "ffn":
            return self.layer.feed(blend(stream, alpha, self.gain, h, s, where), dtype)
        f = self.layer.feed_forward(h, dtype)
        return blend(stream, alpha, self.gain, self.layer.leave(h + f), s, where).to(dtype), f

    def shift_right(self, x, state_out, before=None):
        """Return the state entering every step: the one after the step before, or the initial state."""
        first = torch.zeros_like(state_out[:, 0]) if before is None else before
        return torch.where(
            self.steps.live, torch.cat([first[:, None], state_out[:, :-1]], dim=1), initial(self.stream, x)
        )

    def exact(self, x, h, before):
        """Return o [B, S, D] and the last state [B, D]: in parallel sweeps where they converge, else step by step."""
        stream, live = self.stream, self.steps.live
        if self.steps.solve == "sequential" or x.shape[1] <= 2:
            return self.scan_positions(x, h, before)

        def size(part):  # of each row, so that a short one is not lost beside a long one
            return torch.where(live, part.float(), 0.0).square().sum((1, 2)).sqrt()

        tolerance = max(stream.sweep_tolerance, torch.finfo(x.dtype).eps)  # nothing settles below its type's rounding
        o, state_out = self.pass_once(x, h, None, before)
        s = self.shift_right(x, state_out, before)
        for _ in range(stream.sweep_cap - 1):
            o, state_out = self.pass_once(x, h, s, before)
            entering = self.shift_right(x, state_out, before)
            change = (size(entering.float() - s.float()) / size(entering).clamp(min=1e-30)).max()
            if change <= tolerance:
                return o, state_out[:, -1]
            s = entering
        return self.scan_positions(x, h, before)

    def scan_positions(self, x, h, m):
        """Return what `exact` does, step by step."""
        stream, steps = self.stream, self.steps
        begin, outputs = initial(stream, x), []
        m = torch.zeros_like(begin[:, 0]) if m is None else m
        for step in range(x.shape[1]):
            at = slice(step, step + 1)
            s, where = torch.where(steps.live[:, at], m[:, None], begin[:, at]), steps.blends[:, at]
            o, f = self.feed(h[:, at], s, at, x.dtype)
            m = decay_state(stream, s, self.state_update(o, f), where)[:, 0]
            outputs.append(o)
        return torch.cat(outputs, dim=1), m


class StreamForCausalLM:
    """Mixin before a transformers causal LM: its decoder becomes `model_class`, and it takes depth and forward."""

    model_class: type
    _is_stateful = True  # transformers then refuses what would have to roll states back, such as assisted decoding
    _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = False  # steps need a mask of their own
    _can_compile_fullgraph = False
    _keep_in_fp32_modules_strict = ("stream", "lora_A", "lora_B")  # type of the adapter and the blend, always

    def __init__(self, config):
        super().__init__(config)
        self.model = self.model_class(config)
        self.post_init()

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        depth=1,
        forward=None,
        passes=2,
        cache=None,
        **kwargs,
    ):
        """Logits [B, T, V], with `labels` the loss, differentiable in every parameter.

        Args:
          attention_mask: [B, T] or [B, past + T], 0 on padding, on either side.
          position_ids: [B, T]; a document begins wherever they are 0.
          depth: iterations at every position, or one number for each of the T. (`generate` iterates at the positions
            it generates, and on the prompt as `stream.prompt` says.)
          forward: see the module's docstring; None is the config's sst["forward"], "exact".
          passes: of k_pass and local.
        """
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            depth=depth,
            forward=forward,
            passes=passes,
            **{CACHE: past_key_values if cache is None else cache},
            **kwargs,
        )

    def prepare_inputs_for_generation(
        self, input_ids, inputs_embeds=None, is_first_iteration=False, depth=1, use_cache=True, **kwargs
    ):
        if not isinstance(depth, int):
            raise ValueError(f"depth={depth!r}: generate takes one number for the whole batch")
        if depth > 1 and not use_cache:
            raise ValueError("generate at depth > 1 needs its cache: without one, prompt and answer look alike")
        inputs = super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, use_cache=use_cache, **kwargs
        )
        if is_first_iteration and depth > 1 and self.config.stream.prompt != "all":
            given = inputs.get("input_ids")
            prompt = (inputs["inputs_embeds"] if given is None else given).shape[1]
            depth = [1] * (prompt - 1) + [depth if self.config.stream.prompt == "last" else 1]
        return {**inputs, "depth": depth}

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, *args, **kwargs):
        for name, allowed in (("cache_implementation", (None, "dynamic")), ("prefill_chunk_size", (None,))):
            if getattr(generation_config, name, None) not in allowed:
                raise ValueError(f"{name}={getattr(generation_config, name)!r} is not supported: leave it out")
        if generation_config.use_cache is not False and model_kwargs.get(CACHE) is None:
            model_kwargs[CACHE] = StreamCache(self.config)
