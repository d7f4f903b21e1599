"""`infsub` and `python -m infsub`: the command of infsub.main, under shorter names."""

from __future__ import annotations

import runpy


def command() -> None:
    """Runs infsub.main as `python -m` does: absl's help is of the module that is __main__."""
    runpy.run_module("infsub.main", run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    command()
