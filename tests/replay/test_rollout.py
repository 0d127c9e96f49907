"""The rollout job: planned units have fixed names, and are sampled once however often it runs."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stillroom.cache.claims import Claims
from stillroom.cache.errors import ConfigError, InputError, NumericsError
from stillroom.cache.part import part_name, rollout_id
from stillroom.cache.store import Cache
from stillroom.replay.cycle import Cycle, Unit, plan_cycle
from stillroom.replay.rollout import UnitSampler, rollout
from stillroom.replay.sampler import Sampled, SamplerConfig
from tests.replay.conftest import IDENTITY, make_prompts

CONFIG = SamplerConfig(samples_per_prompt=2, max_new_tokens=4, temperature=0.7)
PROMPTS = make_prompts(5)
UNIT = Unit(
    policy_version=3,
    source="student",
    prompt_ids=(1, 2**64 - 1),
    sampler={"samples_per_prompt": 1, "temperature": 1.0},
    seed=7,
)


@dataclass
class FakeSampler:
    """Draws from a seeded generator, out of order; notes what it was asked for."""

    made: int = 0
    asked: list[tuple[list[list[int]], int]] = field(default_factory=list)
    fail_at: int | None = None

    def make(self) -> "FakeSampler":
        """What the job calls to get a sampler."""
        self.made += 1
        return self

    def sample(self, prompts: Sequence[np.ndarray], seed: int) -> Iterator[tuple[int, Sampled]]:
        """Give each prompt a completion that begins with the prompt's number in this call."""
        if len(self.asked) == self.fail_at:
            raise NumericsError("student", "finite logits", "NaN", "Stop.")
        self.asked.append(([prompt.tolist() for prompt in prompts], seed))
        rng = np.random.default_rng(seed)
        for index in reversed(range(len(prompts))):
            completion = np.array([index, *rng.integers(0, 50, index % 3)], np.uint32)
            logprob = -rng.random(len(completion)).astype(np.float32)
            yield index, Sampled(completion, logprob, "stop" if index % 2 else "length")


def plan(**changes: Any) -> Cycle:
    """A cycle of three units over five prompts."""
    settings = {"policy_version": 0, "seed": 1, "unit_rollouts": 4} | changes
    return plan_cycle(PROMPTS, CONFIG, **settings)


def test_every_unit_becomes_a_part_that_says_how_it_was_sampled(empty_cache: Cache) -> None:
    cycle, sampler = plan(policy_version=2), FakeSampler()
    report = rollout(empty_cache, cycle, sampler.make)
    assert sorted(report.added) == sorted(part_name(2, unit.id) for unit in cycle.units)
    assert empty_cache.parts() == sorted(report.added)
    assert (report.rollouts, sampler.made) == (10, 1)
    positions = 0
    for unit in cycle.units:
        table, meta, _ = empty_cache.read_part(part_name(2, unit.id))
        assert (meta.policy_version, meta.unit) == (2, unit.id)
        assert meta.sampler == CONFIG.recorded()
        assert meta.tokenizer_fingerprint == IDENTITY.tokenizer_fingerprint
        assert set(table["source"].to_pylist()) == {"student"}
        assert set(table["policy_version_min"].to_pylist()) == {2}
        assert set(table["policy_version_max"].to_pylist()) == {2}
        positions += sum(len(completion) for completion in table["completion"].to_pylist())
    assert report.positions == positions


def test_samples_of_a_prompt_are_a_group(empty_cache: Cache) -> None:
    (unit,) = plan(unit_rollouts=100).units
    rollout(empty_cache, Cycle((unit,), tuple(PROMPTS)), FakeSampler().make)
    table, _, _ = empty_cache.read_part(part_name(0, unit.id))
    names = [p.name for p in PROMPTS for _ in range(2)]
    assert table["prompt_name"].to_pylist() == names
    assert table["prompt_id"].to_pylist() == [p.id for p in PROMPTS for _ in range(2)]
    assert table["prompt"].to_pylist() == [p.token.tolist() for p in PROMPTS for _ in range(2)]
    assert table["sample_index"].to_pylist() == [0, 1] * 5
    assert table["rollout_id"].to_pylist() == [rollout_id(unit.id, i) for i in range(10)]
    assert table["group"].to_pylist() == [rollout_id(unit.id, i - i % 2) for i in range(10)]


