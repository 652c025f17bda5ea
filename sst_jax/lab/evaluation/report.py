"""What `evaluate` and `compare` print.

Against the first policy, a *regression* is an item whose answer was correct and no longer is, a *fix* one whose answer
was not and now is.
"""

from __future__ import annotations

from pathlib import Path

from sst_jax.console.progress import counted
from sst_jax.types import Json


def model_name(identity: Json) -> str:
    """Return a run's folder and step, or the path of what is not a run."""
    if identity.get("run") is None:
        return str(identity.get("path"))
    return f"{identity['run']}, step {identity['step']} (on {identity.get('path')})"


def print_evaluation(result: Json, out: Path) -> None:
    """Print the summary of an evaluation's result; `out` is its folder."""
    size = counted(result["items"], "item")
    print(f"{result['task']}, {size}, {result['format']} prompts, {model_name(result['model'])}")
    for policy, found in result["policies"].items():
        if result["measure"] == "loss":
            loss = found["nats_per_token"]
            low, high = ("-" if loss[end] is None else f"{loss[end]:.4f}" for end in ("low", "high"))
            print(
                f"depth {policy:<20} loss {loss['value']:.4f} [{low}, {high}] nats per token; "
                f"greedy exact match {found['greedy']['value']:.1%}"
            )
            if "rms" in found:
                print(f"{'':26} {scales_line(found['rms'])}")
            continue
        strict, flexible = found["strict"], found["flexible"]
        print(
            f"depth {policy:<20} accuracy {strict['value']:.1%} [{strict['low']:.1%}, {strict['high']:.1%}] strict, "
            f"{flexible['value']:.1%} flexible; unparsed {found['unparsed']['strict']}, truncated {found['truncated']}"
        )
        opinion = found["second_opinion"]
        apart = len(opinion["only_strict_says_right"]), len(opinion["only_second_says_right"])
        if opinion["asked"]:
            print(
                f"{'':26} {result['second_opinion_by']} agrees on {opinion['asked'] - sum(apart)} of "
                f"{opinion['asked']}; "
                f"of the others strict grading accepts {apart[0]} and rejects {apart[1]}"
            )
    for change in result.get("between_policies", []):
        print(
            f"depth {change['from']} -> {change['to']}: {change['broken']} regressions, {change['mended']} fixes, "
            f"p {change['p']:.3g}, Holm {change['p_holm']:.3g}"
        )
    if "oracle" in result:
        union, noise = result["oracle"]["union"], result["oracle"]["noise_control"]
        print(
            f"oracle, not a score: correct under any policy {union['value']:.1%}; redrawing as many answers at random "
            f"gives {noise['value']:.1%} [{noise['low']:.1%}, {noise['high']:.1%}]"
        )
    overlap = result["overlap"]
    shared = f"{len(overlap['same_question'])} test questions in training" if overlap["checked"] else overlap["reason"]
    print(f"train/test overlap: {shared}\noutcomes: {out}")


def scales_line(rms: dict[str, float]) -> str:
    """Return RMS in words, from the least layer and iteration to the largest; result.json has each."""
    parts = []
    for name, title in (("residual", "residual stream"), ("state", "states")):
        values = [value for key, value in rms.items() if key.startswith(f"rms/{name}/")]
        if values:
            parts.append(f"{title} {min(values):.3g} to {max(values):.3g}")
    return f"RMS by layer: {', '.join(parts)}"


def print_comparison(result: Json) -> None:
    """Print the table of a comparison."""
    loss, seeds = result["measure"] == "loss", len(result["A"])
    print(f"{result['task']}, {counted(result['items'], 'item')}" + f", {seeds} seeds" * (seeds > 1))
    for side in "AB":
        print(f"{side}: {', '.join(result[side])}")
    for found in result["settings_that_differ"]:
        print(f"settings differ: {found['key']} is {found['A']!r} in A and {found['B']!r} in B")
    unit, scale = ("", 1.0) if loss else ("%", 100.0)
    print(f"\n{'policy A':18}{'policy B':18}{'A':>10}{'B':>10}{'A - B':>10}  {'95% over items':24}", end="")
    print("items better in A" if loss else f"{'only A':>8}{'only B':>8}{'p':>10}{'Holm':>10}")
    for record in result["comparisons"]:
        means = []
        for side in "AB":
            scores = result["scores"][side][record[side]]
            means.append(sum(score["value"] for score in scores) / len(scores))
        row = f"{record['A']:18}{record['B']:18}"
        row += "".join(f"{value * scale:9.4g}{unit or ' '}" for value in (*means, record["difference"]))
        row += f"  {interval(record['over_items'], scale):24}"
        if loss:
            row += f"{record['items_better_in_A']} of {result['items']}"
        else:
            row += f"{record['only_A']:8}{record['only_B']:8}{record['p']:10.3g}{record['p_holm']:10.3g}"
        print(row)
        if "over_seeds" in record:
            each = ", ".join(f"{found['value'] * scale:.4g}" for found in record["each_seed"])
            print(f"{'':36}each seed {each}; 95% over seeds {interval(record['over_seeds'], scale)}")
    for side, found in result.get("oracles", {}).items():
        union, noise = found["union"], found["noise_control"]
        print(
            f"{side}: oracle over depths {', '.join(found['policies'])}, not a score: {union['value']:.1%}; redrawing "
            f"as many answers at random gives {noise['value']:.1%} [{noise['low']:.1%}, {noise['high']:.1%}]"
        )


def interval(found: Json, scale: float) -> str:
    """Return an interval as text; of a single item or seed there is none."""
    if found["low"] is None:
        return "-"
    return f"[{found['low'] * scale:.4g}, {found['high'] * scale:.4g}]"


def print_harness(results: dict[str, dict[str, Json]]) -> None:
    """Print the metrics of lm-evaluation-harness, by depth and task."""
    for depth, tasks in results.items():
        for task, metrics in tasks.items():
            shown = ", ".join(f"{name} {value:.4f}" for name, value in metrics.items() if isinstance(value, float))
            print(f"depth {depth:<6} {task}: {shown}")
