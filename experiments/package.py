"""Packs a run for a service: `python -m experiments.package --run=DIR --out=DIR`.

The directory embeds images as the run's search does, on CPUs, GPUs and TPUs, with JAX, NumPy
and a decoder of images alone; see `afa.serving.predictor` for how to use it.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.cli import Parser, perform

PROGRAM = "python -m experiments.package"


def parser() -> Parser:
    """The command's options."""
    options = Parser(prog=PROGRAM, description=(__doc__ or "").partition("\n\n")[2])
    options.add_argument("--run", required=True, type=Path, help="directory of a finished run")
    options.add_argument(
        "--out", required=True, type=Path, metavar="DIR", help="the package: a new directory"
    )
    options.add_argument(
        "--precision", choices=("float32", "bfloat16"), default=None,
        help="arithmetic on accelerators (default: as the run's train.precision has it there)",
    )  # fmt: skip
    options.add_argument(
        "--onnx", action="store_true", help="write an ONNX model as well (pip install 'afa[onnx]')"
    )
    return options


def main(words: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    return perform(parser, _main, words)


def _main(chosen: argparse.Namespace) -> int:
    # Here and not above: `--help` and a misspelt option answer at once.
    from afa.serving.package import pack

    manifest = pack(chosen.run, chosen.out, chosen.precision, chosen.onnx)
    files = manifest["files"].values()
    size = sum(each["bytes"] for each in files) / 2**20
    print(f"{chosen.out}: {len(files)} files, {size:.1f} MiB, {manifest['checkpoint']}")
    for name, apart in manifest["apart"].items():
        proof = "not run here" if apart is None else f"{apart:.0e} from the run's own vectors"
        family = manifest["families"].get(name, {"programs": ["any"], "precision": "float32"})
        rows = ", ".join(family["programs"])
        print(f"  {name:<11}  {rows} at once, {family['precision']}: {proof}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
