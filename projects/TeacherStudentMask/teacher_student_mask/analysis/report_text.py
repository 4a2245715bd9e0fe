"""The sentences of the report that name its main numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .report_tables import (
    ResultSet,
    bin_label,
    doubt_about,
    format_interval,
    format_number,
    result_sets,
)

__all__ = ["glance_sentences"]

# More pairs than these are left to the table.
_MAX_COMPARISONS = 3


def glance_sentences(summary: Mapping) -> list[str]:
    """
    Two to four plain sentences (one to three clauses each) about the main numbers.

    AP on unseen classes, on overlapped unseen objects, its course over the overlap, and the share
    of the false positives that lie on objects. What the analysis does not have is left out. The
    sentences are plain text, not HTML.
    """
    sets = result_sets(summary)
    if not sets:
        return []
    # Detections come first; on ground-truth boxes where nothing else was given.
    protocol = sets[0].protocol
    sets = [x for x in sets if x.protocol == protocol]
    threshold = summary["settings"]["overlap_threshold"]
    sentences = [
        _ap_sentence(summary, sets, "segm_unseen", "unseen classes"),
        _ap_sentence(
            summary,
            sets,
            "segm_unseen_overlap",
            f"unseen objects with overlap of {threshold:g} or more",
        ),
        _overlap_sentence(sets),
        _false_positive_sentence(sets),
    ]
    return [x for x in sentences if x]


def _ap_sentence(
    summary: Mapping, sets: Sequence[ResultSet], task: str, objects: str
) -> str | None:
    known = [x for x in sets if x.data.get(task, {}).get("AP") is not None]
    if not known:
        return None
    parts = []
    for x in known:
        number = f"{format_number(x.data[task]['AP'])} AP"
        parts.append(f"{x.model} has {number} {format_interval(x.interval(task, 'AP'))}".rstrip())
    boxes = " (ground-truth boxes)" if known[0].protocol == "gt_boxes" else ""
    sentence = f"On {objects}{boxes}, {_join(parts)}"
    comparisons = [
        text
        for x in summary["differences"]
        if x["protocol"] == known[0].protocol
        if (text := _comparison(x, task)) is not None
    ]
    return "; ".join([sentence, *comparisons[:_MAX_COMPARISONS]]) + "."


def _comparison(difference: Mapping, task: str) -> str | None:
    entry = difference["tasks"].get(task, {}).get("AP")
    if entry is None or entry["difference"] is None:
        return None
    pair = f"{difference['model']} minus {difference['baseline']}"
    number = format_number(entry["difference"], 1, sign=True)
    interval = format_interval(entry["interval"])
    verdicts = {"contains 0": "not distinguishable from 0", "": ""}
    doubt = doubt_about(entry)
    return ", ".join(
        filter(None, [f"{pair} is {number} {interval}".rstrip(), verdicts.get(doubt, doubt)])
    )


def _overlap_sentence(sets: Sequence[ResultSet]) -> str | None:
    """From the first to the last overlap bin that has enough objects."""
    parts = []
    label = ("", "")
    for x in sets:
        bins = x.data.get("overlap_bins", [])
        bins = [b for b in bins if not b["few"] and b.get("AP") is not None]
        if len(bins) < 2:
            continue
        label = (bin_label(bins[0]), bin_label(bins[-1]))
        first, last = (format_number(b["AP"]) for b in (bins[0], bins[-1]))
        parts.append(f"from {first} to {last} for {x.model}")
    if not parts:
        return None
    return f"From objects with {label[0]} to those with {label[1]}, AP goes {_join(parts)}."


def _false_positive_sentence(sets: Sequence[ResultSet]) -> str | None:
    parts = []
    for x in sets:
        counts = x.data.get("false_positives")
        if counts and counts["total"]:
            share = 100 * (counts["seen"] + counts["unseen"]) / counts["total"]
            parts.append(f"{share:.0f} % for {x.model}")
    if not parts:
        return None
    return (
        f"Share of the false-positive pixels that lie on other objects: {_join(parts)}; the rest "
        "lies on the background."
    )


def _join(parts: Sequence[str]) -> str:
    """ "a, b and c"."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
