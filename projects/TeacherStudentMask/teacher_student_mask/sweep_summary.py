"""The runs of a sweep side by side: tables over the seeds, a figure, and the report."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from .sweep import ALWAYS_UNSEEN, DETECTIONS, ON_GT_BOXES, Run

__all__ = ["read_results", "write_report", "write_summary"]

# Heading of a column -> (task, metric) of results.json.
COLUMNS = {
    "box AP": ("bbox", "AP"),
    "mask AP": ("segm", "AP"),
    "seen AP": ("segm_seen", "AP"),
    "unseen AP": ("segm_unseen", "AP"),
    "unseen AP50": ("segm_unseen", "AP50"),
    "overlapped unseen AP": ("segm_unseen_overlap", "AP"),
}


def read_results(records: Sequence[dict]) -> pd.DataFrame:
    """
    The results of runs as a table.

    Args:
        records: contents of run.json files, or lines of results.jsonl.

    Returns:
        A row for each run and evaluation: "config", "seen_set", "num_seen_classes", "seed",
        "evaluation" ("detections", "gt_boxes_student", "gt_boxes_teacher" or "always_unseen_KEY"),
        and AP of :data:`COLUMNS`.
    """
    rows = []
    for record in records:
        for evaluation, results in record["results"].items():
            row = {key: record[key] for key in ("config", "seen_set", "num_seen_classes", "seed")}
            row["evaluation"] = evaluation
            for heading, (task, metric) in COLUMNS.items():
                row[heading] = results.get(task, {}).get(metric)
            rows.append(row)
    types = {"num_seen_classes": "Int64", **dict.fromkeys(COLUMNS, float)}
    return pd.DataFrame(rows).fillna({"seen_set": "-"}).astype(types)


def write_summary(output_dir: str | os.PathLike) -> str:
    """
    Write results.jsonl, results.csv, summary.md and summary.png.

    Args:
        output_dir: of the sweep; all runs in it count, not the last call's alone.

    Returns:
        The tables, in Markdown.
    """
    output = Path(output_dir)
    records = [json.loads(path.read_text()) for path in sorted(output.glob("runs/**/run.json"))]
    records = [record for record in records if record.get("results")]
    if not records:
        return "No run has finished."
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (output / "results.jsonl").write_text(lines, encoding="utf-8")
    results = read_results(records)
    results.to_csv(output / "results.csv", index=False)
    # The standard deviation is that of the sample; NaN for one seed.
    keys = ["evaluation", "config", "num_seen_classes", "seen_set"]
    statistics = {"seed": ["count"], **dict.fromkeys(COLUMNS, ["mean", "std"])}
    summary = results.groupby(keys, dropna=False).agg(statistics)
    tables = []
    for evaluation, rows in summary.groupby("evaluation"):
        rows = rows.droplevel("evaluation")
        cells = pd.DataFrame({"seeds": rows["seed", "count"]})
        for heading in COLUMNS:
            if rows[heading, "mean"].notna().any():
                cells[heading] = [
                    "-" if pd.isna(mean) else f"{mean:.2f}" + f" ± {std:.2f}" * pd.notna(std)
                    for mean, std in rows[heading].itertuples(index=False)
                ]
        cells = cells.reset_index().astype(str).replace({"<NA>": "-", "nan": "-"})
        tables.append(f"{_title(evaluation)}:\n\n{cells.to_markdown(index=False)}")
    text = "\n\n".join(tables)
    hours = sum(record.get("seconds", 0) for record in records) / 3600
    commits = ", ".join(sorted({str(record["commit"]) for record in records}))
    (output / "summary.md").write_text(
        "# Summary of the sweep\n\nCOCO AP in percent: mean ± standard deviation (of the sample) "
        "over the seeds; a value without ± is one run. Seen, unseen and overlapped unseen: the "
        f"tasks segm_seen, segm_unseen and segm_unseen_overlap.\n\n{text}\n\n{len(records)} runs, "
        f"{hours:.2f} hours of training. Each with its command, versions and hardware is a line of "
        f"results.jsonl. Commits: {commits}.\n",
        encoding="utf-8",
    )
    _draw(summary, output / "summary.png")
    return text


def _title(evaluation: str) -> str:
    if evaluation == DETECTIONS:
        return "Masks and boxes detected by the model"
    if evaluation.startswith(ALWAYS_UNSEEN):
        return "On the classes that are unseen in all sets"
    return f"Masks of the {evaluation.split('_')[-1]} on the ground-truth boxes and classes"


def _draw(summary: pd.DataFrame, path: Path) -> None:
    """AP of unseen classes over the number of seen ones (Fig. 8), or bars of all configs."""
    evaluations = summary.index.unique("evaluation")
    if summary.index.unique("num_seen_classes").size > 1:
        shown = [x for x in evaluations if x == DETECTIONS or x.startswith(ALWAYS_UNSEEN)]
        figure = Figure(figsize=(5.4 * len(shown), 4.4), layout="constrained")
        for ax, evaluation in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown):
            for config, rows in summary.loc[evaluation]["unseen AP"].groupby("config"):
                count = rows.index.get_level_values("num_seen_classes").astype(float)
                ax.errorbar(count, rows["mean"], rows["std"].fillna(0), marker="o", label=config)
            ax.set(title=_title(evaluation), xlabel="number of seen classes", ylabel="unseen AP")
            ax.legend(frameon=False)
    else:
        rows = summary.loc[DETECTIONS].droplevel(["num_seen_classes", "seen_set"])[::-1]
        figure = Figure(figsize=(10.5, 1.6 + 0.45 * len(rows)), layout="constrained")
        columns = ("seen AP", "unseen AP", "overlapped unseen AP")
        for ax, column in zip(figure.subplots(1, len(columns), sharey=True), columns):
            means, spread = rows[column, "mean"].fillna(0), rows[column, "std"].fillna(0)
            ax.barh(rows.index, means, xerr=spread)
            ax.set_title(column)
    figure.savefig(path, dpi=150)


def write_report(runs: Mapping[str, Run], output_dir: str | os.PathLike) -> Path:
    """
    Write the report on the models of some runs, the first of which is the baseline.

    Args:
        runs: {name in the report: run that is done}, planned with ``report``.
        output_dir: of the report.

    Returns:
        The path of the page.
    """
    from .analysis import analyze
    from .analysis import write_report as write_page
    from .analysis.pseudo_mask_quality import measure_pseudo_masks

    on_gt_boxes, quality = {}, {}
    for name, run in runs.items():
        on_gt_boxes[name] = _result_file(run.folder / ON_GT_BOXES.format(head="student"))
        if ON_GT_BOXES.format(head="teacher") in run.evaluations:
            folder = run.folder / ON_GT_BOXES.format(head="teacher")
            on_gt_boxes[f"{name}, teacher"] = _result_file(folder)
            quality[name] = measure_pseudo_masks(
                str(run.folder / "config.yaml"), str(run.folder / "model_final.pth")
            )
    annotations, image_root, seen_classes = next(iter(runs.values())).truth
    analysis = analyze(
        annotations,
        {name: _result_file(run.folder) for name, run in runs.items()},
        seen_classes=seen_classes,
        gt_box_results=on_gt_boxes,
        pseudo_masks=quality,
        baseline=next(iter(runs)),
    )
    return write_page(analysis, output_dir, image_root=image_root, num_objects=60)


def _result_file(folder: Path) -> str:
    path = folder / "inference" / "coco_instances_results.json"
    if not path.is_file():  # Detectron2 writes none for a model that finds nothing
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("[]")
    return str(path)
