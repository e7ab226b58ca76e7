"""Figures of bench/results/<gpu>/generate.json: step time by context, speed-up, breakdown of forwards, break-even.

    python bench/plot_generate.py bench/results/h100/generate.json

Writes PNG files beside the JSON, drawn from its rows alone. Needs matplotlib.
"""

import argparse
import json
from pathlib import Path

from mage_ext.evaluation.figures import COLORS, context_axis, panels, save
from mage_ext.evaluation.speed import break_even_context

MODEL_COLORS = {"1.5B": "#1f77b4", "7B": "#2ca02c", "8B": "#9467bd"}


def rows_of(rows: list[dict], **wanted) -> list[dict]:
    """Rows whose case has these values; dense_layers is 0 unless asked for."""
    wanted = {"dense_layers": 0, **wanted}
    return [
        row
        for row in rows
        if all(row["case"].get(key, 0 if key == "dense_layers" else None) == value for key, value in wanted.items())
    ]


def by_context(rows: list[dict], value) -> tuple[list[int], list[float]]:
    """Contexts in K tokens and values, ascending."""
    points = sorted((row["case"]["context"] // 1024, value(row)) for row in rows)
    return [x for x, _ in points], [y for _, y in points]


def step_time(rows: list[dict], contexts: list[int], path: Path) -> None:
    """Milliseconds of an exact and of a sparse forward, one panel per model, batch 1 and 8."""
    figure, (axes,) = panels(1, len(MODEL_COLORS), 3.7, 3.4)
    for axis, model in zip(axes, MODEL_COLORS, strict=True):
        for batch, style in ((1, "-"), (8, "--")):
            for method, kind in (("exact", "exact"), ("mage", "sparse")):
                found = rows_of(rows, model=model, batch=batch, method=method, T=8)
                x, y = by_context(found, lambda row, kind=kind: row["step_ms"][kind])
                axis.plot(x, y, style, color=COLORS[method], marker="o", ms=3, label=f"{kind}, batch {batch}")
        axis.set_title(model)
        axis.set_ylim(bottom=0)
        context_axis(axis, contexts)
    axes[0].set_ylabel("ms per forward")
    axes[0].legend(fontsize=8)
    save(figure, path)


def speed_up(rows: list[dict], contexts: list[int], path: Path) -> None:
    """Block time exact / mage by context and T, one panel per model at its largest batch in all contexts."""
    figure, (axes,) = panels(1, len(MODEL_COLORS), 3.7, 3.4, sharey=True)
    for axis, model in zip(axes, MODEL_COLORS, strict=True):
        batches = sorted({row["case"]["batch"] for row in rows_of(rows, model=model, method="mage", T=8)})
        full = [b for b in batches if len(rows_of(rows, model=model, batch=b, method="mage", T=8)) == len(contexts)]
        for T, style in ((32, "-"), (16, "--"), (8, ":")):
            found = rows_of(rows, model=model, batch=full[-1], method="mage", T=T)
            x, y = by_context(found, lambda row: row["ratio"])
            axis.plot(x, y, style, color=MODEL_COLORS[model], marker="o", ms=3, label=f"T = {T}")
        axis.axhline(1, color="black", lw=0.8)
        axis.set_title(f"{model}, batch {full[-1]}")
        context_axis(axis, contexts)
    axes[0].set_ylabel("block time, exact / MAGE")
    axes[0].legend(fontsize=8)
    save(figure, path)


def breakdown(rows: list[dict], path: Path) -> None:
    """Where the time of a block goes, by kind of forward, T = 8, at the places where every method ran."""
    places = [("1.5B", 8, 131072), ("7B", 4, 65536), ("8B", 4, 65536)]
    kinds = {"exact": "#4c4c4c", "select": "#ff7f0e", "sparse": "#1f77b4", "commit": "#b0b0b0"}
    figure, ((axis,),) = panels(1, 1, 9, 3.8)
    labels, seen = [], set()
    for model, batch, context in places:
        for method in ("FA3", "exact", "mage", "mage fused", "quest", "tidal", "sparsed"):
            found = rows_of(rows, model=model, batch=batch, context=context, method=method, T=8)
            if not found:
                continue
            left = 0.0
            for kind, count in found[0]["forwards"].items():
                width = count * found[0]["step_ms"].get(kind, 0.0)
                axis.barh(len(labels), width, left=left, color=kinds[kind], label=None if kind in seen else kind)
                seen.add(kind)
                left += width
            labels.append(f"{model} {batch} x {context // 1024}K {method}")
    axis.set_yticks(range(len(labels)), labels, fontsize=7)
    axis.invert_yaxis()
    axis.set_xlabel("ms per block, T = 8")
    axis.legend(fontsize=8)
    save(figure, path)


def break_even(rows: list[dict], path: Path) -> None:
    """Context from which MAGE's blocks are faster than exact ones, by batch and T."""
    figure, ((axis,),) = panels(1, 1, 6, 3.4)
    for model, color in MODEL_COLORS.items():
        for T, style in ((32, "-"), (8, ":")):
            points = []
            for batch in sorted({row["case"]["batch"] for row in rows}):
                times = {}
                for row in rows_of(rows, model=model, batch=batch, method="mage", T=T):
                    times[row["case"]["context"]] = (row["peer_us"], row["us"])
                if times:
                    points.append((batch, break_even_context(times)))
            points = [(batch, value / 1024) for batch, value in points if value < float("inf")]
            axis.plot(*zip(*points, strict=True), style, color=color, marker="o", ms=3, label=f"{model}, T = {T}")
    axis.set_xscale("log", base=2)
    axis.set_xticks([1, 4, 8, 16], ["1", "4", "8", "16"])
    axis.set_xlabel("batch")
    axis.set_ylabel("break-even context, K tokens\n(0: faster from the shortest measured on)", fontsize=8)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=7)
    save(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("result", type=Path, help="generate.json")
    path = parser.parse_args().result
    rows = json.loads(path.read_text())["rows"]
    contexts = sorted({row["case"]["context"] // 1024 for row in rows})
    step_time(rows, contexts, path.with_name("generate_step_time.png"))
    speed_up(rows, contexts, path.with_name("generate_speed_up.png"))
    breakdown(rows, path.with_name("generate_breakdown.png"))
    break_even(rows, path.with_name("generate_break_even.png"))


if __name__ == "__main__":
    main()