def test_a_completion_stays_with_its_prompt(empty_cache: Cache) -> None:
    """The sampler answers in its own order."""
    (unit,) = plan(unit_rollouts=100).units
    sampler = FakeSampler()
    rollout(empty_cache, Cycle((unit,), tuple(PROMPTS)), sampler.make)
    ((asked, seed),) = sampler.asked
    expected = dict(FakeSampler().sample([np.array(prompt) for prompt in asked], seed))
    table, _, _ = empty_cache.read_part(part_name(0, unit.id))
    for row, item in enumerate(table.to_pylist()):
        assert item["prompt"] == asked[row]
        assert item["completion"] == expected[row].completion.tolist()
        assert item["behaviour_logprob"] == expected[row].behaviour_logprob.tolist()
        assert item["finish_reason"] == expected[row].finish_reason
        assert item["ends_with_stop"] == (expected[row].finish_reason == "stop")
        assert item["scored"] is None
        assert item["teacher_prompt"] is None


class NotingSampler(FakeSampler):
    """A sampler that notes two ids beside each token, of which the second may be shut out."""

    def sample(self, prompts: Sequence[np.ndarray], seed: int) -> Iterator[tuple[int, Sampled]]:
        """Completions of the fake."""
        for index, sampled in super().sample(prompts, seed):
            n = len(sampled.completion)
            least = -np.inf if index % 2 else -1.5
            logprob = np.tile(np.array([-0.5, least], np.float32), (n, 1))
            ids = np.tile(np.array([index, 30], np.uint32), (n, 1))
            yield index, replace(sampled, extra_id=ids, extra_behaviour_logprob=logprob)


def noting_plan() -> Cycle:
    """One unit whose sampler notes two ids a token."""
    config = replace(CONFIG, extra=2)
    return plan_cycle(PROMPTS, config, policy_version=0, seed=1, unit_rollouts=100)


def test_ids_that_the_sampler_notes_go_into_the_part(tmp_path: Path) -> None:
    cache = Cache.create(tmp_path, replace(IDENTITY, extra=3, extra_kind="student"))
    cycle = noting_plan()
    rollout(cache, cycle, NotingSampler().make)
    table, _, _ = cache.read_part(part_name(0, cycle.units[0].id))
    for row, item in enumerate(table.to_pylist()):
        n = len(item["completion"])
        assert item["extra_id"] == [[row] if row % 2 else [row, 30]] * n
        assert item["extra_behaviour_logprob"] == [[-0.5] if row % 2 else [-0.5, -1.5]] * n


@pytest.mark.parametrize(
    "identity", [{}, {"extra": 1, "extra_kind": "student"}, {"extra": 2, "extra_kind": "tail"}]
)
def test_more_ids_than_the_cache_scores_are_refused_before_sampling(
    tmp_path: Path, identity: dict[str, Any]
) -> None:
    cache = Cache.create(tmp_path, replace(IDENTITY, **identity))
    sampler = NotingSampler()
    with pytest.raises(ConfigError, match=r"^sampler\.extra: expected at most [01], .*; got 2"):
        rollout(cache, noting_plan(), sampler.make)
    assert sampler.made == 0


def test_units_are_sampled_with_seeds_of_their_own(empty_cache: Cache) -> None:
    sampler = FakeSampler()
    rollout(empty_cache, plan(), sampler.make)
    rollout(empty_cache, plan(seed=2), sampler.make)
    rollout(empty_cache, plan(policy_version=1), sampler.make)
    assert len({seed for _, seed in sampler.asked}) == 9
    assert all(0 <= seed < 2**63 for _, seed in sampler.asked)


def test_a_rerun_adds_nothing_and_makes_no_sampler(empty_cache: Cache) -> None:
    rollout(empty_cache, plan(), FakeSampler().make)
    before = [empty_cache.read_part(part)[2] for part in empty_cache.parts()]
    again = FakeSampler()
    report = rollout(empty_cache, plan(), again.make)
    assert (report.added, report.rollouts, report.positions) == ([], 0, 0)
    assert again.made == 0
    assert [empty_cache.read_part(part)[2] for part in empty_cache.parts()] == before


