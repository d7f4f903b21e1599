"""Every benchmark in turn, each in a process of its own: `make bench`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HELPERS = {"run.py", "timing.py"}

if __name__ == "__main__":
    for script in sorted(Path(__file__).parent.glob("*.py")):
        if script.name not in HELPERS:
            print(f"\n== {script.stem}", flush=True)
            subprocess.run([sys.executable, script], check=True)
