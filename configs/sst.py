"""The paper's run: Gemma-3 with a state stream, LoRA on all linears, GSM8K, the base in NF4. 27B unless told otherwise.

    python -m sst_jax.plan    --config configs/sst.py --target rtx-pro-6000,rtx-4090
    python -m sst_jax.convert --from google/gemma-3-27b-pt --to models/27b-nf4 --quantize nf4 --text-only
    bash launch/gpu.sh        --config configs/sst.py --config.model.source=models/27b-nf4 --workdir runs/27b
    python -m sst_jax.train   --config configs/sst.py:size=1b --workdir runs/1b

Sizes: 270m, 1b, 4b, 12b, 27b. The weights are gated: accept Gemma's licence on the hub and run `hf auth login` first.

Planned with `sst_jax.plan` (jax 0.10.2; estimates, at 40% of the card's arithmetic and 80% of its bandwidth):

    size   rows x 1024   card           base   peak GiB   hours for all steps
    27b    1             RTX PRO 6000   nf4    21.4       2.0      (without the accumulator of micro-batches, 0.85 GiB)
    27b    4             RTX PRO 6000   nf4    27.1
    27b    4             RTX PRO 6000   bf16   62.1
    27b    1             RTX 4090       nf4    21.4       5.9      (the same; double quantisation: 21.0)
    12b    4             RTX 4090       nf4    16.1       2.6      (as 4b)
    4b     8             RTX 4090       nf4    10.6       0.8      (head dim 256: XLA's attention below Hopper)
    1b     16            RTX 4090       nf4     7.2       0.2
    270m   32            RTX 4090       nf4     7.9       0.05

Nothing here has been measured on an accelerator: neither the speed, nor cuDNN's sliding-window numerics on a card, nor
the score. Two passes are the published method; --config.stream.forward=exact trains by true backpropagation through
time, and is planned the same way. The control with the stream off is `configs/baseline.py`.
"""

from sst_jax.training.recipe import defaults

# (batch, micro-batches to an update): 32 rows to an update everywhere.
BATCH = {"270m": (32, 1), "1b": (16, 2), "4b": (8, 4), "12b": (4, 8), "27b": (1, 32)}


def get_config(argument="size=27b"):
    """`argument` is what follows the colon of --config: size=270m, 1b, 4b, 12b or 27b."""
    key, _, size = argument.partition("=")
    if key != "size" or size not in BATCH:
        raise ValueError(f"{argument!r} is not size= with one of {', '.join(BATCH)}")
    config = defaults()
    config.model.source = f"google/gemma-3-{size}-pt"
    config.model.dtype = "bfloat16"
    config.model.quantize = "nf4"

    config.adapter.rank = 32
    config.adapter.alpha = 32.0

    config.data.batch_size, config.optimizer.accumulate = BATCH[size]
    config.data.length = 1024

    # GSM8K's training split without what is held out is about 1.4 M tokens, 43 updates of 32 x 1024: three epochs.
    config.train.steps = 130 * config.optimizer.accumulate
    config.train.eval_every = config.train.steps // 2
    config.train.save_every = max(config.train.steps // 10, 1)
    return config
