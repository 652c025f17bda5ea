"""A pretrained model whose attention is made short: LoRA against LoRA and a stream, in nats a token on held-out texts.

    python benchmarks/memory_pretrained.py --data DIR --reach 16          DIR holds GSM8K's train.jsonl and test.jsonl
    python benchmarks/memory_pretrained.py --data DIR --reach 64 --seeds 1 --config.train.steps=200

The protocol file says base, windows of each reach, arms and comparisons; its SHA-256 stands in the result. Seeds go
one after the other, all arms of a seed before the next one, and whatever a folder holds is not computed again, so that
a study that was killed goes on. Controls are those of `sst_jax/lab/studies/arms.py`, matched to the arm `reference`.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sst_jax.console.command import Parser, run, write_json
from sst_jax.errors import InputError
from sst_jax.files import read_json

HERE = Path(__file__).parent
PROTOCOL = HERE / "protocols" / "short-memory-smollm2.json"
CONFIG = str(HERE.parent / "configs" / "tracking.py")
CONTROLS = ("baseline", "compute", "parameters")


def parser() -> Parser:
    parser = Parser(prog="python benchmarks/memory_pretrained.py", description=__doc__)
    add = parser.add_argument
    add("--data", required=True, metavar="DIR", help="folder with GSM8K's train.jsonl and test.jsonl")
    add("--reach", required=True, metavar="R", help="of the protocol's")
    add("--protocol", default=str(PROTOCOL), metavar="FILE", help="default: %(default)s")
    add("--workdir", metavar="DIR", help="default: runs/memory-pretrained-R")
    add("--arms", metavar="A,B", help="of the protocol's (default: all)")
    add("--seeds", type=int, metavar="N", help="default: the protocol's")
    parser.takes_overrides("--config.train.steps=200, in all arms")
    add("--json", metavar="FILE", help="write the result here too (always in DIR/result.json)")
    return parser


def main(argv: Sequence[str]) -> None:
    args, overrides = parser().parse_with_overrides(argv)
    from sst_jax.lab.evaluation import protocol as texts
    from sst_jax.lab.studies import arms, pairs
    from sst_jax.training import recipe
    from sst_jax.weights.loading import resolve

    file = Path(args.protocol)
    study, digest = read_json(file), hashlib.sha256(file.read_bytes()).hexdigest()
    names = args.arms.split(",") if args.arms else list(study["arms"])
    for flag, asked, known in (("--reach", [args.reach], study["reach"]), ("--arms", names, study["arms"])):
        for name in asked:
            if name not in known:
                raise InputError(f"{flag} {name} is none of {', '.join(known)} in {file}")
    workdir, seeds = Path(args.workdir or f"runs/memory-pretrained-{args.reach}"), args.seeds or study["seeds"]
    if seeds < 1:
        raise InputError(f"--seeds {args.seeds} must be at least 1")
    train, heldout = (write_texts(Path(args.data), split, study["words"], workdir) for split in ("train", "test"))
    window = f"--config.model.attention_window={tuple(study['reach'][args.reach])}"
    shared = [*study["overrides"], f"--config.data.path={train}", f"--config.data.heldout_path={heldout}", *overrides]
    short = [*shared, window]
    reference = recipe.resolve(recipe.read(CONFIG, [*short, *study["arms"][study["reference"]]]))
    baseline = recipe.resolve(recipe.read(CONFIG, [*short, arms.OFF]))
    backbone = resolve(reference.model.source).backbone
    print(reference.model_config(backbone).backbone.reach_text)
    found = arms.costs(reference, baseline, backbone)
    own = {
        name: [*(shared if name == "full" else short), *study["arms"][name]]
        + (arms.overrides(name, reference, found) if name in CONTROLS else [])
        for name in names
    }
    measured = texts.of_depths(str(heldout), [1], study["window"], study["windows"], 20)
    for seed in range(seeds):
        for name in names:
            folder = workdir / f"{name}-{seed}"
            pairs.train_one(CONFIG, [*own[name], f"--config.train.seed={seed}"], folder)
            evaluate(measured, folder, workdir / "evaluations" / folder.name)
        result = {
            "protocol": digest, "about": study["about"], "reach": args.reach, "overrides": list(overrides),
            "step_flops_ratio": found.ratio, "seeds": seed + 1, **compare_all(workdir, names, study, seed + 1),
        }  # fmt: skip
        write_json(workdir / "result.json", result)
        print(report(result))
    if args.json:
        write_json(args.json, result)


def write_texts(folder: Path, split: str, words: int, workdir: Path) -> Path:
    """Write GSM8K's problems with their solutions as rows {"text": ...} of so many words at most; return the file."""
    from sst_jax.lab.studies.short_memory import read_problems

    problems, target = read_problems(folder, split), workdir / f"{split}.jsonl"
    if not target.is_file():
        texts = [" ".join(f"{problem['question']} {problem['answer']}".split()[:words]) for problem in problems]
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return target


def evaluate(measured: Any, run: Path, out: Path) -> None:
    """Measure a run on the held-out texts, unless that has been done."""
    import gc

    from sst_jax.inference.model import load
    from sst_jax.lab.evaluation import text, text_summary

    if not (out / "result.json").is_file():
        text_summary.print_text(text.run(load(str(run)), measured, out))
        gc.collect()


def compare_all(workdir: Path, names: Sequence[str], study: dict[str, Any], seeds: int) -> dict[str, Any]:
    """Return every arm's nats a token, and every stream against every other arm that the protocol names."""
    from sst_jax.lab.evaluation import compare

    def side(name: str) -> list[Path]:
        return [workdir / "evaluations" / f"{name}-{seed}" for seed in range(seeds)]

    scores = {
        name: [read_json(path / "result.json")["policies"]["1"]["nats_per_token"]["value"] for path in side(name)]
        for name in names
    }
    against = {
        name: {
            other: compare(side(name), side(other), workdir / "comparisons" / f"{name}-{other}")["comparisons"][0]
            for other in study["against"] if other in names and other != name
        }
        for name in study["streams"] if name in names
    }  # fmt: skip
    spent = {name: [read_json(workdir / f"{name}-{seed}" / "result.json")["seconds"] for seed in range(seeds)]
             for name in names}  # fmt: skip
    return {"scores": scores, "against": against, "seconds": spent}


def report(result: dict[str, Any]) -> str:
    """Return the table in Markdown."""
    others = list(dict.fromkeys(other for found in result["against"].values() for other in found))
    lines = [
        f"\nreach {result['reach']}, {result['seeds']} seeds, protocol {result['protocol'][:12]}\n",
        "| arm | nats a token | by seed |" + "".join(f" minus `{other}` |" for other in others),
        "|---|---|---|" + "---|" * len(others),
    ]
    for name, scores in sorted(result["scores"].items(), key=lambda item: sum(item[1])):
        mine = result["against"].get(name, {})
        cells = "".join(f" {interval(mine[other])} |" if other in mine else " |" for other in others)
        seeds = " ".join(f"{value:.3f}" for value in scores)
        lines.append(f"| `{name}` | {sum(scores) / len(scores):.3f} | {seeds} |{cells}")
    return "\n".join(lines)


def interval(record: dict[str, Any]) -> str:
    """Return a difference with its interval over documents, and over seeds where there are several."""
    parts = [
        record.get("over_documents", record["over_items"]),
        *([record["over_seeds"]] if "over_seeds" in record else []),
    ]
    return f"{record['difference']:+.3f} " + " ".join(f"[{part['low']:+.3f}, {part['high']:+.3f}]" for part in parts)


if __name__ == "__main__":
    sys.exit(run(main))
