"""Which files of a folder are its images: one rule, for training, galleries, queries, distractors.

All folders below are read, links to files and folders are followed, and a file is an image when its
suffix is one of an image format. Left out, and told by `Found.told`:

- hidden files and folders: a dot first, or what systems add (`@eaDir`, `__MACOSX`);
- image formats that cannot be decoded here: HEIF without pillow-heif, camera raw files, ...;
- names that are not UTF-8, because ids are stored as text;
- links that lead nowhere, and links to a folder that is read anyhow, so that no image comes twice
  and no loop is followed;
- folders that may not be read;
- results of this program: folders that hold a run or an index, or that a command writes to.
"""

import os
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import features

from afa.data.images import heif_installed
from afa.errors import UserError, printable

DECODED = frozenset(
    (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff",
     ".ppm", ".pgm", ".pbm", ".pnm")
)  # fmt: skip
HEIF = frozenset((".heic", ".heif", ".hif"))
AVIF = frozenset((".avif",))
OTHER = frozenset(
    (".jxl", ".jp2", ".j2k", ".psd", ".svg", ".exr", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf",
     ".orf", ".rw2", ".pef", ".srw")
)  # fmt: skip
SYSTEM = frozenset(
    ("@eadir", "__macosx", "#recycle", "$recycle.bin", "system volume information", "lost+found")
)
RUN_FILES = frozenset(("config.json", "split.json"))
INDEX_FILE, INDEX_PREFIX = "index.json", "embeddings-"
SHOWN = 3  # names of each kind that are told

HIDDEN = "hidden files and folders"
FORMAT = "images of formats that are not decoded here"
NOT_UTF8 = "names that are not UTF-8"
NOWHERE = "links that lead nowhere"
AGAIN = "links to folders that are read already"
CLOSED = "folders that may not be read"
OURS = "folders of results"

Parts = tuple[str, ...]


@dataclass
class Found:
    """The images of a folder.

    Attributes:
      root: the folder.
      files: each image as the names on the way to it, sorted.
      left_out: why -> names, relative to `root`, of what is not among them.
      folders: names of the folders right below `root` that were read.
    """

    root: Path
    files: list[Parts] = field(default_factory=list)
    left_out: dict[str, list[Parts]] = field(default_factory=dict)
    folders: list[str] = field(default_factory=list)

    @property
    def paths(self) -> list[Path]:
        """The files, sorted."""
        return [self.root.joinpath(*parts) for parts in self.files]

    @property
    def ids(self) -> list[str]:
        """Names of the files, relative to the folder, with slashes."""
        return ["/".join(parts) for parts in self.files]

    def told(self) -> list[str]:
        """A line for each reason for which something is left out: how many, and the first."""
        return [told(why, names) for why, names in self.left_out.items()]

    def note(self, why: str, parts: Parts) -> None:
        """Keeps what is left out, and why."""
        self.left_out.setdefault(why, []).append(parts)


def images_under(root: Path, apart: Iterable[Path] = ()) -> Found:
    """The images in a folder and all folders below, by the rule above; none may be there.

    Args:
      apart: folders of results, which may not exist yet.

    Raises:
      UserError: no such folder, one that may not be read, or one whose name is not UTF-8.
    """
    try:
        if not root.is_dir():
            what = "is no directory" if root.exists() else "does not exist"
            raise UserError(f"{root}: {what}")
    except OSError as error:  # below a folder that may not be entered
        raise UserError(f"{root}: may not be read ({error.strerror})") from None
    if not is_text(str(root.absolute())):
        raise UserError(f"{root}: its name is not UTF-8, and ids and paths are stored as text")
    found = Found(root)
    others = {_identity(path) for path in apart if path.is_dir()}
    seen: set[tuple[int, int]] = set()
    folders: list[Parts] = [()]
    links: list[Parts] = []
    while folders or links:  # links last: a folder keeps its own name
        linked = not folders
        parts = links.pop(0) if linked else folders.pop()
        place = root.joinpath(*parts)
        try:
            identity = _identity(place)
            with os.scandir(place) as entries:
                content = list(entries)
        except OSError as error:
            if not parts:
                raise UserError(f"{root}: may not be read ({error.strerror})") from None
            found.note(CLOSED, parts)
            continue
        if identity in seen:
            found.note(AGAIN, parts)
        elif parts and (identity in others or _is_ours(content)):
            found.note(OURS, parts)
        else:
            _sort(content, parts, found, folders, links)
            found.folders += parts if len(parts) == 1 else ()
        seen.add(identity)
        links.sort()
    found.files.sort()
    for names in found.left_out.values():
        names.sort()
    return found


def some_under(root: Path, apart: Sequence[Path] = ()) -> Found:
    """As `images_under`, where there must be images.

    Raises:
      UserError: also when there are none; what was left out is told.
    """
    found = images_under(root, apart)
    if not found.files:
        lines = "".join(f"; left out: {line}" for line in found.told())
        raise UserError(f"{root}: holds no images{lines}")
    return found


def class_name(folder: str) -> str:
    """The name of a class from that of its folder: composed Unicode, so that `café` is one class
    however a file system writes it."""
    return unicodedata.normalize("NFC", folder)


def near_equal(names: Iterable[str]) -> list[tuple[str, str]]:
    """Pairs of class names that differ in case, blanks, dashes or underscores only."""
    first: dict[str, str] = {}
    pairs = []
    for name in sorted(names):
        folded = unicodedata.normalize("NFKC", name).casefold()
        key = "".join(c for c in folded if not c.isspace() and c not in "-_") or name
        if first.setdefault(key, name) != name:
            pairs.append((first[key], name))
    return pairs


def told(what: str, names: Sequence[Parts]) -> str:
    """A line that counts what it names, and names the first of them."""
    shown = ", ".join(printable("/".join(parts)) for parts in names[:SHOWN])
    more = f", and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{what} ({len(names)}): {shown}{more}"


def _sort(
    content: list["os.DirEntry[str]"],
    parts: Parts,
    found: Found,
    folders: list[Parts],
    links: list[Parts],
) -> None:
    """Puts the entries of one folder where they belong."""
    for entry in content:
        here = (*parts, entry.name)
        suffix = os.path.splitext(entry.name.lstrip("."))[1].lower()  # noqa: PTH122 (much faster)
        image = suffix in DECODED or suffix in HEIF or suffix in AVIF or suffix in OTHER
        folder = _is_folder(entry)
        if not folder and not image:
            continue
        if entry.name.startswith(".") or entry.name.lower() in SYSTEM:
            found.note(HIDDEN, here)
        elif not is_text(entry.name):
            found.note(NOT_UTF8, here)
        elif folder:
            (links if entry.is_symlink() else folders).append(here)
        elif not _decodable(suffix):
            found.note(FORMAT, here)
        elif _is_file(entry):
            found.files.append(here)
        elif entry.is_symlink():
            found.note(NOWHERE, here)


def _decodable(suffix: str) -> bool:
    if suffix in HEIF:
        return heif_installed()
    return suffix in DECODED or (suffix in AVIF and bool(features.check("avif")))


def _is_ours(content: Iterable["os.DirEntry[str]"]) -> bool:
    names = {entry.name for entry in content}
    stored = any(name.startswith(INDEX_PREFIX) for name in names)
    return names >= RUN_FILES or (INDEX_FILE in names and stored)


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, or through a folder that may not be read
        return False


def _is_file(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_file()
    except OSError:
        return False


def _identity(path: Path) -> tuple[int, int]:
    state = path.stat()
    return state.st_dev, state.st_ino


def is_text(name: str) -> bool:
    """Whether a name can be stored as UTF-8."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
