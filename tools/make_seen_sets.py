#!/usr/bin/env python
"""Write the nested sets of seen COCO classes of Fig. 8. See --help."""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

from teacher_student_mask import NONVOC_CLASSES, VOC_CLASSES

REPOSITORY = Path(__file__).resolve().parents[1]
SIZES = (20, 30, 40, 50, 60, 70)

# What OPMask adds to the VOC classes in its own setting of 40 seen classes.
# fmt: off
OPMASK_CLASSES = (
    "traffic light", "fire hydrant", "bench", "giraffe", "backpack", "umbrella", "handbag",
    "skateboard", "fork", "apple", "sandwich", "orange", "hot dog", "donut", "toilet", "laptop",
    "toaster", "clock", "scissors", "toothbrush",
)
# fmt: on

DESCRIPTION = """
Writes lists of seen classes for the question how much more seen classes help (Fig. 8 of the paper):
  seen_20.json       the 20 VOC classes
  seen_30.json ...   10 non-VOC classes more each, up to
  seen_70.json
  always_unseen.txt  the 10 classes that none of them has
Every list begins with the smaller one. The 40 classes are OPMask's; apart from that the order is
drawn with the seed. The paper names the added classes in a figure only, so they may be others.
"""

EXAMPLES = """
examples:
  %(prog)s                                         the lists of configs/seen_sets, as they are
  %(prog)s --seed 1 --output-dir output/seen_sets  another draw

use:
  train_net.py ... DATASETS.SEEN_CLASSES configs/seen_sets/seen_40.json
  tools/sweep.py ... --seen-sets configs/seen_sets/*.json
"""


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--output-dir",
        type=Path,
        default=REPOSITORY / "configs" / "seen_sets",
        metavar="DIR",
        help="made if new (default: configs/seen_sets of this repository)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="(default: %(default)s)")
    return parser.parse_args(argv)


def order_of_classes(seed: int) -> list[str]:
    """All 80 classes in the order in which they become seen."""
    rng = random.Random(seed)  # nosec B311  # A draw that can be repeated, no secret.
    others = [name for name in NONVOC_CLASSES if name not in OPMASK_CLASSES]
    order = list(VOC_CLASSES)
    for names in (OPMASK_CLASSES, others):
        # Not rng.shuffle(): Python promises the same numbers in later versions for random() alone.
        order += sorted(names, key=lambda _: rng.random())
    return order


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns its exit code."""
    args = parse_args(argv)
    order = order_of_classes(args.seed)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    for size in SIZES:
        text = json.dumps(order[:size], indent=2) + "\n"
        (args.output_dir / f"seen_{size}.json").write_text(text, encoding="utf-8")
    always_unseen = order[SIZES[-1] :]
    lines = ["# In none of the lists of seen classes beside this file.", *always_unseen]
    (args.output_dir / "always_unseen.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")

    print(f"{SIZES[0]} classes: VOC")
    for smaller, size in zip(SIZES, SIZES[1:]):
        print(f"{size} classes: + {', '.join(order[smaller:size])}")
    print(f"always unseen: {', '.join(always_unseen)}")
    print(f"Written to {args.output_dir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
