"""README and docs are correct: links, files, modules, options and settings exist."""

import argparse
import importlib
import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from paths import ROOT

from afa import losses
from afa.config import ExperimentConfig, flatten, with_changes
from afa.data import corruptions
from afa.data.sources import registry
from afa.evaluation import benchmarks
from afa.models import views
from afa.retrieval import index
from experiments import configs, run

README = ROOT / "README.md"
PAGES = [README, ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
README_LINES = 120
IMAGE_BYTES = 200_000

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")
MODULE = re.compile(r"python3? -m ([\w.]+)")
FILES = (".json", ".csv", ".py")  # suffixes of file names that look like settings
HERE = re.compile(r"^(afa|experiments|launch|tests|docs)/")

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def prose(page: Path) -> str:
    """Returns a page without its code blocks."""
    return FENCE.sub("", page.read_text("utf-8"))


def quoted(page: Path) -> list[str]:
    """Returns the inline code of a page."""
    return re.findall(r"`([^`\n]+)`", prose(page))


def commands(page: Path) -> Iterator[tuple[str, list[str]]]:
    """Yields module and arguments of every `python -m` command in code blocks and inline code."""
    shell = [text for kind, text in FENCE.findall(page.read_text("utf-8")) if kind == "bash"]
    lines = [line for text in shell for line in text.splitlines()] + quoted(page)
    for part in (part for line in lines for part in line.split("&&")):
        words = shlex.split(part, comments=True)
        if "-m" in words and "python" in words[0]:
            at = words.index("-m") + 1
            yield words[at], words[at + 1 :]


def settings() -> dict[str, object]:
    """Returns all settings, including those of all losses."""
    config = ExperimentConfig()
    found = flatten(config)
    for name in losses.LOSSES:
        found |= flatten(with_changes(config, **{"loss.name": name}))
    return found


def anchors(page: Path) -> set[str]:
    """Returns the link anchors of the headings of a page."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def options(parser: argparse.ArgumentParser) -> set[str]:
    """Returns all options of a command and its actions."""
    names = set(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            names = names.union(*map(options, action.choices.values()))
    return names


@pages
def test_links_are_valid(page):
    for target in LINK.findall(page.read_text("utf-8")):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


@pages
def test_files_that_are_named_exist(page):
    named = [word for word in quoted(page) if HERE.match(word)]
    if page.name == "architecture.md":
        blocks = [text for kind, text in FENCE.findall(page.read_text("utf-8")) if not kind]
        named += [line.split()[0] for text in blocks for line in text.splitlines()]
    for word in named:
        assert (ROOT / word).exists(), word


def test_folders_in_the_map_of_the_readme_exist():
    text = re.search(r"^## Map\n+```\n(.*?)```$", README.read_text("utf-8"), re.M | re.S)
    assert text is not None
    top, found = "", set()
    for line in text[1].splitlines():
        folder, *_ = line.split()
        if not line.startswith(" "):
            top = ""
        for inner in re.findall(r"\b(\w+/)(?=[,; ]|$)", line.strip().partition(" ")[2]):
            assert (ROOT / top / folder / inner).is_dir(), inner
        assert (ROOT / top / folder).is_dir(), folder
        found.add(top + folder)
        top = top or folder
    packages = {f"afa/{path.parent.name}/" for path in (ROOT / "afa").glob("*/__init__.py")}
    assert packages <= found


@pages
def test_modules_can_be_started(page):
    for name in set(MODULE.findall(page.read_text("utf-8"))):
        found = importlib.util.find_spec(name)
        assert found is not None, name
        if name.startswith(("afa", "experiments", "launch")):
            assert found.origin is not None
            assert '__name__ == "__main__"' in Path(found.origin).read_text("utf-8"), name


@pages
def test_commands_have_their_options(page):
    for name, words in commands(page):
        if name == run.__name__:
            given = [word for word in words if word != "--help"]  # it would exit
            assert isinstance(run.parse([*given, "--scale=laptop"]), run.Command)
        elif name.startswith(("afa.", "experiments.")):
            module = importlib.import_module(name)
            source = Path(str(module.__file__)).read_text("utf-8")
            known = options(module.parser()) if hasattr(module, "parser") else source
            for word in words:
                assert not word.startswith("--") or word.partition("=")[0] in known, (name, word)


@pages
def test_settings_exist(page):
    known = settings()
    sections = {name.partition(".")[0] for name in known if "." in name}
    text = page.read_text("utf-8")
    named = re.findall(r"--(\w+\.\w+)", text)
    named += [
        found for word in quoted(page) for found in re.findall(r"^(\w+\.\w+\*?)(?==|$)", word)
    ]
    for name in named:
        if name.partition(".")[0] not in sections or name.endswith(FILES):
            continue
        begin = name.removesuffix("*")
        assert begin in known or (begin != name and any(x.startswith(begin) for x in known)), name


@pytest.mark.parametrize(
    ("page", "names"),
    [
        ("training.md", list(losses.LOSSES)),
        ("training.md", list(views.VIEWS)),
        ("data.md", list(registry.SETS)),
        ("data.md", list(corruptions.CORRUPTIONS)),
        ("evaluation.md", list(benchmarks.BENCHMARKS)),
        ("search.md", [f"{name}://" for name in index.ENGINES]),
    ],
)
def test_every_choice_is_documented(page, names):
    text = " ".join(quoted(ROOT / "docs" / page))
    assert [name for name in names if name not in text] == []


def test_experiments_that_are_named_exist():
    for page in PAGES:
        for name in re.findall(r"(?:--exp=|`)((?:afa|baseline)_\w{2,}|debug)", prose(page)):
            assert name in configs.names(), (page.name, name)


def test_readme_is_one_page_with_two_commands_and_an_image():
    text = README.read_text("utf-8")
    assert len(text.splitlines()) <= README_LINES
    job, tests, *_ = (text for kind, text in FENCE.findall(text) if kind == "bash")
    assert job.startswith("python3 -m venv") and "--exp=afa_resnet50" in job
    # .ci/run searches for this single line with the word pytest in a code block.
    assert re.findall(r"```bash\n(.*pytest.*)\n```", text) == [tests.rstrip("\n")]
    assert tests.startswith("python3 -m venv")
    images = re.findall(r"!\[[^\]]+\]\((\S+)\)", text)
    assert len(images) == 1
    assert (ROOT / images[0]).stat().st_size < IMAGE_BYTES


def test_every_page_of_docs_is_linked_from_readme_and_index():
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"index.md"}
    assert pages == set(re.findall(r"\]\((\w+\.md)\)", (ROOT / "docs/index.md").read_text("utf-8")))
    assert pages <= set(re.findall(r"\]\(docs/(\w+\.md)\)", README.read_text("utf-8")))
