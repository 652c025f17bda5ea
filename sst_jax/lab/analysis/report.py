"""One page that holds everything it shows: no script, no address, nothing to fetch."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from sst_jax.inference.halting_probe import Probe
from sst_jax.inference.model import Model
from sst_jax.lab.analysis import figures
from sst_jax.lab.analysis.findings import AnalysisResult, number, summary
from sst_jax.types import Json

STYLE = """
:root { color-scheme: light dark; --line: #8884; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 0 auto; padding: 1rem; }
p, h1, pre, figure { max-width: 46rem; }
h1 { font-size: 1.5rem; line-height: 1.2; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
figure { margin: 0; } img { display: block; max-width: 100%; height: auto; background: white; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: 0.9rem; }
td, th { padding: 0.2rem 0.7rem 0.2rem 0; border-bottom: 1px solid var(--line); text-align: left; }
td { white-space: nowrap; vertical-align: top; } th { vertical-align: bottom; max-width: 9rem; }
.text td { white-space: pre-wrap; overflow-wrap: anywhere; min-width: 9rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; } code { overflow-wrap: anywhere; }
"""

PREAMBLE = """
A transformer with a state stream keeps, in every layer, the state that this layer computed at the step before, and
blends a little of it into the next step. It can therefore run several times at one and the same position: an
<em>iteration</em>. Most of the time that changes little. A <em>basin shift</em> would be a position where the hidden
state, a layer's vector of numbers, lands far from where it was. This page looks for such positions, and says so where
there are none.
"""


def write(out: Path, found: AnalysisResult, model: Model, probe: Probe | None = None) -> Path:
    """Write out/report.html and out/figures/*.png; return the page."""
    page = out / "report.html"
    page.write_text(render(out, found, model, probe), encoding="utf-8")
    return page


def render(out: Path, found: AnalysisResult, model: Model, probe: Probe | None) -> str:
    result = found.result
    name = Path(model.provenance.run or model.provenance.path or "a model").name
    title = f"Inside {name}: {' to '.join(str(result['by_depth'][end]['depth']) for end in (0, -1))} iterations"
    body = [f"<h1>{escape(title)}</h1>", f"<p>{PREAMBLE}</p>", f"<pre>{escape(summary(result))}</pre>"]
    if result.get("continuations"):
        body += ["<h2>The same prompts at both depths</h2>", side_by_side(result)]
    for drawn in figures.draw(found):
        body += shown(drawn, out)
        if drawn.name == "depths":
            body += [by_depth(result), "<h2>Before and after</h2>", *examples(result), "<h2>Which comes first?</h2>"]
            body += [events(result), "<h2>The tokens at a shift</h2>", at_shifts(result)]
    if probe is not None:
        body += of_probe(probe, out)
    ran: list[tuple[str, str]] = [(key, str(result[key])) for key in ("command", "date", "version") if key in result]
    ran += [(key, str(getattr(model.provenance, key))) for key in FACTS]
    body += ["<h2>What was run</h2>", table(("", ""), ran, "wide text")]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<title>{escape(title)}</title>\n<link rel="icon" href="data:,">\n<style>{STYLE}</style>\n</head>\n<body>\n'
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


FACTS = ("kind", "path", "digest", "run", "step", "dtype")


def shown(drawn: figures.CaptionedFigure, out: Path) -> list[str]:
    """Return the HTML of a figure with its heading and caption; the PNG is also written next to the page."""
    file = figures.save(drawn, out / "figures")
    data = base64.b64encode(file.read_bytes()).decode()
    alt = escape(drawn.title, quote=True)
    return [
        f"<h2>{escape(drawn.title)}</h2>",
        f'<figure><img alt="{alt}" src="data:image/png;base64,{data}">'
        f"<figcaption>{escape(drawn.says)}</figcaption></figure>",
    ]


def table(head: Sequence[str], rows: Iterable[Sequence[str]], classes: str = "wide") -> str:
    """Return an HTML table that scrolls in its own box when it is wider than the page; "wide text": its cells wrap."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    lines = ("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="{classes}"><table><tr>{top}</tr>{"".join(lines)}</table></div>'


def side_by_side(result: Json) -> str:
    """Return the HTML of what follows the first prompts at the first depth and at the last."""
    depths = [f"depth {each['depth']}" for each in result["continuations"][0]["answers"]]
    rows = [(each["prompt"], *(answer["text"] for answer in each["answers"])) for each in result["continuations"]]
    return table(("prompt", *depths), rows, "wide text")


def by_depth(result: Json) -> str:
    rows = [
        (
            str(each["depth"]),
            number(each["moved"], ".2e"),
            f"{each['lowest_overlap']:.4f}",
            number(each["changed"], ".1%"),
            number(each["replaced"], ".1f"),
        )
        for each in result["by_depth"]
    ]
    head = ("depth", "mean cosine distance", "lowest cosine similarity", "other top-1 token", "of the top 100 replaced")
    return table(head, rows)


def examples(result: Json) -> list[str]:
    found = ["<p>The positions that moved most, one a text: the top next tokens at the first and last depth.</p>"]
    for each in result["examples"]:
        rows = [
            tuple(f"{side['token']!r} {side['share']:.0%}" for side in pair)
            for pair in zip(each["before"], each["after"], strict=True)
        ]
        where = (
            f"{each['id']}, position {each['position']}, cosine similarity {each['overlap']:.4f}: … {each['context']}"
        )
        found += [f"<p><code>{escape(where)}</code></p>", table(("before", "after"), rows)]
    return found


def events(result: Json) -> str:
    """Return the HTML of the counts of each order of events, with those expected by chance."""
    found = result["order_of_events"]
    if found["depths"] < 3:
        return "<p>With two depths both can only fall together: give at least three to see which comes first.</p>"
    names = [name.replace("_", " ") for name in found["counts"]]
    rows = [
        ("observed", *map(str, found["counts"].values())),
        ("by chance", *(f"{value:.1f}" for value in found["by_chance"].values())),
    ]
    return (
        "<p>Counts of positions by what happened at the smaller depth: the state moved as "
        f"far as {escape(result['shifted_are'])}, or another top-1 token. By chance: with the two unrelated. The state "
        f"leads by {found['lead']} positions; p = {found['p']:.3g}.</p>" + table(("", *names), rows)
    )


def at_shifts(result: Json) -> str:
    rows = []
    for name, found in result["tokens"].items():
        ranks = found["winner_rank"]
        rows.append(
            (
                result["shifted_are"] if name == "shifted" else "the others",
                str(found["positions"]),
                number(found["changed"], ".1%"),
                number(found["replaced"], ".1f"),
                f"{ranks['median']:.0f}, at most {ranks['largest']}" if ranks else "–",
            )
        )
    zero = result["position_zero"]
    rows.append(("first position of a text", "", number(zero["changed"]["first"], ".1%"), "", ""))
    head = ("positions", "how many", "other top-1 token", "of the top 100 replaced", "its rank before (median)")
    return table(head, rows)


def of_probe(probe: Probe, out: Path) -> list[str]:
    """Return the HTML of a probe's recorded scores."""
    scores = probe.facts["scores"]
    rows = [
        (policy, f"{each['right']} of {each['of']}", str(each["broken"]), str(each["mended"]), f"{each['depth']:.2f}")
        for policy, each in scores["routing"].items()
    ]
    harm = number(scores["harm"], ".1%") if scores["harm"] else "nothing, as there are none"
    return [
        *shown(figures.roc(scores["roc"], scores["auc"]["value"]), out),
        f"<p>{escape(scores['summary'])}</p>",
        table(("policy", "correct", "regressions", "fixes", "mean depth"), rows),
        f"<p>Of the answers that were correct at the first depth, routing makes {harm} wrong (regressions).</p>",
    ]
