"""Lists the images in a folder, by one rule for training sets, galleries, queries and distractors.

Folders are read recursively, symbolic links are followed, and a file is an image if it has the
suffix of an image format. Skipped, and reported by `Found.summaries`:

- hidden files and folders: names with a leading dot, and system folders (`@eaDir`, `__MACOSX`);
- image formats that cannot be decoded: HEIF without pillow-heif, camera raw files, ...;
- names that are not UTF-8, because ids are stored as text;
- broken links, and links to a folder that is read anyway, so that no image is listed twice and no
  loop is followed;
- folders that cannot be read;
- folders with results of this program: those of a run or an index, or that a command writes to.
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
SHOWN = 3  # names of each kind that are printed

HIDDEN = "hidden files and folders"
FORMAT = "images in unsupported formats"
NOT_UTF8 = "names that are not UTF-8"
BROKEN = "broken links"
DUPLICATE = "links to folders that are read already"
UNREADABLE = "folders that cannot be read"
RESULTS = "folders of results"

Parts = tuple[str, ...]


@dataclass
class Found:
    """The images of a folder.

    Attributes:
      root: the folder.
      files: path of each image relative to `root`, as its parts; sorted.
      skipped: reason -> paths, relative to `root`, that were skipped.
      folders: names of the folders directly below `root` that were read.
    """

    root: Path
    files: list[Parts] = field(default_factory=list)
    skipped: dict[str, list[Parts]] = field(default_factory=dict)
    folders: list[str] = field(default_factory=list)

    @property
    def paths(self) -> list[Path]:
        """The files, sorted."""
        return [self.root.joinpath(*parts) for parts in self.files]

    @property
    def ids(self) -> list[str]:
        """Paths of the files relative to the folder, with slashes."""
        return ["/".join(parts) for parts in self.files]

    def summaries(self) -> list[str]:
        """Returns one line per reason to skip: the number of paths, and the first of them."""
        return [summary(reason, names) for reason, names in self.skipped.items()]

    def skip(self, reason: str, parts: Parts) -> None:
        """Records a skipped path."""
        self.skipped.setdefault(reason, []).append(parts)


def images_under(root: Path, exclude: Iterable[Path] = ()) -> Found:
    """Lists the images in a folder and its subfolders, by the rule above. The list may be empty.

    Args:
      exclude: folders of results, which may not exist yet.

    Raises:
      UserError: `root` is not a folder, cannot be read, or has a name that is not UTF-8.
    """
    try:
        if not root.is_dir():
            what = "is not a directory" if root.exists() else "does not exist"
            raise UserError(f"{root}: {what}")
    except OSError as error:  # inside a folder without search permission
        raise UserError(f"{root}: cannot be read ({error.strerror})") from None
    if not is_text(str(root.absolute())):
        raise UserError(f"{root}: its name is not UTF-8, and ids and paths are stored as text")
    found = Found(root)
    excluded = {_identity(path) for path in exclude if path.is_dir()}
    seen: set[tuple[int, int]] = set()
    folders: list[Parts] = [()]
    links: list[Parts] = []
    while folders or links:  # links last: a folder is listed under its own path
        linked = not folders
        parts = links.pop(0) if linked else folders.pop()
        path = root.joinpath(*parts)
        try:
            identity = _identity(path)
            with os.scandir(path) as entries:
                content = list(entries)
        except OSError as error:
            if not parts:
                raise UserError(f"{root}: cannot be read ({error.strerror})") from None
            found.skip(UNREADABLE, parts)
            continue
        if identity in seen:
            found.skip(DUPLICATE, parts)
        elif parts and (identity in excluded or _holds_results(content)):
            found.skip(RESULTS, parts)
        else:
            _classify(content, parts, found, folders, links)
            found.folders += parts if len(parts) == 1 else ()
        seen.add(identity)
        links.sort()
    found.files.sort()
    for names in found.skipped.values():
        names.sort()
    return found


def some_under(root: Path, exclude: Sequence[Path] = ()) -> Found:
    """As `images_under`, but requires at least one image.

    Raises:
      UserError: as `images_under`, or no images; the message says what was skipped.
    """
    found = images_under(root, exclude)
    if not found.files:
        lines = "".join(f"; skipped: {line}" for line in found.summaries())
        raise UserError(f"{root}: contains no images{lines}")
    return found


def class_name(folder: str) -> str:
    """Returns the class name of a folder: NFC-normalised, because file systems differ in how they
    encode names such as `café`."""
    return unicodedata.normalize("NFC", folder)


def near_equal(names: Iterable[str]) -> list[tuple[str, str]]:
    """Returns pairs of class names that differ only in case, blanks, dashes or underscores."""
    first: dict[str, str] = {}
    pairs = []
    for name in sorted(names):
        folded = unicodedata.normalize("NFKC", name).casefold()
        key = "".join(c for c in folded if not c.isspace() and c not in "-_") or name
        if first.setdefault(key, name) != name:
            pairs.append((first[key], name))
    return pairs


def summary(what: str, names: Sequence[Parts]) -> str:
    """Returns one line with the number of paths and the first of them."""
    shown = ", ".join(printable("/".join(parts)) for parts in names[:SHOWN])
    more = f", and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{what} ({len(names)}): {shown}{more}"


def _classify(
    content: list["os.DirEntry[str]"],
    parts: Parts,
    found: Found,
    folders: list[Parts],
    links: list[Parts],
) -> None:
    """Sorts the entries of one folder into images, folders, links and skipped paths."""
    for entry in content:
        path = (*parts, entry.name)
        suffix = os.path.splitext(entry.name.lstrip("."))[1].lower()  # noqa: PTH122 (much faster)
        image = suffix in DECODED or suffix in HEIF or suffix in AVIF or suffix in OTHER
        folder = _is_folder(entry)
        if not folder and not image:
            continue
        if entry.name.startswith(".") or entry.name.lower() in SYSTEM:
            found.skip(HIDDEN, path)
        elif not is_text(entry.name):
            found.skip(NOT_UTF8, path)
        elif folder:
            (links if entry.is_symlink() else folders).append(path)
        elif not _decodable(suffix):
            found.skip(FORMAT, path)
        elif _is_file(entry):
            found.files.append(path)
        elif entry.is_symlink():
            found.skip(BROKEN, path)


def _decodable(suffix: str) -> bool:
    if suffix in HEIF:
        return heif_installed()
    return suffix in DECODED or (suffix in AVIF and bool(features.check("avif")))


def _holds_results(content: Iterable["os.DirEntry[str]"]) -> bool:
    names = {entry.name for entry in content}
    stored = any(name.startswith(INDEX_PREFIX) for name in names)
    return names >= RUN_FILES or (INDEX_FILE in names and stored)


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, or through a folder that cannot be read
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
    """Returns whether a name can be encoded as UTF-8."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
