"""Learning curves, and the figure of a study."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from sst_jax.console.figure import Axes, new_figure
from sst_jax.types import HostArrays, Json
from sst_jax.weights.checkpoint import read_metrics


def learning_curve(
    run: Path, title: str, scores: Mapping[int, tuple[int, int, float, float]] = MappingProxyType({})
) -> Path:
    """Draw a run folder's losses into figures/learning_curve.png, and its task scores beside them; return its path.

    Args:
        run: the folder.
        title: of the figure.
        scores: by step, questions answered right, questions, and the ends of the accuracy's interval.
    """
    lines = read_metrics(run)
    figure = new_figure(9.6 if scores else 7.2, 4.2)
    axes, *beside = figure.subplots(1, 2 if scores else 1, squeeze=False)[0]
    for name, label, style in (("loss", "training, each step", "-"), ("heldout_loss", "held out", "o-")):
        points = [(line["step"], line[name]) for line in lines if name in line]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, alpha=0.5 if name == "loss" else 1.0)
        if name == "heldout_loss" and len(points) > 1:
            best = min(points, key=lambda point: point[1])
            axes.plot(*best, "*", markersize=13, color="C3", label=f"lowest, {best[1]:.3f} at step {best[0]}")
    axes.set(xlabel="step", ylabel="loss on answer tokens (nats)")
    axes.legend()
    for right in beside:
        steps, found = list(scores), np.array(list(scores.values()))
        accuracy = found[:, 0] / found[:, 1]
        right.errorbar(steps, accuracy, np.abs(found[:, 2:].T - accuracy), fmt="o-", capsize=3)
        right.set(xlabel="step", ylabel=f"accuracy on {int(found[0, 1])} questions (95% intervals)", ylim=(0, 1.02))
    for ax in (axes, *beside):
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.grid(alpha=0.3)
    figure.suptitle(title)
    target = run / "figures" / "learning_curve.png"
    target.parent.mkdir(exist_ok=True)
    figure.savefig(target, dpi=150)
    return target


def scales_figure(run: Path, title: str) -> Path | None:
    """Draw RMS of residual stream and states by layer, at the first and last held-out loss, into figures/scales.png.

    Returns its path; None where the log has no scales, as version 0.1.0 wrote it.
    """
    lines = [line for line in read_metrics(run) if "rms/residual/0/1" in line]
    if not lines:
        return None
    figure = new_figure(9.0, 3.8)
    panels = dict(zip(("residual", "state"), figure.subplots(1, 2), strict=True))
    for style, line in (("--", lines[0]), ("-", lines[-1])):
        for name, axes in panels.items():
            found = {tuple(map(int, key.split("/")[2:])): line[key] for key in line if key.startswith(f"rms/{name}/")}
            for iteration in sorted({place[1] for place in found}):
                points = [(layer, value) for (layer, at), value in sorted(found.items()) if at == iteration]
                label = f"step {line['step']}, iteration {iteration}"
                axes.semilogy(*zip(*points, strict=True), style, color=f"C{iteration - 1}", label=label)
    for name, axes in panels.items():
        axes.set(xlabel="layer", ylabel=f"RMS of the {name}" + " stream" * (name == "residual"))
        axes.grid(alpha=0.3)
    panels["residual"].legend(fontsize=8)
    figure.suptitle(title)
    target = run / "figures" / "scales.png"
    target.parent.mkdir(exist_ok=True)
    figure.savefig(target, dpi=110)
    return target


def study_figure(
    result: Json, outcomes: dict[str, HostArrays], losses: HostArrays, target: Path, continued: Sequence[str] = ()
) -> Path:
    """Draw a study: accuracy over length and training loss; with depths, accuracy over depth and similarities too.

    `continued` are the arms whose training begins where that of `stream` ended.

    Arms have a colour, a marker and a dash of their own in every panel, so that curves on top of each other are seen.
    """
    deep = {name: found["overlap"] for name, found in outcomes.items() if "overlap" in found}
    figure = new_figure(9.0, 7.4 if deep else 4.0)
    axes = figure.subplots(2 if deep else 1, 2, squeeze=False)
    for number, name in enumerate(outcomes):
        cells, look = result["arms"][name], _look(number)
        lengths = {
            int(key.split("/")[0]) * result["trained_at"]: cells[key]["seeds"] for key in cells if key.endswith("/1")
        }
        _curve(axes[0, 0], lengths, look, name)
        line = {key: look[key] for key in ("color", "linestyle")}
        axes[0, 1].plot(np.arange(1, len(losses[name]) + 1), losses[name].mean(1), linewidth=0.9, **line)
        if name in deep:
            first = next(iter(cells)).split("/")[0]
            depths = {int(key.split("/")[1]): cells[key]["seeds"] for key in cells if key.startswith(f"{first}/")}
            _curve(axes[1, 0], depths, look, name)
            axes[1, 1].hist(deep[name].ravel(), np.linspace(-1, 1, 61), histtype="step", density=True, **line)
    for ax, x in (
        (axes[0, 0], "length (positions)"),
        *(((axes[1, 0], "iterations per token"),) if deep else ()),
    ):
        points = ax.get_lines()[0].get_xdata()
        ax.axhline(result["chance"], color="0.4", linewidth=0.9, linestyle=":")
        ax.annotate(
            f"chance, {result['chance']:.2f}".replace("0.", "."), (points[0], result["chance"]), (0, -9),
            textcoords="offset points", fontsize=8, color="0.4",
        )  # fmt: skip
        ax.set(xlabel=x, ylabel="accuracy", ylim=(0, 1.05), xticks=points)
        ax.grid(alpha=0.3)
    goes_on = f" ({' and '.join(continued)}: after stream's)" if continued else ""
    axes[0, 1].set(xlabel=f"step{goes_on}", ylabel="training loss (nats)")
    axes[0, 1].grid(alpha=0.3)
    if deep:
        axes[1, 1].set(xlabel="cosine similarity, state of the first and last iteration", ylabel="density")
        axes[1, 1].set(yscale="log", xticks=np.linspace(-1, 1, 5))
    seeds = f"mean and range of {result['seeds']} seeds" if result["seeds"] > 1 else "one seed"
    figure.suptitle(f"{result['task']}, from scratch, trained at length {result['trained_at']}; {seeds}")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    figure.savefig(target, dpi=110)
    return target


_MARKERS, _DASHES = "os^Dv", ("-", "--", "-.", (0, (5, 1, 1, 1, 1, 1)), ":")


def _look(number: int) -> dict[str, Any]:
    """Return the look of the arm of that number."""
    return {
        "color": f"C{number}",
        "marker": _MARKERS[number % len(_MARKERS)],
        "linestyle": _DASHES[number % len(_DASHES)],
    }


def _curve(axes: Axes, points: dict[int, list[float]], look: dict[str, Any], label: str) -> None:
    """Draw the mean of the seeds over x, and their range."""
    x, seeds = sorted(points), np.array([points[key] for key in sorted(points)])
    axes.plot(x, seeds.mean(1), markersize=5, markerfacecolor="none", label=label, **look)
    axes.fill_between(x, seeds.min(1), seeds.max(1), color=look["color"], alpha=0.2)
