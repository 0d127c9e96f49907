"""The shape of the repository: who may import whom, what is packaged, and what an import costs."""

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT = {
    "cache": {"cache"},
    "replay": {"cache", "replay"},
    "train": {"cache", "replay", "train"},
    "tools": {"cache", "replay", "train", "tools"},
}
MAX_LINES = 500
MAX_FUNCTION_LINES = 60


def python_files(*folders: str) -> list[Path]:
    """All Python files under some folders of the repository, sorted."""
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def imported_names(source: str) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every import, nested ones too; relative ones start with a dot."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module == "stillroom":
            yield from ((node.lineno, f"stillroom.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, "." * node.level + (node.module or "")


def forbidden_imports(source: str, allowed: set[str]) -> list[str]:
    """What is wrong with the imports of one file that may use the `allowed` folders."""
    wrong = []
    for line, name in imported_names(source):
        first, _, rest = name.partition(".")
        folder = rest.partition(".")[0]
        if first == "":
            wrong.append(f"{line}: relative import {name!r}: write stillroom.<folder>.<file>")
        elif first in MAY_IMPORT:
            wrong.append(f"{line}: bare import {name!r}: write stillroom.{name}")
        elif first == "stillroom" and folder and folder not in allowed:
            wrong.append(f"{line}: imports {name}; only {sorted(allowed)} may be imported here")
    return wrong


@pytest.mark.parametrize("folder", sorted(MAY_IMPORT))
def test_imports_point_one_way(folder: str) -> None:
    wrong = {
        str(path.relative_to(ROOT)): found
        for path in python_files(folder)
        if (found := forbidden_imports(path.read_text(), MAY_IMPORT[folder]))
    }
    assert not wrong


def test_tests_and_examples_import_the_installed_name() -> None:
    wrong = {
        str(path.relative_to(ROOT)): found
        for path in python_files("tests", "examples")
        if (found := forbidden_imports(path.read_text(), set(MAY_IMPORT)))
    }
    assert not wrong


@pytest.mark.parametrize(
    "source",
    [
        "from . import plan",
        "from .plan import make",
        "import cache",
        "from cache.errors import StillroomError",
        "import stillroom.train.loss",
        "from stillroom import tools",
        "def late():\n    from stillroom.train import loss",
    ],
)
def test_the_import_check_sees_what_it_must(source: str) -> None:
    assert len(forbidden_imports(source, MAY_IMPORT["replay"])) == 1


def test_packages_are_the_folders_on_disk_and_flat() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    on_disk = sorted(path.parent.name for path in ROOT.glob("*/py.typed"))
    assert on_disk == sorted(MAY_IMPORT)
    assert sorted(settings["packages"]) == [f"stillroom.{folder}" for folder in on_disk]
    assert settings["package-dir"] == {f"stillroom.{folder}": folder for folder in on_disk}
    nested = [path for path in python_files(*MAY_IMPORT) if path.parent.parent != ROOT]
    assert not nested, "a sub-package would be missing from the wheel"


def test_no_file_is_too_long() -> None:
    files = python_files(*MAY_IMPORT, "tests", "examples")
    lines = {str(path.relative_to(ROOT)): path.read_text().count("\n") for path in files}
    assert not {name: count for name, count in lines.items() if count > MAX_LINES}


def function_lines(source: str) -> dict[str, int]:
    """Lines of every function by its first line and name, decorators and docstring included."""
    found = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            first = min(part.lineno for part in (node, *node.decorator_list))
            found[f"{first}: {node.name}"] = (node.end_lineno or first) - first + 1
    return found


def test_no_function_is_too_long() -> None:
    lines = {
        f"{path.relative_to(ROOT)}:{name}": count
        for path in python_files(*MAY_IMPORT)
        for name, count in function_lines(path.read_text()).items()
    }
    assert lines
    assert not {name: count for name, count in lines.items() if count > MAX_FUNCTION_LINES}


def test_decorators_and_docstrings_count() -> None:
    source = "@cache\n@more(\n    1\n)\ndef a():\n    'doc'\n\n    async def b(): ...\n"
    assert function_lines(source) == {"1: a": 8, "8: b": 1}


@pytest.mark.dist
@pytest.mark.parametrize("module", ["stillroom.cache", "stillroom.replay", "stillroom.tools.cli"])
def test_reading_needs_no_torch(module: str, tmp_path: Path) -> None:
    code = f"import sys, {module}; print({{'torch', 'transformers'}} & set(sys.modules) or 'none')"
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "none"


def first_paragraph(path: Path) -> str:
    """The first paragraph of a module's docstring, on one line."""
    doc = ast.get_docstring(ast.parse(path.read_text())) or ""
    return " ".join(doc.split("\n\n")[0].split())


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_every_file_is_listed_in_its_own_words(folder: str) -> None:
    """`docs/files.md` has a row for each file, in order, and none for files that are gone."""
    sections = (ROOT / "docs" / "files.md").read_text().split("\n## ")
    [section] = [text for text in sections if text.startswith(f"{folder}/\n")]
    listed = [line for line in section.splitlines() if line.startswith("| `")]
    paths = [path for path in python_files(folder) if path.name != "__init__.py"]
    expected = [f"| `{path.name}` | {first_paragraph(path)} |" for path in paths]
    wrong = {"to add": set(expected) - set(listed), "to remove": set(listed) - set(expected)}
    assert not any(wrong.values()), wrong
    assert listed == expected, "the rows are in another order than the names"


@pytest.mark.parametrize("folder", MAY_IMPORT)
def test_every_folder_is_listed_in_its_own_words(folder: str) -> None:
    words = first_paragraph(ROOT / folder / "__init__.py")
    assert f"| **{folder}/** | {words} |\n" in (ROOT / "README.md").read_text()
    assert f"\n## {folder}/\n{words}\n" in (ROOT / "docs" / "files.md").read_text()
