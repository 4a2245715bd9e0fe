"""How many masks of the training data a model made."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence

from detectron2.data import DatasetCatalog

from ..checks.mask_sources import is_from_model

__all__ = ["ModelMaskCounts"]

logger = logging.getLogger(__name__)


class ModelMaskCounts:
    """The numbers of masks with ``mask_source`` "model", of an image; read when first asked for."""

    def __init__(self, datasets: Sequence[str]):
        """
        Args:
            datasets: names of registered datasets.
        """
        self.datasets = tuple(datasets)
        self._counts: dict[str, Counter[int]] | None = None

    def __call__(self, file_name: str) -> Mapping[int, int]:
        """
        Args:
            file_name: of an image, as the dataset has it.

        Returns:
            {contiguous class id: number}, without crowds; empty for an image that is not there.
        """
        if self._counts is None:
            self._counts = self._count()
        return self._counts.get(file_name, {})

    def _count(self) -> dict[str, Counter[int]]:
        counts: dict[str, Counter[int]] = {}
        for name in dict.fromkeys(self.datasets):
            for image in DatasetCatalog.get(name):
                found = Counter(
                    x["category_id"]
                    for x in image.get("annotations", ())
                    if is_from_model(x) and x.get("segmentation") and not x.get("iscrowd", 0)
                )
                if found:
                    # The same image may be in several datasets.
                    counts[image["file_name"]] = counts.get(image["file_name"], Counter()) | found
        total = sum(sum(x.values()) for x in counts.values())
        logger.info(
            f"{total} masks in {len(counts)} images of {', '.join(self.datasets)} were made by a "
            "model ('mask_source' 'model'): the teacher does not learn from them."
        )
        return counts
