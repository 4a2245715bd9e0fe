"""Annotations as the programs rewrite them: what changes, and the bytes that stay."""
