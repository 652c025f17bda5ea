"""The mechanism once more, as plainly as it can be said: one token, one iteration, one layer at a time.

Written from the formulas and sharing no code with the package. With `xp=numpy` it is the oracle of values in float64;
with `xp=torch` it can be differentiated, and is then backpropagation through time by another library.
"""

import numpy as np


def rms(xp, x, eps=1e-6):
    return xp.sqrt(xp.mean(x * x, axis=-1, keepdims=True) + eps)


def rotation(xp, position, backbone, kind):
    """Cosines and sines for one position."""
    theta = backbone.rope_theta_global if kind == "global" else backbone.rope_theta_local
    factor = backbone.rope_scale_global if kind == "global" else 1.0
    size = (kind == "global" and backbone.global_head_dim) or backbone.head_dim
    turns = theta ** -(np.arange(0, size, 2) / size)
    if kind == "global" and backbone.rope_angles_global is not None:
        turns = np.where(np.arange(size // 2) < backbone.rope_angles_global, turns, 0.0)
    if backbone.rope_llama3 is None:
        turns = turns / factor
    else:
        low, high, original = backbone.rope_llama3
        kept = np.clip((original * turns / (2 * np.pi) - low) / (high - low), 0.0, 1.0)  # turns within the original
        turns = kept * turns + (1.0 - kept) * turns / factor
    angle = position * turns
    return xp.asarray(np.cos(angle)), xp.asarray(np.sin(angle))


def rotate(xp, x, table):
    cos, sin = table
    half = x.shape[-1] // 2
    first, second = x[..., :half], x[..., half:]
    return xp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def hidden(config, params, tokens, depths=1, bos_id=None, xp=np, memories=None, outputs=None):
    """Normed final hidden states [T, D] of one document; `depths` is the number of iterations, one for all or a list.

    Dicts given as `memories` and `outputs` take up what each layer holds after each iteration, and what it hands to the
    layer above, under (layer, position, iteration).
    """
    backbone, stream = config.backbone, config.stream
    depths = [depths] * len(tokens) if isinstance(depths, int) else depths
    layers, adapter, blend = params["base"]["layers"], params["adapter"], params["blend"]
    kinds = backbone.layer_types
    cache = [{} for _ in range(backbone.num_layers)]  # per layer: position -> (k, v)
    memory = [None] * backbone.num_layers

    def stack(name, layer):
        """The name of the stack that a layer's parameters are in, and its place there."""
        if backbone.global_head_dim is None:
            return name, layer
        return ("global_" if kinds[layer] == "global" else "") + name, kinds[:layer].count(kinds[layer])

    def linear(name, layer, x):
        name, layer = stack(name, layer)
        y = x @ layers[name]["kernel"][layer]
        if "bias" in layers[name]:
            y = y + layers[name]["bias"][layer]
        if name in adapter:
            y = y + config.adapter.scale * (x @ adapter[name]["lora_a"][layer] @ adapter[name]["lora_b"][layer])
        return y

    def norm(name, layer, x):
        name, layer = stack(name, layer)
        if name not in layers:
            return x
        return x / rms(xp, x, backbone.norm_eps) * (backbone.norm_offset + layers[name]["scale"][layer])

    def alpha_of(layer, t):
        risen = min(t / stream.ramp, 1.0) if stream.ramp else 1.0
        if stream.alpha is not None:
            return risen * stream.alpha
        theta = blend["theta"][0 if stream.granularity == "scalar" else layer]
        if stream.gate == "tanh":
            return risen * xp.tanh(theta)
        lo, hi = stream.alpha_range
        return risen * (lo + (hi - lo) / (1.0 + xp.exp(-theta)))

    def source_of(layer):
        """The layer whose state enters this one; None where none does."""
        if stream.links is not None:
            return {into: out for out, into in stream.links}.get(layer)
        return layer if stream.layers is None or layer in stream.layers else None

    def mixed_with(layer, t, h, s):
        gain = blend["gain"][layer] if stream.learn_gain else stream.gain
        normed = s if stream.norm == "none" else s / rms(xp, s)
        normed = normed * rms(xp, h, 0.0) if stream.norm == "match" else normed
        return h + alpha_of(layer, t) * (gain * normed - h)

    def attention(layer, t, x, write):
        kind = kinds[layer]
        table = rotation(xp, t, backbone, kind)
        y = norm("pre_attn_norm", layer, x)
        q = linear("q", layer, y).reshape(backbone.num_heads, -1)
        heads = (kind == "global" and backbone.global_num_kv_heads) or backbone.num_kv_heads
        group = backbone.num_heads // heads
        k = linear("k", layer, y).reshape(heads, -1)
        own = not backbone.values_from_keys or (backbone.global_head_dim is not None and kind == "local")
        v = linear("v", layer, y).reshape(heads, -1) if own else k
        if backbone.v_norm:
            v = v / rms(xp, v, backbone.norm_eps)
        q, k = rotate(xp, norm("q_norm", layer, q), table), rotate(xp, norm("k_norm", layer, k), table)
        if write:
            cache[layer][t] = (k, v)
        first = max(0, t - backbone.window + 1) if kind == "local" else 0
        if backbone.attention_window is not None:
            first = max(first, t - backbone.attention_window[layer] + 1)
        keys = xp.stack([cache[layer][p][0] for p in range(first, t + 1)])  # [S, K, H]
        values = xp.stack([cache[layer][p][1] for p in range(first, t + 1)])
        out = []
        for head in range(backbone.num_heads):
            score = keys[:, head // group] @ q[head] / np.sqrt(backbone.query_pre_attn_scalar)
            weight = xp.exp(score - score.max())
            out.append(weight / weight.sum() @ values[:, head // group])
        return norm("post_attn_norm", layer, linear("o", layer, xp.concatenate(out)))

    def feed_forward(layer, x):
        y = norm("pre_ffn_norm", layer, x)
        gate = linear("gate", layer, y)
        if backbone.activation == "silu":
            gate = gate / (1.0 + xp.exp(-gate))
        else:
            gate = 0.5 * gate * (1.0 + xp.tanh(np.sqrt(2.0 / np.pi) * (gate + 0.044715 * gate**3)))
        return norm("post_ffn_norm", layer, linear("down", layer, gate * linear("up", layer, y)))

    def one_iteration(t, i):
        x = params["base"]["embed"]["embedding"][tokens[t]]
        x = x * np.sqrt(backbone.d_model) if backbone.scale_embedding else x
        if i and stream is not None and stream.iteration_embedding:
            x = x + blend["iteration"][min(i, stream.iteration_embedding - 1) - 1]
        before = list(memory)  # what every layer held before this iteration
        reads = stream is not None and stream.timing in (("both", "next") if i == 0 else ("both", "same"))
        for layer in range(backbone.num_layers):
            h = x + attention(layer, t, x, write=i == 0 or stream is None or stream.kv == "overwrite")
            name, place = stack("layer_scalar", layer)
            scalar = layers[name]["scale"][place] if backbone.layer_scalar else 1.0
            if stream is None:
                x = (h + feed_forward(layer, h)) * scalar
                keep(outputs, (layer, t, i), x)
                continue
            source = source_of(layer)
            s = before[source] if source is not None and reads else None
            if source is not None and reads and s is None and t == 0 and i == 0 and stream.initial in ("zero", "own"):
                s = x / rms(xp, x) if stream.initial == "own" else 0.0 * x
            mixed = h if s is None or stream.site == "output" else mixed_with(layer, t, h, s)
            f = feed_forward(layer, mixed)
            o = (mixed + f) * scalar
            o = o if s is None or stream.site == "ffn" else mixed_with(layer, t, o, s)
            u = f if stream.state == "ffn" else o
            memory[layer] = u if s is None or not stream.decay else stream.decay * s + (1.0 - stream.decay) * u
            keep(memories, (layer, t, i), memory[layer])
            keep(outputs, (layer, t, i), o)
            if stream.initial == "skip_bos" and tokens[t] == bos_id:
                memory[layer] = None
            x = o
        return x

    rows = []
    for t in range(len(tokens)):
        passes = [one_iteration(t, i) for i in range(depths[t])]
        x = passes[0 if stream is not None and stream.readout == "first" else -1]
        scale = backbone.norm_offset + params["base"]["final_norm"]["scale"]
        rows.append(x / rms(xp, x, backbone.norm_eps) * scale)
    return xp.stack(rows)


def keep(taken, key, value):
    if taken is not None:
        taken[key] = value


def logits(config, params, tokens, depths=1, bos_id=None, xp=np, outputs=None):
    """Logits [T, V], as `hidden`."""
    head = params["base"]["embed" if config.backbone.tied_head else "head"]["embedding"]
    found = hidden(config, params, tokens, depths, bos_id, xp, outputs=outputs) @ head.T
    cap = config.backbone.logit_cap
    return found if cap is None else cap * xp.tanh(found / cap)
