"""The figure of single objects: how well each is segmented, over how far others overlap it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from .chart_style import SURFACE, SYMBOLS, escape, finish, label, model_colour, shorten, trace_style

if TYPE_CHECKING:
    import plotly.graph_objects as go

    from .analysis import Analysis
    from .objects import ObjectTable

__all__ = ["scatter_of_objects"]


def scatter_of_objects(analysis: Analysis, max_objects: int = 2000, seed: int = 0) -> go.Figure:
    """
    Mask IoU of single unseen objects over their overlap, with the mean of each overlap bin.

    Args:
        analysis: the sample is drawn among the unseen objects that any model has a mask for.
        max_objects: how many objects at most, the same ones for every model.
        seed: of the sample.

    Returns:
        Two traces per model: the sampled objects, and the mean over all its unseen objects. Its
        "meta" says how many objects were sampled ("num_shown") from how many ("num_objects").
    """
    import plotly.graph_objects as go

    tables = analysis.objects
    eligible = np.flatnonzero(
        np.any([x.is_unseen & np.isfinite(x.ious) for x in tables.values()], axis=0)
    )
    shown = eligible
    if len(eligible) > max_objects:
        rng = np.random.default_rng(seed)
        shown = np.sort(rng.choice(eligible, max_objects, replace=False))
    edges = analysis.summary["settings"]["overlap_bins"]
    figure = go.Figure()
    for index, (model, table) in enumerate(tables.items()):
        rows = shown[np.isfinite(table.ious[shown])]
        figure.add_scatter(
            x=np.round(table.overlaps[rows], 4).tolist(),
            y=np.round(table.ious[rows], 4).tolist(),
            mode="markers",
            name=label(model),
            legendgroup=str(index),
            marker={
                "color": model_colour(index),
                "symbol": SYMBOLS[index % len(SYMBOLS)],
                "size": 5,
                "opacity": 0.35,
            },
            hovertext=[_object_hover(analysis, model, table, row) for row in rows],
            hoverinfo="text",
        )
    for index, (model, table) in enumerate(tables.items()):
        x, y, counts = _means_per_bin(table, edges)
        style = trace_style(index, f"{shorten(model, 20)}: bin mean")
        style["marker"] |= {"size": 9, "line": {"color": SURFACE, "width": 1.5}}
        style["line"]["width"] = 3
        figure.add_scatter(
            x=x,
            y=y,
            hovertext=[
                f"<b>{escape(model)}</b><br>mean IoU {m:.3f} of {n:,} objects"
                for m, n in zip(y, counts)
            ],
            **style,
            legendgroup=str(index),
        )
    finish(figure, "overlap O of the object", "mask IoU", 440)
    figure.update_xaxes(range=[-0.02, 1.02])
    figure.update_yaxes(range=[-0.02, 1.02])
    figure.update_layout(meta={"num_shown": len(shown), "num_objects": len(eligible)})
    return figure


def _object_hover(analysis: Analysis, model: str, table: ObjectTable, row: int) -> str:
    annotation = analysis.coco.anns[int(table.annotation_ids[row])]
    name = analysis.coco.cats[annotation["category_id"]]["name"]
    return (
        f"<b>{escape(name)}</b>, {escape(model)}<br>IoU {table.ious[row]:.3f}, overlap "
        f"{table.overlaps[row]:.3f}<br>annotation {escape(str(annotation['id']))}"
    )


def _means_per_bin(table: ObjectTable, edges: Sequence[float]) -> tuple[list, list, list]:
    """Centre, mean IoU and number of the unseen matched objects of each bin that has any."""
    is_used = table.is_unseen & np.isfinite(table.ious)
    # Bin 0 is O = 0 alone, then (low, high].
    bins = np.searchsorted(np.asarray(edges), table.overlaps, side="left")
    centres, means, counts = [], [], []
    for i in range(len(edges)):
        ious = table.ious[is_used & (bins == i)]
        if len(ious):
            centres.append(float(edges[0] if i == 0 else (edges[i - 1] + edges[i]) / 2))
            means.append(float(ious.mean()))
            counts.append(len(ious))
    return centres, means, counts
