"""The figures of a report, each with the two sentences that a newcomer reads beneath it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sst_jax.console.figure import Axes, Figure, new_figure
from sst_jax.lab.analysis import basins
from sst_jax.lab.analysis.findings import AnalysisResult
from sst_jax.types import Json

CONTROLS = {
    "depth": "the model\nas it is",
    "shuffled": "states of\nother positions",
    "another_text": "states of\nother texts",
    "random": "random\nstates",
    "alpha_0": "alpha = 0",
    "plain": "no stream",
}


class CaptionedFigure(NamedTuple):
    """A figure, its file's name, its title, and what it says in two sentences."""

    name: str
    title: str
    says: str
    figure: Figure


def blank(width: float = 7.2, height: float = 3.8) -> tuple[Figure, Axes]:
    figure = new_figure(width, height)
    axes = figure.add_subplot()
    axes.grid(alpha=0.3)
    return figure, axes


def draw(found: AnalysisResult) -> Iterator[CaptionedFigure]:
    """All figures that there is something to show for."""
    first, last = (found.result["by_depth"][number]["depth"] for number in (0, -1))
    yield heat(found, first, last)
    yield histogram(found, first, last)
    yield layers(found)
    yield depths(found)
    if found.result["downstream"]:
        yield downstream(found)
    floor = found.result["noise_floor"]
    if floor and "by_layer" in floor:
        yield noise(floor)
    if found.result["controls"]:
        yield controls(found)
    yield alpha(found)


def heat(found: AnalysisResult, first: int, last: int) -> CaptionedFigure:
    figure, axes = blank()
    axes.grid(visible=False)
    longest = max(each.cosine_distance.shape[1] for each in found.measured)
    layers = found.measured[0].cosine_distance.shape[2]
    total, count = np.zeros((longest, layers)), np.zeros((longest, 1))
    for each in found.measured:
        values = each.cosine_distance[-1]
        total[: len(values)] += values
        count[: len(values)] += 1
    image = axes.imshow(
        np.log10(np.maximum(total / count, basins.FLOOR)).T,
        origin="lower",
        aspect="auto",
        cmap="viridis",
        interpolation="nearest",
    )
    axes.set(xlabel="position in the text (0 gives its first token)", ylabel="layer")
    axes.set_title("bright: the state changed most", fontsize="medium")
    bar = figure.colorbar(image, label=f"cosine similarity of depths {first} and {last}")
    ends = image.get_clim()
    bar.set_ticks([ends[0], *(tick for tick in range(-9, 1) if ends[0] + 0.2 < tick < ends[1] - 0.2), ends[1]])
    bar.ax.yaxis.set_major_formatter(as_similarity)
    return CaptionedFigure(
        "overlap",
        "Where iterating moves the hidden state",
        f"Each cell compares the hidden state of one layer after {first} and after {last} iterations, averaged over "
        f"the texts: a cosine similarity of 1 means the same direction. Bright cells changed most.",
        figure,
    )


def as_similarity(value: float, _: float = 0.0) -> str:
    """Return the label of a tick at log10(1 - similarity): the similarity."""
    return f"1 − {10.0**value:.1g}"


def histogram(found: AnalysisResult, first: int, last: int) -> CaptionedFigure:
    layer, mixture = found.result["layer"], found.mixture
    figure, axes = blank()
    values = basins.logs(np.concatenate([each.cosine_distance[-1, :, layer] for each in found.measured]))
    bins = int(np.clip(2 * np.sqrt(len(values)), 8, 60))  # so few positions have no ragged edge
    _, edges, _ = axes.hist(values, bins=bins, color="0.8", label="positions")
    x = np.linspace(edges[0], edges[-1], 400)
    scale = len(values) * (edges[1] - edges[0])
    if (spread := values.std()) > 0:
        one = np.exp(-0.5 * ((x - values.mean()) / spread) ** 2) / (spread * np.sqrt(2 * np.pi)) * scale
        axes.plot(x, one, color="0.4", linestyle=":", linewidth=1.2, label="one normal distribution")
    if min(mixture.deviations) > 0:
        parts = basins.density(x, mixture.means, mixture.deviations, mixture.weights) * scale
        for part, label in zip(parts, ("stable", "shifted") if mixture.bimodal else ("", ""), strict=True):
            if mixture.bimodal:
                axes.plot(x, part, linewidth=1, label=label)
        axes.plot(x, parts.sum(0), "k", linewidth=1.2, label="mixture of two")
    if mixture.cut is not None and mixture.threshold is not None:
        axes.axvline(mixture.cut, color="C3", linestyle="--", label=f"threshold {mixture.threshold.value:.4g}")
    axes.invert_xaxis()
    axes.xaxis.set_major_formatter(as_similarity)
    verdict = "two kinds of position" if mixture.bimodal else "one kind of position"
    axes.set(xlabel=f"cosine similarity of depths {first} and {last}, layer {layer}", ylabel="positions", title=verdict)
    axes.legend()
    says = (
        "The test finds two kinds of position: those that hardly move, and those left of the threshold."
        if mixture.bimodal
        else "All positions form one hump, wide or narrow: no separate kind of position lands elsewhere."
    )
    return CaptionedFigure(
        "histogram",
        "One kind of position, or two?",
        f"How many positions have which cosine similarity, on a scale that spreads out the values near 1. {says}",
        figure,
    )


