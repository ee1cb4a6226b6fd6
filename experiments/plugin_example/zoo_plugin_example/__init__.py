"""A mixer and a task for zoo, found through the entry points in pyproject.toml."""
