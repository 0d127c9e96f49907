"""docs/scoring.md names commands that exist, and the figures of the code."""

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

from stillroom.tools import doctor_local, doctor_storage, estimate_costs
from stillroom.tools.cli import COMMANDS
from stillroom.tools.doctor import Doctor
from stillroom.tools.estimate import EstimateJob

TEXT = (Path(__file__).parents[1] / "docs" / "scoring.md").read_text()


def defaults(settings: type[Any]) -> dict[str, Any]:
    """Default of every setting."""
    return {field.name: field.default for field in fields(settings)}


def test_commands_exist() -> None:
    named = re.findall(r"^stillroom (\w+)", TEXT, flags=re.MULTILINE)
    assert named == ["doctor", "estimate", "score", "status"]
    assert {*named, *re.findall(r"`stillroom (\w+)`", TEXT)} <= COMMANDS.keys()


def test_settings_have_these_defaults() -> None:
    job = defaults(EstimateJob)
    assert f"`count_parts` ({job['count_parts']})" in TEXT
    assert f"`trial_rows` ({job['trial_rows']})" in TEXT
    assert f"`--size-mb` ({defaults(Doctor)['size_mb']})" in TEXT
    assert f"newest {estimate_costs.COMMITS} shards" in TEXT


def test_limits_are_those_of_the_code() -> None:
    assert f"{estimate_costs.PART_WRITES} writes and {estimate_costs.PART_READS} reads" in TEXT
    room = f"less than {doctor_local.SCARCE_BYTES >> 30} GB (bad: {doctor_local.NO_BYTES >> 20} MB)"
    assert f"{room} or {doctor_local.SCARCE_FILES:,} files" in TEXT
    assert f"less than {doctor_storage.SLOW_MB_S:.0f} MB/s" in TEXT
    limits = doctor_storage.SKEW_S, doctor_storage.REFUSED_SKEW_S, doctor_storage.SLOW_MS
    assert limits == (60, 900, 1000), "a minute, a quarter of an hour, a second"
