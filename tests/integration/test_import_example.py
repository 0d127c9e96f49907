"""The example of an import runs, and prints a score for each token that the student wrote."""

import runpy
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "import" / "by_hand.py"


def test_a_rollout_made_by_hand_is_imported_and_scored(
    teacher_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main = runpy.run_path(str(EXAMPLE))["main"]
    main(str(teacher_dir), str(tmp_path / "cache"))
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith("added ['v000000-")
    assert len(lines) == int(first.partition(": ")[2].partition(" of ")[0])
    written = "".join(line.partition("nats  '")[2][:-1] for line in lines)
    assert written == "calculate(6 * 7)<|end|>It is 42.<|end|>"
    assert all(float(line.split()[0]) < 0 for line in lines)
    main(str(teacher_dir), str(tmp_path / "cache"))
    (again,) = capsys.readouterr().out.splitlines()
    assert again.startswith("added []: 0 of ")
