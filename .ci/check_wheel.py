"""Check a built wheel: what is in it, and that it works where the source folders are not.

The wheel goes into a fresh environment that borrows only the dependencies of the one this runs in:
a `.pth` line adds their folder to the path, which does not run the editable install's own hook.
"""

import os
import subprocess
import sys
import sysconfig
import tempfile
import venv
import zipfile
from pathlib import Path

PACKAGES = ("cache", "replay", "train", "tools")
WHERE = "import stillroom.cache as m; print(next(iter(m.__path__)))"


def fail(message: str) -> None:
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


def check_works(wheel: Path, scratch: Path) -> None:
    """The installed wheel imports from its own folder, and `stillroom --help` works."""
    home = scratch / "venv"
    venv.create(home, with_pip=False)
    python = home / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python)]
    subprocess.run([*pip, "install", "-q", "--no-deps", "--no-index", str(wheel)], check=True)
    paths = {"base": str(home), "platbase": str(home)}
    site = Path(sysconfig.get_path("purelib", "venv", paths))
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    where = subprocess.run(
        [python, "-c", WHERE], cwd=scratch, env=env, check=True, capture_output=True, text=True
    ).stdout.strip()
    if not Path(where).is_relative_to(site):
        fail(f"expected stillroom under {site}; it was imported from {where}")
    subprocess.run(
        [home / "bin" / "stillroom", "--help"],
        cwd=scratch,
        env=env,
        check=True,
        stdout=subprocess.DEVNULL,
    )


def main() -> None:
    """Check the wheel named on the command line."""
    wheel = Path(sys.argv[1]).resolve()
    check_names(wheel)
    with tempfile.TemporaryDirectory() as scratch:
        check_works(wheel, Path(scratch).resolve())
    print(f"{wheel.name}: one top-level name, typed, imports and runs on its own")


if __name__ == "__main__":
    main()