def test_an_interrupted_cycle_does_only_what_is_missing(empty_cache: Cache) -> None:
    cycle = plan()
    dies = FakeSampler(fail_at=2)
    with pytest.raises(NumericsError):
        rollout(empty_cache, cycle, dies.make)
    parts = {part_name(0, unit.id): unit for unit in cycle.units}
    there = set(empty_cache.parts())
    assert len(there) == 2
    rest = FakeSampler()
    report = rollout(empty_cache, cycle, rest.make)
    assert {*report.added} == parts.keys() - there
    (unit,) = (parts[part] for part in report.added)
    assert [len(prompts) for prompts, _ in rest.asked] == [2 * len(unit.prompt_ids)]


def test_an_interrupted_cycle_ends_as_an_undisturbed_one(
    empty_cache: Cache, tmp_path: Path
) -> None:
    undisturbed = Cache.create(tmp_path / "undisturbed", IDENTITY)
    rollout(undisturbed, plan(), FakeSampler().make)
    last, *others = plan().units[::-1]
    for units in ((last,), others):
        rollout(empty_cache, Cycle(tuple(units), tuple(PROMPTS)), FakeSampler().make)
    for part in undisturbed.parts():
        assert empty_cache.read_part(part)[2] == undisturbed.read_part(part)[2], "equal bytes"


def test_two_jobs_at_once_leave_one_part(empty_cache: Cache) -> None:
    """The other job sees no claim, and puts the part while this one samples."""
    (unit,) = plan(unit_rollouts=100).units

    class Overtaken(FakeSampler):
        def sample(self, prompts: Sequence[np.ndarray], seed: int) -> Iterator[tuple[int, Sampled]]:
            for claim in empty_cache.storage.list("claims"):
                empty_cache.storage.delete(claim.path)
            rollout(empty_cache, Cycle((unit,), tuple(PROMPTS)), FakeSampler().make)
            yield from super().sample(prompts, seed + 1)

    report = rollout(empty_cache, Cycle((unit,), tuple(PROMPTS)), Overtaken().make)
    assert (report.added, report.rollouts, report.positions) == ([], 0, 0)
    assert report.lost == [part_name(0, unit.id)]
    table, _, _ = empty_cache.read_part(part_name(0, unit.id))
    expected = dict(FakeSampler().sample([np.zeros(1)] * 10, _seed(unit)))
    assert table["completion"].to_pylist() == [expected[i].completion.tolist() for i in range(10)]


def _seed(unit: Unit) -> int:
    return unit.seed * 1_000_003 + int(unit.id[:8], 16)


def test_a_planned_prompt_that_is_not_there_is_refused(empty_cache: Cache) -> None:
    cycle = Cycle(plan().units, tuple(PROMPTS[:4]))
    with pytest.raises(InputError, match=f"no prompt with id {PROMPTS[4].id}"):
        rollout(empty_cache, cycle, FakeSampler().make)


def test_the_teacher_may_sample_too(empty_cache: Cache) -> None:
    cycle = plan(source="teacher", unit_rollouts=100)
    rollout(empty_cache, cycle, FakeSampler().make)
    table, _, _ = empty_cache.read_part(empty_cache.parts()[0])
    assert set(table["source"].to_pylist()) == {"teacher"}
    assert cycle.units[0].id != plan(unit_rollouts=100).units[0].id


def test_a_part_that_is_being_scored_is_waited_for_no_longer(
    empty_cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its scorer claims it by the same name as its sampler did."""
    cycle, claims = plan(), Claims(empty_cache.storage)
    part = part_name(0, cycle.units[0].id)
    assert claims.take(part)
    looks: list[float] = []

    def finish(seconds: float) -> None:
        looks.append(seconds)
        other = UnitSampler(empty_cache, cycle, FakeSampler())
        other._sample(part, lambda: None)
        assert other.report.added == [part]

    monkeypatch.setattr(time, "sleep", finish)
    assert len(rollout(empty_cache, cycle, FakeSampler().make).added) == 2
    assert len(looks) == 1
