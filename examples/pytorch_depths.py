"""An exported State Stream Transformer in PyTorch: the same prompt at two iteration depths, and what depth changes.

    sst-jax export --from runs/quickstart --to out/sst --format sst
    python examples/pytorch_depths.py out/sst --question "Ann has 3 boxes of 4 pens. How many pens has she?"

Needs torch and transformers, and nothing of sst_jax: the folder brings its modelling files.
"""

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("folder", help="a folder that export --format sst wrote, or its hub id")
parser.add_argument("--prompt", default="Seven times eight is")
parser.add_argument(
    "--question", help="ask in the words that training puts around a question, as `sst-jax generate` does"
)
parser.add_argument("--depths", type=int, nargs="+", default=[1, 4], help="iterations at every generated position")
parser.add_argument("--max-new-tokens", type=int, default=48)
args = parser.parse_args()

tokenizer = AutoTokenizer.from_pretrained(args.folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(args.folder, trust_remote_code=True).eval()
asked = args.prompt if args.question is None else f"Question: {args.question.strip()}\nAnswer:"
inputs = tokenizer(asked, return_tensors="pt")
prompt = inputs["input_ids"]

answers = {}
for depth in args.depths:
    out = model.generate(**inputs, depth=depth, max_new_tokens=args.max_new_tokens, do_sample=False)
    answers[depth] = out[0, prompt.shape[1] :].tolist()
    print(f"depth {depth}: {tokenizer.decode(answers[depth], skip_special_tokens=True).strip()!r}")

first, last = args.depths[0], args.depths[-1]
pairs = zip(answers[first], answers[last], strict=False)
shared = next((number for number, (a, b) in enumerate(pairs) if a != b), None)
print(f"depths {first} and {last}: " + ("the same tokens" if shared is None else f"{shared} tokens in common"))

with torch.no_grad():  # the next token from the stream and from the plain backbone, which the same folder holds
    streaming, plain = (model(prompt, forward=name).logits[0, -1].log_softmax(-1) for name in ("exact", "plain"))
moved = (streaming.exp() * (streaming - plain)).sum()
print(f"the stream moves the distribution after the prompt by {moved:.3f} nats (KL) from the plain backbone's")
