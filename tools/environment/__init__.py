"""How tools/setup_environment.py makes the environment; the standard library alone."""
