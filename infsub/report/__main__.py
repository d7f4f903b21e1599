"""`python -m infsub.report --workdirs runs/ffg AF=runs/af --out tables`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from infsub.report import join
from infsub.types import UserError


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m infsub.report`."""
    parser = argparse.ArgumentParser(
        prog="python -m infsub.report", description="One table and one figure of several runs."
    )
    parser.add_argument(
        "--workdirs", nargs="+", required=True, metavar="DIR", help="runs, each DIR or NAME=DIR"
    )
    parser.add_argument(
        "--out",
        type=os.path.expanduser,
        default="report",
        metavar="DIR",
        help="folder to write into (default: report)",
    )
    given = parser.parse_args(arguments)
    try:
        left_out = join(given.workdirs, given.out)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:  # a full disk
        print(f"{given.out} cannot be written to ({error.strerror}).", file=sys.stderr)
        return 1
    for name, why in left_out.items():
        print(f"{name} is left out: {why}", file=sys.stderr)
    return int(bool(left_out))


if __name__ == "__main__":
    sys.exit(main())
