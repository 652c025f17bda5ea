"""The paper's run: a state stream in a pretrained decoder, LoRA on all linears, GSM8K, the base in NF4. Gemma-3-27B
unless told otherwise.

    sst-jax plan    --config configs/sst.py --target rtx-pro-6000,rtx-4090
    sst-jax convert --from google/gemma-3-27b-pt --to models/27b-nf4 --quantize nf4 --text-only
    bash launch/gpu.sh        --config configs/sst.py --config.model.source=models/27b-nf4 --workdir runs/27b
    sst-jax train   --config configs/sst.py:size=1b --workdir runs/1b

Sizes are the keys of SIZES below. Gemma's and Llama's weights are gated: accept the licence on the hub and run
`hf auth login` first.

Planned with `sst-jax plan` (jax 0.10.2; estimates, at 40% of the card's arithmetic and 80% of its bandwidth):

    size   rows x 1024   card           base   peak GiB   hours for all steps
    27b    1             RTX PRO 6000   nf4    22.1       2.0      (21.2 without its accumulator of micro-batches,
    27b    4             RTX PRO 6000   nf4    27.0                 as these: --config.optimizer.accumulate=1)
    27b    4             RTX PRO 6000   bf16   62.0
    27b    4             RTX PRO 6000   nf4    22.9                (with --config.train.remat=offload)
    27b    32 x 256      RTX PRO 6000   nf4    25.3                (exact, --config.train.remat=memories; 10.5 s)
    27b    1             RTX 4090       nf4    22.1       5.9      (22.6 may be used)
    gemma-4-31b, 1       RTX PRO 6000   nf4    24.0       2.4      (--config.optimizer.accumulate=1; a step 2.1 s)
    gemma-4-31b, 1       RTX 5090       nf4    24.0       5.6      (the same; a step 4.8 s, of 31.8 GiB)
    gemma-4-31b, 16 x 256  RTX PRO 6000 nf4    26.6                (exact, with --config.train.remat=memories; 12.3 s)
    gemma-4-31b, 16 x 256  RTX 5090     nf4    26.6                (the same; 12.9 s)
    12b    4             RTX 4090       nf4    15.3       2.6      (as 4b)
    4b     8             RTX 4090       nf4     9.5       0.8      (head dim 256: attention by chunks)
    1b     16            RTX 4090       nf4     6.3       0.2
    270m   32            RTX 4090       nf4     6.5       0.05
    llama-3.1-8b, 4      RTX 4090       nf4    10.9       1.6
    smollm2-135m, 32     RTX 4090       nf4     4.0       0.04

Nothing here has been measured on an accelerator: neither the speed, nor cuDNN's sliding-window numerics on a card, nor
the score. Two passes are the published method; --config.stream.forward=exact trains by true backpropagation through
time, and is planned the same way; with --config.train.remat=memories it scans the positions three times, not four. The
control with the stream off is `configs/baseline.py`. For several devices, and TPU slices, see docs/scaling.md.
"""

from sst_jax.training.recipe import defaults

