"""Check a built wheel: what is in it, what it needs, and that it works where the folders are not.

The wheel goes into a fresh environment that borrows only the dependencies of the one this runs in:
a `.pth` line adds their folder to the path, which does not run the editable install's own hook.
"""

import ast
import email
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import NoReturn

PACKAGES = ("cache", "replay", "train", "tools")
EXTRAS_FOR_USE = ("bench", "ray", "vllm")  # the others serve development and the examples
IMPORT_ALL = """
import importlib, sys
for name in sys.argv[1:]:
    try:
        print(importlib.import_module(name).__file__)
    except ModuleNotFoundError as error:
        if error.name not in ("trl",):  # modules about it are loaded only where it is installed
            raise
"""


def fail(message: str) -> NoReturn:
    """Stop with a message and exit code 1."""
    sys.exit(f"check_wheel: {message}")


def check_names(wheel: Path) -> None:
    """The wheel holds one top-level name, and py.typed in each package."""
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    if top != {"stillroom"}:
        fail(f"{wheel}: expected the one top-level name 'stillroom'; got {sorted(top)}")
    for package in PACKAGES:
        if f"stillroom/{package}/py.typed" not in names:
            fail(f"{wheel}: expected stillroom/{package}/py.typed; it is not there")


def sources(wheel: Path) -> dict[str, str]:
    """Source of every module in the wheel, by dotted name."""
    with zipfile.ZipFile(wheel) as archive:
        paths = [name for name in archive.namelist() if name.endswith(".py")]
        return {
            path.removesuffix(".py").removesuffix("/__init__").replace("/", "."): archive.read(
                path
            ).decode()
            for path in paths
        }


def imports(source: str) -> Iterator[str]:
    """Top-level name of every absolute import, nested ones too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.module.split(".")[0]


def canonical(distribution: str) -> str:
    """A distribution's name in the one form that compares equal."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


def requirements(wheel: Path) -> set[str]:
    """Distributions that the wheel requires, those of the extras for use included."""
    with zipfile.ZipFile(wheel) as archive:
        (path,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(path))
    found = set()
    for line in metadata.get_all("Requires-Dist", []):
        name = re.match(r"[A-Za-z0-9._-]+", line)
        extra = re.search(r"extra\s*==\s*['\"]([^'\"]+)", line)
        if name and (extra is None or extra[1] in EXTRAS_FOR_USE):
            found.add(canonical(name[0]))
    return found


def check_requirements(wheel: Path) -> None:
    """Whatever a module imports comes with Python, with the wheel, or with what it requires."""
    required, known = requirements(wheel), packages_distributions()
    given = {*sys.stdlib_module_names, "stillroom"}
    for module, source in sources(wheel).items():
        for name in sorted(set(imports(source)) - given):
            distributions = {canonical(d) for d in known.get(name, [name])}
            if not distributions & required:
                fail(
                    f"{module} imports {name}: expected one of {sorted(distributions)} "
                    "in Requires-Dist; none is there. Add one to pyproject.toml's dependencies."
                )


def install(wheel: Path, home: Path) -> Path:
    """Make an environment with the wheel; returns the folder that it was installed to."""
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python)]
    subprocess.run([*pip, "install", "-q", "--no-deps", "--no-index", str(wheel)], check=True)
    paths = {"base": str(home), "platbase": str(home)}
    site = Path(sysconfig.get_path("purelib", "venv", paths))
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return site


def check_works(wheel: Path, scratch: Path) -> None:
    """Every module imports from the environment's own folder, and the command works."""
    home = scratch / "venv"
    site = install(wheel, home)
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}

    def call(program: str, *args: str) -> subprocess.CompletedProcess[str]:
        command = [str(home / "bin" / program), *args]
        return subprocess.run(
            command, cwd=scratch, env=env, check=False, capture_output=True, text=True
        )

    imported = call("python", "-c", IMPORT_ALL, *sources(wheel))
    if imported.returncode != 0:
        fail(f"expected every module to import; got\n{imported.stderr}")
    for file in imported.stdout.split():
        if not Path(file).is_relative_to(site):
            fail(f"expected stillroom under {site}; it was imported from {file}")
    usage = call("stillroom", "--help")
    if usage.returncode != 0:
        fail(f"stillroom --help: expected exit status 0; got {usage.returncode}\n{usage.stderr}")
    missing = call("stillroom", "status", "nowhere")
    if missing.returncode != 2 or "Traceback" in missing.stderr:
        got = f"{missing.returncode}\n{missing.stderr}"
        fail(f"stillroom status of no cache: expected exit status 2, no traceback; got {got}")


def main() -> None:
    """Check the wheel named on the command line."""
    wheel = Path(sys.argv[1]).resolve()
    check_names(wheel)
    check_requirements(wheel)
    with tempfile.TemporaryDirectory() as scratch:
        check_works(wheel, Path(scratch).resolve())
    print(f"{wheel.name}: one top-level name, typed, requires what it imports, runs on its own")


if __name__ == "__main__":
    main()
