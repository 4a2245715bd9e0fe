"""Annotations of other tools, read for tools/import_annotations.py."""
