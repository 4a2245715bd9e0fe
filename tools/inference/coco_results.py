"""What a model has found in images, in COCO's format."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Instances
from tabulate import tabulate


@dataclass(frozen=True)
class Classes:
    """
    Args:
        names: of the contiguous ids.
        dataset_ids: the category ids that the dataset's json has for the contiguous ids.
    """

    names: list[str]
    dataset_ids: list[int]


@dataclass
class Predictions:
    """What has been found so far, in COCO's format."""

    classes: Classes
    images: list[dict] = field(default_factory=list)
    results: list[dict] = field(default_factory=list)
    seconds: float = 0.0
    counts: Counter = field(default_factory=Counter)

    def add(self, image: dict, instances: Instances, seconds: float) -> None:
        """
        Args:
            image: fields of the image for images.json; it is given an id.
            instances: the detections, on the CPU.
            seconds: how long the model took.
        """
        image_id = len(self.images) + 1
        height, width = instances.image_size
        self.images.append({"id": image_id, "height": height, "width": width, **image})
        for result in instances_to_coco_json(instances, image_id):
            self.counts[result["category_id"]] += 1
            result["category_id"] = self.classes.dataset_ids[result["category_id"]]
            self.results.append(result)
        self.seconds += seconds

    def write(self, output_dir: Path) -> None:
        """Write the two json files."""
        classes = zip(self.classes.dataset_ids, self.classes.names)
        images = {
            "info": {"description": "Images and categories of coco_instances_results.json"},
            "images": self.images,
            # COCO(...) of pycocotools wants the key.
            "annotations": [],
            "categories": [{"id": i, "name": name} for i, name in classes],
        }
        for name, content in (
            ("images.json", images),
            ("coco_instances_results.json", self.results),
        ):
            with open(output_dir / name, "w", encoding="utf-8") as f:
                json.dump(content, f)

    def table(self) -> str:
        """Images, detections and time, then detections per class."""
        per_image = f"{self.seconds / len(self.images):.3f}" if self.images else "-"
        rows = [
            ["images and frames", len(self.images)],
            ["seconds per image", per_image],
            ["detections", len(self.results)],
        ]
        rows += [[f"  {self.classes.names[i]}", n] for i, n in self.counts.most_common()]
        return tabulate(
            rows,
            colalign=("left", "right"),
            disable_numparse=True,
            preserve_whitespace=True,
        )