# (hub id, batch, micro-batches to an update): 32 rows to an update everywhere.
SIZES = {
    "270m": ("google/gemma-3-270m-pt", 32, 1), "1b": ("google/gemma-3-1b-pt", 16, 2),
    "4b": ("google/gemma-3-4b-pt", 8, 4), "12b": ("google/gemma-3-12b-pt", 4, 8),
    "27b": ("google/gemma-3-27b-pt", 1, 32),
    "gemma-4-12b": ("google/gemma-4-12B", 4, 8), "gemma-4-31b": ("google/gemma-4-31B", 1, 32),
    # The batches of Gemma's nearest size.
    "smollm2-135m": ("HuggingFaceTB/SmolLM2-135M-Instruct", 32, 1),
    "smollm2-360m": ("HuggingFaceTB/SmolLM2-360M-Instruct", 32, 1),
    "smollm2-1.7b": ("HuggingFaceTB/SmolLM2-1.7B-Instruct", 16, 2),
    "llama-3.2-1b": ("meta-llama/Llama-3.2-1B-Instruct", 16, 2),
    "llama-3.2-3b": ("meta-llama/Llama-3.2-3B-Instruct", 8, 4),
    "llama-3.1-8b": ("meta-llama/Llama-3.1-8B-Instruct", 4, 8),
    "llama-3.1-70b": ("meta-llama/Llama-3.1-70B-Instruct", 1, 32),
    "llama-3.3-70b": ("meta-llama/Llama-3.3-70B-Instruct", 1, 32),
    "qwen3-0.6b": ("Qwen/Qwen3-0.6B", 16, 2), "qwen3-1.7b": ("Qwen/Qwen3-1.7B", 16, 2),
    "qwen3-4b": ("Qwen/Qwen3-4B", 8, 4), "qwen3-8b": ("Qwen/Qwen3-8B", 4, 8),
    "qwen3-14b": ("Qwen/Qwen3-14B", 4, 8), "qwen3-32b": ("Qwen/Qwen3-32B", 1, 32),
    "qwen2.5-0.5b": ("Qwen/Qwen2.5-0.5B-Instruct", 16, 2), "qwen2.5-1.5b": ("Qwen/Qwen2.5-1.5B-Instruct", 16, 2),
    "qwen2.5-3b": ("Qwen/Qwen2.5-3B-Instruct", 8, 4), "qwen2.5-7b": ("Qwen/Qwen2.5-7B-Instruct", 4, 8),
    "qwen2.5-14b": ("Qwen/Qwen2.5-14B-Instruct", 4, 8), "qwen2.5-32b": ("Qwen/Qwen2.5-32B-Instruct", 1, 32),
    "qwen2.5-72b": ("Qwen/Qwen2.5-72B-Instruct", 1, 32),
    "mistral-7b-v0.1": ("mistralai/Mistral-7B-v0.1", 4, 8), "mistral-7b-v0.3": ("mistralai/Mistral-7B-v0.3", 4, 8),
    "ministral-8b": ("mistralai/Ministral-8B-Instruct-2410", 4, 8),
    "ministral-3-3b": ("mistralai/Ministral-3-3B-Base-2512", 8, 4),
    "ministral-3-8b": ("mistralai/Ministral-3-8B-Base-2512", 4, 8),
    "ministral-3-14b": ("mistralai/Ministral-3-14B-Base-2512", 4, 8),
    "mistral-nemo": ("mistralai/Mistral-Nemo-Instruct-2407", 4, 8),
    "mistral-small-24b": ("mistralai/Mistral-Small-24B-Instruct-2501", 1, 32),
    "smollm3-3b": ("HuggingFaceTB/SmolLM3-3B", 8, 4),
    "granite-3.3-2b": ("ibm-granite/granite-3.3-2b-instruct", 8, 4),
    "granite-3.3-8b": ("ibm-granite/granite-3.3-8b-instruct", 4, 8),
    "olmo-2-0425-1b": ("allenai/OLMo-2-0425-1B-Instruct", 16, 2),
    "olmo-2-1124-7b": ("allenai/OLMo-2-1124-7B-Instruct", 4, 8),
    "olmo-2-1124-13b": ("allenai/OLMo-2-1124-13B-Instruct", 4, 8),
    "olmo-2-0325-32b": ("allenai/OLMo-2-0325-32B-Instruct", 1, 32),
    "olmo-3-1025-7b": ("allenai/Olmo-3-1025-7B", 4, 8), "olmo-3-1125-32b": ("allenai/Olmo-3-1125-32B", 1, 32),
    "seed-oss-36b": ("ByteDance-Seed/Seed-OSS-36B-Instruct", 1, 32),
    "phi-3-mini-4k": ("microsoft/Phi-3-mini-4k-instruct", 8, 4),
    "phi-3-medium-4k": ("microsoft/Phi-3-medium-4k-instruct", 4, 8), "phi-4": ("microsoft/phi-4", 4, 8),
    "phi-4-mini": ("microsoft/Phi-4-mini-instruct", 8, 4),
}  # fmt: skip


def get_config(argument="size=27b"):
    """`argument` is what follows the colon of --config: size= with one of SIZES."""
    key, _, size = argument.partition("=")
    if key != "size" or size not in SIZES:
        raise ValueError(f"{argument!r} is not size= with one of {', '.join(SIZES)}")
    config = defaults()
    config.model.dtype = "bfloat16"
    config.model.quantize = "nf4"

    config.adapter.rank = 32
    config.adapter.alpha = 32.0

    config.model.source, config.data.batch_size, config.optimizer.accumulate = SIZES[size]
    config.data.length = 1024

    # GSM8K's training split without what is held out is about 1.4 M tokens, 43 updates of 32 x 1024: three epochs.
    config.train.steps = 130 * config.optimizer.accumulate
    config.train.eval_every = config.train.steps // 2
    config.train.save_every = max(config.train.steps // 10, 1)
    return config
