"""Who made a mask: a human, or a model."""

from __future__ import annotations

__all__ = ["HUMAN", "MASK_SOURCES", "MODEL", "has_known_source", "is_from_model"]

# Values of an annotation's "mask_source". Without the key a mask is a human's.
HUMAN, MODEL = MASK_SOURCES = ("human", "model")


def has_known_source(annotation: dict) -> bool:
    """Whether ``mask_source`` is absent or one of :data:`MASK_SOURCES`."""
    return "mask_source" not in annotation or annotation["mask_source"] in MASK_SOURCES


def is_from_model(annotation: dict) -> bool:
    """
    Whether the mask of an annotation is one that a model made: SAM, an earlier run, ...

    Args:
        annotation: of a COCO json, or in Detectron2's format; its mask may be missing.
    """
    return annotation.get("mask_source") == MODEL
