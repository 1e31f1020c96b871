"""Pretrained weights: `python -m experiments.weights --list`, `--check FILE` or `--export RUN`.

--list shows every backbone with the source and licence of its published weights, parameters,
operations per image and input size. --check reads a file, a directory, a run of afa, hf://org/name
or pip://NAME, and reports the backbone that it belongs to, how every parameter is used, and, with
--logits, whether the network reproduces published logits. --export writes the backbone of a run as
safetensors, with the parameter names of torchvision or timm.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from afa.errors import UserError
from experiments.cli import Parser, perform

PROGRAM = "python -m experiments.weights"
SHOWN = 20  # parameters of each kind that --check names
MISFITS = ("missing", "unexpected", "mismatched")
TOLERANCE = 1e-3  # of --logits, relative to the largest absolute value


def parser() -> Parser:
    """Returns the parser of the command line."""
    options = Parser(prog=PROGRAM, description=(__doc__ or "").partition("\n\n")[2])
    one = options.add_mutually_exclusive_group(required=True)
    one.add_argument("--list", action="store_true", help="show every backbone")
    one.add_argument("--check", metavar="FILE", help="check a file of weights")
    one.add_argument("--export", metavar="RUN", help="write the backbone of a run")
    options.add_argument("--to", type=Path, metavar="FILE", help="with --export: the file")
    options.add_argument(
        "--backbone", metavar="NAME", help="with --check: the only backbone to try"
    )
    options.add_argument(
        "--part",
        metavar="NAME",
        default="",
        help="with --check: part of the file, as backbone.part of a run",
    )
    options.add_argument(
        "--logits", type=Path, metavar="FILE",
        help="with --check: npz with arrays images (uint8, NHWC), logits and optionally labels",
    )  # fmt: skip
    return options


def main(words: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    return perform(parser, _main, words)


def _main(chosen: argparse.Namespace) -> int:
    if (chosen.to is None) != (chosen.export is None):
        raise UserError("--export RUN and --to FILE go together")
    if chosen.check is None and (chosen.backbone or chosen.logits or chosen.part):
        raise UserError("--backbone, --part and --logits go with --check")
    if chosen.check is not None:
        return _check(chosen.check, chosen.backbone, chosen.part, chosen.logits)
    if chosen.list:
        _list()
    else:
        _export(chosen.export, chosen.to)
    return 0


def _list() -> None:
    from afa.console import table, track
    from afa.models import backbones
    from afa.models.pretrained import zoo

    rows = []
    for name in track(backbones.MEMBERS, "counting", len(backbones.MEMBERS)):
        member, weight = backbones.member(name), zoo.weigh(name)
        size = f"{member.input_size} px"
        rows.append([name, f"{weight.parameters / 1e6:.2f} M", f"{weight.operations / 1e9:.2f} G",
                     size, member.licence, member.source])  # fmt: skip
    columns = ["backbone", "parameters", "operations", "input", "licence", "weights"]
    table("backbones", rows, columns)


def _export(run: str, target: Path) -> None:
    from afa.io import require_writable, write_bytes
    from afa.models.pretrained import files

    if target.suffix != ".safetensors":
        raise UserError(f"--to={target}: the name must end in .safetensors")
    if not (Path(run) / files.CHECKPOINTS).is_dir():
        raise UserError(f"--export={run}: is not a run of afa")
    require_writable(target.absolute().parent, "--to")
    file = files.read(run)
    write_bytes(target, files.safetensors_of(file))
    print(f"{target}: {len(file.arrays)} tensors of the backbone of {run}")


def _check(source: str, backbone: str | None, part: str, logits: Path | None) -> int:
    from afa.console import status
    from afa.models import pretrained
    from afa.models.pretrained import zoo

    with status("comparing") as update:
        match = zoo.identify(
            source,
            [backbone] if backbone else None,
            lambda name: update(f"trying {name}"),
            part,
        )
    report, weights = match.report, match.weights
    print(f"backbone   {match.name}, {weights.names} names")
    print(f"sha256     {weights.sha256}")
    expected = weights.preprocessing
    mean, std = ([round(value, 4) for value in each] for each in (expected.mean, expected.std))
    print(f"images   {expected.channels}, mean {mean}, std {std}, crop {expected.crop:g}")
    for line in weights.notes:
        print(f"note       {line}")
    kinds = {
        kind: getattr(report, kind)
        for kind in ("loaded", "ignored", "missing", "unexpected", "mismatched", "invalid")
    }
    for kind, names in (kinds | {"outside": weights.outside}).items():
        few = ", ".join(names[:SHOWN]) + (" ..." if len(names) > SHOWN else "")
        print(f"{kind:<10} {len(names)}{'' if kind == 'loaded' or not names else ': ' + few}")
    # A run does not use the published classifier, so that its parameters need not match.
    misfits = [name.partition(":")[0] for kind in MISFITS for name in kinds[kind]]
    headless = bool(misfits) and all(map(pretrained.of_classifier, misfits))
    fits = not report.invalid and (headless or not misfits)
    if fits and logits:
        fits = _compare(match, logits)
    without = ", without the published classifier" if headless else ""
    print(f"fits{without}" if fits else "does not fit")
    return 0 if fits else 2


def _compare(match: object, path: Path) -> bool:
    """Compares logits with published ones; returns whether they agree."""
    from afa.models.pretrained import zoo
    from afa.models.pretrained.zoo import Identification

    assert isinstance(match, Identification)
    try:
        with np.load(path, allow_pickle=False) as file:
            stored = {name.partition("_")[0]: file[name] for name in file.files}
        images, expected = stored["images"], stored["logits"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"--logits={path}: needs arrays images and logits ({error})") from None
    logits = zoo.classify(match, images)
    error = float(np.abs(logits - expected).max() / np.abs(expected).max())
    same = float((logits.argmax(-1) == expected.argmax(-1)).mean())
    print(f"logits     largest relative error {error:.1e}; same top-1 class {100 * same:.0f} %")
    if "labels" in stored:
        right = float((logits.argmax(-1) == stored["labels"]).mean())
        print(f"labels     {100 * right:.0f} % correct")
    return error <= TOLERANCE


if __name__ == "__main__":
    sys.exit(main())
