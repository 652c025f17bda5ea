"""What a stream gives back of what a short window takes: language models from scratch, from one command.

    python benchmarks/short_memory.py --data DIR            DIR holds GSM8K's train.jsonl and test.jsonl
    python benchmarks/short_memory.py --data DIR --only stream,plain --seeds 0       tables of some arms and seeds

The protocol file says data, model, arms and comparisons, and was written before any outcome; its SHA-256 stands in
every result. Whatever the folder holds is not computed again, and several processes may share one folder: each takes
runs that no other has. Seeds go one after the other, all arms of a seed before the next one.
"""

from __future__ import annotations

import fcntl
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from sst_jax.console.command import Parser, run, write_json
from sst_jax.errors import InputError
from sst_jax.files import read_json

PROTOCOL = Path(__file__).parent / "protocols" / "short-memory.json"


def parser() -> Parser:
    parser = Parser(prog="python benchmarks/short_memory.py", description=__doc__)
    add = parser.add_argument
    add("--data", required=True, metavar="DIR", help="folder with GSM8K's train.jsonl and test.jsonl")
    add("--protocol", default=str(PROTOCOL), metavar="FILE", help="default: %(default)s")
    add("--workdir", default="runs/short-memory", metavar="DIR", help="default: %(default)s")
    add("--only", metavar="A,B", help="train and measure these arms alone (default: all of the protocol's)")
    add("--seeds", metavar="A,B", help="of the protocol's (default: all)")
    add("--json", metavar="FILE", help="write the result here too (always in DIR/result.json)")
    return parser


def main(argv: Sequence[str]) -> None:
    args = parser().parse_args(argv)
    from sst_jax.lab.studies import memory_tables, short_memory

    protocol, workdir = short_memory.read_protocol(Path(args.protocol)), Path(args.workdir)
    names = args.only.split(",") if args.only else list(protocol.arms)
    for name in names:
        if name not in protocol.arms:
            raise InputError(f"--only {name} is none of the arms {', '.join(protocol.arms)}")
    seeds = [int(seed) for seed in args.seeds.split(",")] if args.seeds else list(protocol.seeds)
    texts = short_memory.read_texts(protocol, Path(args.data))
    for name in names:
        backbone = short_memory.model_config(protocol, name).backbone
        reach = "everything" if backbone.reach is None else f"{backbone.reach} positions back"
        print(f"{name}: windows {backbone.windows}, attention reaches {reach}")
    for name, seed, folder in free_runs(workdir, names, seeds, protocol.sha256):
        if not (folder / "training.json").is_file():
            short_memory.train(protocol, name, seed, texts, folder)
        if not (folder / "losses.npz").is_file():
            short_memory.measure(protocol, name, texts, folder)
    result = memory_tables.summarise(protocol, texts, workdir, seeds, names)
    if result is None:
        print("runs are still missing: the tables come from the process that finds all")
        return
    memory_tables.draw(result, workdir / "figure.png")
    write_json(workdir / "result.json", result)
    if args.json:
        write_json(args.json, result)
    print(memory_tables.report(result))


def free_runs(
    workdir: Path, names: Sequence[str], seeds: Sequence[int], sha256: str
) -> Iterator[tuple[str, int, Path]]:
    """Yield the runs that no other process has, each locked while it is worked on.

    Raises: InputError where a folder holds a run of another protocol.
    """
    for seed in seeds:
        for name in names:
            folder = workdir / f"{name}-{seed}"
            folder.mkdir(parents=True, exist_ok=True)
            facts = folder / "training.json"
            if facts.is_file() and read_json(facts)["protocol"] != sha256:
                raise InputError(f"{folder} holds a run of another protocol: choose another --workdir")
            with (folder / ".lock").open("w") as lock:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except OSError:
                    continue
                yield name, seed, folder


if __name__ == "__main__":
    sys.exit(run(main))
