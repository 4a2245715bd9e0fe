"""Many trainings: tools/sweep.py's plan, records and summary, and the processes."""
