"""Packages a run for a service: `python -m experiments.package --run=DIR --out=DIR`.

The package embeds images as the run does for search, on CPUs, GPUs and TPUs. It needs only JAX,
NumPy and an image decoder; `afa.serving.predictor` shows its use.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.cli import Parser, perform

PROGRAM = "python -m experiments.package"


def parser() -> Parser:
    """Returns the parser of the command line."""
    options = Parser(prog=PROGRAM, description=(__doc__ or "").partition("\n\n")[2])
    options.add_argument("--run", required=True, type=Path, help="directory of a finished run")
    options.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="the package: a new directory"
    )
    options.add_argument(
        "--precision", choices=("float32", "bfloat16"), default=None,
        help="precision on accelerators (default: train.precision of the run)",
    )  # fmt: skip
    options.add_argument(
        "--onnx", action="store_true", help="also write an ONNX model (pip install 'afa[onnx]')"
    )
    return options


def main(words: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    return perform(parser, _main, words)


def _main(chosen: argparse.Namespace) -> int:
    # Imported here so that `--help` and errors in options are fast.
    from afa.serving.package import pack

    manifest = pack(chosen.run, chosen.out, chosen.precision, chosen.onnx)
    files = manifest["files"].values()
    size = sum(each["bytes"] for each in files) / 2**20
    print(f"{chosen.out}: {len(files)} files, {size:.1f} MiB, {manifest['checkpoint']}")
    for name, error in manifest["apart"].items():
        checked = "not run here" if error is None else f"{error:.0e} from the vectors of the run"
        family = manifest["families"].get(name, {"programs": ["any"], "precision": "float32"})
        rows = ", ".join(family["programs"])
        print(f"  {name:<11}  batch size {rows}, {family['precision']}: {checked}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
