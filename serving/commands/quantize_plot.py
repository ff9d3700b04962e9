"""The plot of errors by layer that `quire quantize` leaves beside its checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from engine.quantizing import LayerReport


def plot_errors(layers: Sequence[LayerReport], file: Path) -> str:
    """Draw errors of each kind of matrix, and of the whole, against the layer.

    Returns:
        One line: where it is, or what is missing to draw it.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "no plot: matplotlib is not installed (pip install 'quire-llm[bench]')"
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    kinds = list(dict.fromkeys(name.rpartition(".")[2] for layer in layers for name in layer.errors))
    for kind in kinds:
        points = [(r.layer, error) for r in layers for name, error in r.errors.items() if name.endswith(f".{kind}")]
        axes.plot([x for x, _ in points], [100 * y for _, y in points], label=kind, linewidth=1.2)
    axes.plot([r.layer for r in layers], [100 * r.block for r in layers], label="all so far", color="black")
    axes.set_xlabel("layer")
    axes.set_ylabel("error of outputs, %")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small", ncols=2)
    figure.savefig(file, dpi=120)
    return f"errors by layer: {file}"
