"""Result tables as text that is also Markdown; the rows of unseen classes are set in bold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tabulate import tabulate

from .subset_ap import METRICS

__all__ = ["TASKS", "comparison_table", "results_table"]

TASKS = ("bbox", "segm", "segm_seen", "segm_unseen", "segm_unseen_overlap")


def results_table(
    results: Mapping,
    rows: Sequence[str] = TASKS,
    metrics: Sequence[str] = METRICS + ("num_gt",),
) -> str:
    """
    One row per task, one column per metric.

    Args:
        results: {task: {metric: value}} as an evaluator returns it, or {dataset: such a dict},
            which gives one table per dataset.
        rows: the tasks to show; those absent from `results` are left out.
        metrics: the columns. An absent value is shown as "-", an undefined one as "nan".

    Returns:
        The table, or "no results" if there is no row.
    """
    values = [x for of_task in results.values() for x in of_task.values()]
    if values and isinstance(values[0], Mapping):
        tables = (f"{name}:\n{results_table(x, rows, metrics)}" for name, x in results.items())
        return "\n\n".join(tables)
    lines = [
        _line(task, task, [_format(results[task].get(metric), metric) for metric in metrics])
        for task in rows
        if task in results
    ]
    return _to_text(("task", *metrics), lines)


def comparison_table(
    results_by_model: Mapping[str, Mapping],
    rows: Sequence[str] = ("segm_seen", "segm_unseen", "segm_unseen_overlap"),
    metrics: Sequence[str] = ("AP", "AP50"),
) -> str:
    """
    Several models side by side: one row per task and metric, one column per model.

    Args:
        results_by_model: {model name: {task: {metric: value}}}, all of one dataset.
        rows: the tasks to show; those that no model has are left out.
        metrics: the metrics to show of each task.

    Returns:
        The table, or "no results" if there is no row.
    """
    models = results_by_model.values()
    lines = [
        _line(
            task,
            f"{task} {metric}",
            [_format(x.get(task, {}).get(metric), metric) for x in models],
        )
        for task in rows
        for metric in metrics
        if any(task in x for x in models)
    ]
    return _to_text(("", *results_by_model), lines)


def _format(value, metric: str) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if metric == "num_gt" else f"{value:.2f}"


def _line(task: str, label: str, cells: list[str]) -> list[str]:
    line = [label, *cells]
    return [f"**{x}**" for x in line] if "unseen" in task else line


def _to_text(header: Sequence[str], lines: list[list[str]]) -> str:
    if not lines:
        return "no results"
    alignment = ("left",) + ("right",) * (len(header) - 1)
    return tabulate(
        lines, headers=header, tablefmt="pipe", colalign=alignment, disable_numparse=True
    )