def over_layers(axes: Axes) -> None:
    """An x axis that counts layers."""
    axes.set_xlabel("layer")
    axes.locator_params(axis="x", integer=True)


def band(axes: Axes, low: np.ndarray, middle: np.ndarray, high: np.ndarray, label: str) -> None:
    """Medians over layers, and what lies around them."""
    number = np.arange(len(middle))
    axes.fill_between(number, low, high, alpha=0.3, label=label)
    axes.plot(number, middle, "o-", markersize=4, label="median")
    over_layers(axes)


def layers(found: AnalysisResult) -> CaptionedFigure:
    figure, axes = blank()
    records = found.result["modes_by_layer"]
    low, middle, high = np.log10(np.maximum([record["quartiles_moved"] for record in records], basins.FLOOR)).T
    number = np.arange(len(records))
    band(axes, low, middle, high, "middle half of the positions")
    two = np.array([record["bimodal"] and record["dip_p_holm"] < basins.LEVEL for record in records])
    if two.any():
        axes.plot(number[two], middle[two], "o", color="C3", label="two kinds of position (Holm-adjusted)")
    axes.invert_yaxis()
    axes.yaxis.set_major_formatter(as_similarity)
    axes.set(ylabel="cosine similarity, first and last depth")
    axes.legend()
    return CaptionedFigure(
        "layers",
        "How far each layer moves",
        "The cosine similarity of the first and the last depth, layer by layer from the input to the output. Red dots, "
        "if any, are layers whose positions are of two kinds.",
        figure,
    )


def depths(found: AnalysisResult) -> CaptionedFigure:
    figure, axes = blank()
    records = found.result["by_depth"]
    at = [record["depth"] for record in records]
    intervals(axes, at, [record["changed"] for record in records], "C0")
    axes.set(xlabel="iterations at each position", ylabel="positions with another top-1 token (share)")
    axes.yaxis.label.set_color("C0")
    right = axes.twinx()
    intervals(right, at, [record["moved"] for record in records], "C1")
    right.set_ylabel("mean cosine distance", color="C1")
    axes.set_xticks(at)
    return CaptionedFigure(
        "depths",
        "What each further iteration adds",
        "Blue: how often the model would write another token than after the first depth. Orange: how far its hidden "
        "state has turned away by then; a curve that flattens says that iterating settles.",
        figure,
    )


def intervals(axes: Axes, at: Sequence[float], records: Sequence[Json], colour: str) -> None:
    """Values with their intervals, where there are any."""
    value = np.array([record["value"] for record in records], float)
    low, high = (
        np.array([record["value"] if record[end] is None else record[end] for record in records], float)
        for end in ("low", "high")
    )
    axes.errorbar(at, value, yerr=[value - low, high - value], fmt="o-", color=colour, markersize=4, capsize=3)


def downstream(found: AnalysisResult) -> CaptionedFigure:
    figure, axes = blank()
    records = found.result["downstream"]
    intervals(axes, [record["distance"] for record in records], records, "C0")
    axes.axhline(0.0, color="0.5", linewidth=0.8)
    axes.set(xlabel="positions later", ylabel="additional cosine distance")
    shifted = "a shifted position" if found.mixture.bimodal else "one of the tenth that moved most"
    return CaptionedFigure(
        "downstream",
        "How far a shift is felt",
        f"How much more the states move some positions after {shifted} than after the others, within the same text. "
        "Bars that include 0 mean that nothing is felt at that distance.",
        figure,
    )


