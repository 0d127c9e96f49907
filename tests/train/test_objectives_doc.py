"""docs/objectives.md runs, and names every setting."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from stillroom.train.objective import IMPORTANCE, KINDS, MODES, Objective

TEXT = (Path(__file__).parents[2] / "docs" / "objectives.md").read_text()


def test_the_example_runs() -> None:
    found: dict[str, Any] = {}
    for block in re.findall(r"^```python\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL):
        exec(block, found)
    assert found["loss"].shape == (2,)
    assert (found["loss"] > 0).all()
    gradient = found["student_logits"].grad
    assert gradient.abs().max().item() > 0
    torch.testing.assert_close(gradient.sum(1), torch.zeros(2))


@pytest.mark.parametrize("name", [*KINDS, *MODES, *IMPORTANCE])
def test_every_choice_has_a_line_in_a_table(name: str) -> None:
    assert re.search(rf"^\| `{name}` \|", TEXT, flags=re.MULTILINE)


@pytest.mark.parametrize("field", dataclasses.fields(Objective), ids=lambda field: field.name)
def test_every_setting_is_named(field: dataclasses.Field[Any]) -> None:
    assert re.search(rf"`{field.name}\b|^  {field.name}:", TEXT, flags=re.MULTILINE)
