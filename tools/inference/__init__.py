"""Models, media and overlays, for the programs that show what a model finds."""