def noise(floor: Json) -> CaptionedFigure:
    figure, axes = blank()
    records = [record["ratio"] for record in floor["by_layer"]]
    intervals(axes, range(len(records)), records, "C0")
    everywhere = floor["everywhere"]["ratio"]["value"]
    axes.axhline(everywhere, color="C1", linestyle="--", label=f"all layers: {everywhere:.2f}")
    axes.axhline(1.0, color="0.4", linewidth=0.8, label="rounding to bfloat16")
    over_layers(axes)
    axes.set(ylabel="depth / rounding", yscale="log")
    axes.yaxis.set_major_formatter(plain_number)
    axes.yaxis.set_minor_formatter(plain_number)
    axes.legend()
    return CaptionedFigure(
        "noise",
        "Is it more than rounding?",
        "How many times as far iterating moves the states as computing in bfloat16 instead of float32 does. Below 1, "
        "the effect of depth would be smaller than the noise that such computing makes anyway.",
        figure,
    )


def plain_number(value: float, _: float = 0.0) -> str:
    """Return the label of a tick on a log axis: the number, where it begins with 1, 2, 4 or 6."""
    return f"{value:g}" if f"{value:e}"[0] in "1246" else ""


def controls(found: AnalysisResult) -> CaptionedFigure:
    figure, axes = blank()
    records = found.result["controls"]
    names = [name for name in CONTROLS if name in records]
    moves = [record["moved"]["value"] for record in records.values()]
    axes.set_yscale("symlog", linthresh=min(filter(None, moves), default=1.0) / 10)
    axes.margins(y=0.2)
    for place, name in enumerate(names):
        intervals(axes, [place], [records[name]["moved"]], f"C{place}")
        changed, moved = records[name]["argmax_changed"]["value"], records[name]["moved"]["value"]
        axes.annotate(
            f"{moved:.1e}\n{changed:.1%} of\ntokens change" if moved else "exactly 0",
            (place, moved),
            textcoords="offset points",
            xytext=(9, 0),
            va="center",
            fontsize=8,
        )
    axes.set_xticks(range(len(names)), [CONTROLS[name] for name in names])
    axes.set(ylabel="mean cosine distance", xlim=(-0.5, len(names) - 0.2))
    return CaptionedFigure(
        "controls",
        "Does it matter which states enter?",
        "The same iterations with the states of other positions or texts, or random ones of the same size, put in "
        "instead. Without a stream, or with its strength at 0, nothing may move at all.",
        figure,
    )


def alpha(found: AnalysisResult) -> CaptionedFigure:
    figure, axes = blank()
    low, middle, high = np.array(found.result["alpha"]["by_layer"]).T
    band(axes, low, middle, high, "5% to 95% of the dimensions")
    axes.set(ylabel="alpha")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2)
    return CaptionedFigure(
        "alpha",
        "How strongly each layer blends its state in",
        "Alpha is the share of a layer's hidden state that is replaced by the layer's state of the step before. It was "
        "learned for each dimension, so each layer has a range.",
        figure,
    )


def roc(curve: Sequence[Sequence[float]], auc: float) -> CaptionedFigure:
    """Of a probe's out-of-fold scores: points (false positives, true positives)."""
    figure, axes = blank(4.6, 4.2)
    axes.plot(*np.array(curve).T, label=f"AUROC {auc:.2f}")
    axes.plot([0, 1], [0, 1], color="0.5", linewidth=0.8, label="chance: 0.50")
    axes.set(xlabel="false positive rate", ylabel="true positive rate", aspect="equal")
    axes.legend(loc="lower right")
    return CaptionedFigure(
        "probe",
        "Can the first state tell?",
        "The true positive rate of a probe against its false positive rate, for every "
        "threshold. Each item was scored by a probe that had never seen it.",
        figure,
    )


def save(drawn: CaptionedFigure, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if drawn.figure.get_suptitle() != drawn.title:
        drawn.figure.suptitle(drawn.title)  # the file stands without the page's heading too
    target = folder / f"{drawn.name}.png"
    drawn.figure.savefig(target, dpi=130)
    return target
