"""The figure that plots are drawn in. It imports matplotlib, so only `flowtrain.diagnostics.plots` imports it, when it
draws.

It is made without pyplot: no window, no state that another thread could draw into, nothing to close.
"""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from flowtrain.callback.phases import Phase
from flowtrain.diagnostics.plots import Curve

__all__ = ["CurveFigure"]


class CurveFigure(Figure):
    """Curves of several metrics, one below the other over the same batches; a notebook shows it.

    Args:
        panels: For each metric, its curves.
        over: What is counted along the horizontal axis.
    """

    def __init__(self, panels: Sequence[Sequence[Curve]], over: str) -> None:
        super().__init__(figsize=(7.0, 0.5 + 2.5 * len(panels)), layout="constrained")
        phases = list(dict.fromkeys(curve.phase for curves in panels for curve in curves))
        grid = self.subplots(len(panels), 1, sharex=True, squeeze=False)
        for axes, curves in zip(grid[:, 0], panels, strict=True):
            _draw(axes, curves, phases)
        grid[-1, 0].set_xlabel(over)
        grid[-1, 0].xaxis.set_major_locator(MaxNLocator(integer=True))

    def _repr_png_(self) -> bytes:
        """What a notebook shows."""
        file = BytesIO()
        self.savefig(file, format="png")
        return file.getvalue()


def _draw(axes: Axes, curves: Sequence[Curve], phases: Sequence[Phase]) -> None:
    """Draw one metric: batches thin and pale, the means of epochs as dots on a line, a colour for each phase."""
    for curve in curves:
        colour = f"C{phases.index(curve.phase)}"
        if curve.each == "batch":
            axes.plot(curve.x, curve.y, color=colour, linewidth=0.8, alpha=0.4, label=f"{curve.phase!r}, each batch")
        else:
            axes.plot(curve.x, curve.y, color=colour, marker="o", markersize=4, label=repr(curve.phase))
    axes.set_ylabel(curves[0].metric if curves else "")
    axes.grid(alpha=0.3)
    if curves:
        axes.legend()
