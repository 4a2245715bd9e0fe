"""The runs of a sweep side by side: a table over the seeds, and a figure."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from tabulate import tabulate

__all__ = ["Group", "draw_summary", "group_rows", "write_summary"]

# (heading, task, metric) of the table's columns.
COLUMNS = (
    ("box AP", "bbox", "AP"),
    ("mask AP", "segm", "AP"),
    ("seen AP", "segm_seen", "AP"),
    ("**unseen AP**", "segm_unseen", "AP"),
    ("unseen AP50", "segm_unseen", "AP50"),
    ("overlapped unseen AP", "segm_unseen_overlap", "AP"),
)
# Of the masks alone, on given boxes.
MASK_COLUMNS = COLUMNS[2:]
GT_BOXES_TITLE = "Masks alone, on the ground-truth boxes and classes:"
# Where in a line of results.jsonl the results of an evaluation are.
Source = tuple[str, ...]
RESULTS: Source = ("results",)
ALWAYS_UNSEEN: Source = ("always_unseen", "results")
BAR_TASKS = {
    "segm_seen": "Mask AP, seen classes",
    "segm_unseen": "Mask AP, unseen classes",
    "segm_unseen_overlap": "Mask AP, overlapped unseen",
}
# Okabe and Ito's.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#000000", "#8c6d00")
MARKERS = ("o", "s", "D", "^", "v", "P", "X")


@dataclass(frozen=True)
class Group:
    """
    The runs of a config with a set of seen classes.

    Args:
        config: its path.
        seen_set: path of the list; None = the config's own.
        rows: lines of results.jsonl, one a seed.
    """

    config: str
    seen_set: str | None
    rows: list[dict]

    @property
    def num_seen_classes(self) -> int | None:
        return self.rows[0]["num_seen_classes"]

    def values(self, task: str, metric: str = "AP", source: Source = RESULTS) -> list[float]:
        """One value a seed, without those that are undefined."""
        values = []
        for row in self.rows:
            results = row
            for key in source:
                results = results.get(key) or {}
            value = _of_first_dataset(results).get(task, {}).get(metric)
            values += [] if value is None else [value]
        return values


def group_rows(rows: Sequence[dict]) -> list[Group]:
    """Put the seeds together; by config, then by the number of seen classes."""
    ordered = sorted(
        _comparable(rows),
        key=lambda row: (
            row["config"],
            row["num_seen_classes"] or 0,
            row["seen_set"] or "",
            row["seed"],
        ),
    )
    return [
        Group(config, seen_set, list(group))
        for (config, seen_set), group in itertools.groupby(
            ordered, key=lambda row: (row["config"], row["seen_set"])
        )
    ]


def _comparable(rows: Sequence[dict]) -> list[dict]:
    # The classes unseen in all sets are others when sets have been added: those of the last line.
    known = [row["always_unseen"]["classes"] for row in rows if row["always_unseen"]]
    return [
        (
            row
            if row["always_unseen"] and row["always_unseen"]["classes"] == known[-1]
            else {**row, "always_unseen": None}
        )
        for row in rows
    ]


def _always_unseen_classes(groups: Sequence[Group]) -> list[str]:
    rows = [row for group in groups for row in group.rows if row["always_unseen"]]
    return rows[0]["always_unseen"]["classes"] if rows else []


def write_summary(path: Path, rows: Sequence[dict], missing: Sequence[str]) -> str:
    """
    Write the table and what it was made with.

    Args:
        path: of the Markdown file.
        rows: lines of results.jsonl.
        missing: names of the runs of this call that are not done.

    Returns:
        The tables alone.
    """
    groups = group_rows(rows)
    table = _table(groups)
    always_unseen = _always_unseen_classes(groups)
    lines = [
        "# Summary of the sweep",
        "",
        f"COCO AP in percent on {_dataset_name(rows[0])}: mean ± standard deviation (of the "
        "sample) over the seeds; a value without ± is one run. Seen, unseen and overlapped unseen: "
        "the tasks segm_seen, segm_unseen and segm_unseen_overlap.",
        "",
        table,
        "",
    ]
    if always_unseen:
        lines += [f"Unseen in all sets: {', '.join(always_unseen)}.", ""]
    on_gt_boxes = _gt_boxes_table(groups)
    if on_gt_boxes:
        table = f"{table}\n\n{GT_BOXES_TITLE}\n\n{on_gt_boxes}"
        lines += [GT_BOXES_TITLE, "", on_gt_boxes, ""]
    if missing:
        lines += [f"Not finished: {', '.join(missing)}.", ""]
    lines += [
        f"{len(rows)} runs, {sum(row['seconds'] for row in rows) / 3600:.2f} hours of training "
        "with its evaluation. Each run with its command, versions and hardware is a line of "
        "results.jsonl.",
        f"Overrides: {_distinct(' '.join(map(str, row['opts'])) or 'none' for row in rows)}. "
        f"Commits: {_distinct(row['commit'] or 'unknown' for row in rows)}.",
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return table


def _table(groups: list[Group]) -> str:
    has_always_unseen = bool(_always_unseen_classes(groups))
    header = ["config", "set", "seen classes", "seeds", *(heading for heading, *_ in COLUMNS)]
    lines = []
    for group in groups:
        seen_set = Path(group.seen_set).stem if group.seen_set else "-"
        num_seen = "-" if group.num_seen_classes is None else str(group.num_seen_classes)
        line = [_label(group, groups), seen_set, num_seen, str(len(group.rows))]
        line += [_mean_and_spread(group.values(task, metric)) for _, task, metric in COLUMNS]
        if has_always_unseen:
            line.append(_mean_and_spread(group.values("segm_unseen", source=ALWAYS_UNSEEN)))
        lines.append(line)
    if has_always_unseen:
        header.append("unseen in all sets AP")
    alignment = ("left", "left") + ("right",) * (len(header) - 2)
    return tabulate(
        lines, headers=header, tablefmt="pipe", colalign=alignment, disable_numparse=True
    )


def _gt_boxes_table(groups: list[Group]) -> str:
    # "" without an evaluation on ground-truth boxes.
    lines = []
    for group in groups:
        heads = {head for row in group.rows for head in row.get("gt_boxes") or {}}
        for head in sorted(heads):
            values = [group.values(task, x, ("gt_boxes", head)) for _, task, x in MASK_COLUMNS]
            name = f"{_label(group, groups)}{_set_suffix(group)}"
            seeds = max(len(x) for x in values)
            lines.append([name, head, str(seeds), *map(_mean_and_spread, values)])
    header = ["config", "mask head", "seeds", *(heading for heading, *_ in MASK_COLUMNS)]
    alignment = ("left", "left") + ("right",) * (len(header) - 2)
    return (
        tabulate(lines, header, tablefmt="pipe", colalign=alignment, disable_numparse=True)
        if lines
        else ""
    )


def _set_suffix(group: Group) -> str:
    return f" ({Path(group.seen_set).stem})" if group.seen_set else ""


def _mean_and_spread(values: list[float]) -> str:
    if not values:
        return "-"
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def _label(group: Group, groups: list[Group]) -> str:
    # The folder only where it tells configs apart.
    path = Path(group.config)
    same = {x.config for x in groups if Path(x.config).stem == path.stem}
    return path.stem if len(same) == 1 else f"{path.parent.name}/{path.stem}"


def _distinct(values) -> str:
    return "; ".join(dict.fromkeys(values))


def _is_per_dataset(results: dict) -> bool:
    # Detectron2 nests the results once more where there are several test datasets.
    return any(isinstance(x, dict) for task in results.values() for x in task.values())


def _of_first_dataset(results: dict) -> dict:
    return next(iter(results.values())) if _is_per_dataset(results) else results


def _dataset_name(row: dict) -> str:
    results = row["results"]
    return f"{next(iter(results))} alone" if _is_per_dataset(results) else "the test dataset"


def draw_summary(path: Path, rows: Sequence[dict]) -> None:
    """
    Draw AP over the number of seen classes if there are several sets, else bars per config.

    Every seed is a point; lines and bars are their means.

    Args:
        path: of the PNG.
        rows: lines of results.jsonl.
    """
    groups = group_rows(rows)
    with_set = [x for x in groups if x.seen_set and x.num_seen_classes is not None]
    if len({x.seen_set for x in with_set}) > 1:
        figure = _draw_lines(with_set)
    else:
        figure = _draw_bars(groups)
    figure.savefig(path, dpi=150)


def _draw_lines(groups: list[Group]) -> Figure:
    always_unseen = _always_unseen_classes(groups)
    panels = [(RESULTS, "classes unseen in each set")]
    if always_unseen:
        panels.append((ALWAYS_UNSEEN, f"the {len(always_unseen)} classes unseen in all sets"))
    figure = Figure(figsize=(5.4 * len(panels), 4.4), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    configs = list(dict.fromkeys(group.config for group in groups))
    for ax, (source, title) in zip(axes, panels):
        for k, config in enumerate(configs):
            points = [
                (group.num_seen_classes, group.values("segm_unseen", source=source))
                for group in groups
                if group.config == config
            ]
            points = [(x, values) for x, values in points if values]
            style = {"color": COLOURS[k % len(COLOURS)], "marker": MARKERS[k % len(MARKERS)]}
            for x, values in points:
                ax.plot([x] * len(values), values, linestyle="", alpha=0.35, ms=4, **style)
            means = [statistics.mean(values) for _, values in points]
            label = _label(next(g for g in groups if g.config == config), groups)
            ax.plot([x for x, _ in points], means, label=label, linewidth=1.8, **style)
        ax.set_xticks(sorted({group.num_seen_classes for group in groups}))
        ax.set_xlabel("number of seen classes\n(lines: mean of the seeds; small points: seeds)")
        ax.set_title(f"Mask AP, {title}", fontsize=11)
        _tidy(ax, "both")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    return figure


def _draw_bars(groups: list[Group]) -> Figure:
    figure = Figure(figsize=(10.5, 1.6 + 0.45 * len(groups)), layout="constrained")
    axes = figure.subplots(1, len(BAR_TASKS), sharey=True)
    configs = list(dict.fromkeys(group.config for group in groups))
    labels = []
    for group in groups:
        labels.append(_label(group, groups) + _set_suffix(group))
    for ax, (task, title) in zip(axes, BAR_TASKS.items()):
        for y, group in enumerate(groups):
            values = group.values(task)
            if not values:
                continue
            mean = statistics.mean(values)
            colour = COLOURS[configs.index(group.config) % len(COLOURS)]
            ax.barh(y, mean, height=0.62, color=colour, alpha=0.55)
            ax.plot(values, [y] * len(values), "o", ms=4.5, mfc="white", mec=colour)
            ax.annotate(
                _mean_and_spread(values),
                (max(values), y),
                xytext=(6, 0),
                textcoords="offset points",
                va="center",
                fontsize=8,
            )
        ax.set_xlim(0, max(1.0, ax.dataLim.x1) * 1.6)
        ax.xaxis.set_major_locator(MaxNLocator(5))
        ax.set_title(title, fontsize=11)
        _tidy(ax, "x")
    axes[0].set_yticks(range(len(groups)), labels)
    axes[0].set_ylim(len(groups) - 0.5, -0.5)
    figure.supxlabel("bars: mean of the seeds; points: seeds", fontsize=9)
    return figure


def _tidy(ax: Axes, grid: str) -> None:
    ax.grid(axis=grid, color="#e3e7ec")
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
