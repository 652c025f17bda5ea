"""The learning curve."""

from __future__ import annotations

from pathlib import Path

from sst_jax.training.run import read_metrics


def learning_curve(run: Path, title: str) -> Path:
    """Draws training and held-out loss of a run folder into figures/learning_curve.png."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = read_metrics(run)
    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    FigureCanvasAgg(figure)  # no display, and no global state as pyplot has
    axes = figure.add_subplot()
    for name, label, style in (("loss", "training, each step", "-"), ("heldout_loss", "held out", "o-")):
        points = [(line["step"], line[name]) for line in lines if name in line]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, alpha=0.5 if name == "loss" else 1.0)
    axes.set(xlabel="optimizer step", ylabel="loss on answer tokens (nats)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    target = run / "figures" / "learning_curve.png"
    target.parent.mkdir(exist_ok=True)
    figure.savefig(target, dpi=150)
    return target
