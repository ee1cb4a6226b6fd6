"""`python -m zoo` is the `zoo` command."""

from __future__ import annotations

from zoo.cli import main

if __name__ == "__main__":
    main(prog_name="zoo")
