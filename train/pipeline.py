"""`run`: the whole loop on one machine, in rounds.

Round v samples policy v, scores its rollouts, trains on them and publishes policy v + 1; held-out
measurements stand before and after each round. Every arrow goes through the files that separate
jobs would use; nothing is handed over in memory.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from stillroom.cache import jsonfile
from stillroom.cache.canary import canary_rows
from stillroom.cache.commits import commit_path
from stillroom.cache.errors import ConfigError, InputError
from stillroom.cache.fingerprint import ModelFiles, inspect_model
from stillroom.cache.identity import Identity
from stillroom.cache.part import part_name, policy_of
from stillroom.cache.score import score
from stillroom.cache.storage import Storage
from stillroom.cache.store import IDENTITY_PATH, Cache
from stillroom.cache.teacher import identity_of
from stillroom.replay.policies import check_student, open_policy, policy_path, register_initial
from stillroom.replay.prompts import Prompt, Prompts, load_prompts
from stillroom.replay.refresh import cycle_name, refresh, retire_stale
from stillroom.replay.rollout import Cycle, plan_cycle, rollout, store_cycle
from stillroom.train.config import RunConfig
from stillroom.train.durable import write_file
from stillroom.train.stages import StageLog
from stillroom.train.summary import Summary, round_of

TEACHER_TEXT = "teacher-text"
Result = tuple[list[tuple[str, str]], dict[str, Any]]


class Pipeline:
    """One run.

    Args:
        config: all its settings.

    Raises:
        StillroomError: an input cannot be used; nothing is written then.
    """

    def __init__(self, config: RunConfig) -> None:
        """Check every input, before anything is written."""
        self._config = config
        self._root = str(Path(config.root).expanduser().absolute())
        self._output = Path(config.output).expanduser().absolute()
        self._held_root = str(self._output / "held_out")
        self._teacher_files = inspect_model(config.teacher.model, config.teacher.revision)
        self._student_files = inspect_model(config.student)
        self._identity = identity_of(
            self._teacher_files, config.teacher, config.topk, config.temperature
        )
        check_student(
            self._student_files,
            self._identity.tokenizer_fingerprint,
            self._identity.vocab_size,
            config.teacher.model,
        )
        self._check_output()
        self._check_root(self._identity)
        self._log = StageLog(self._output / "stages")

    def run(self) -> Summary:
        """Run all rounds that are not finished; returns what all of them did."""
        if not all(self._log.finished(name) for name in self._stage_names()):
            self._check_prompts()
        if not self._log.finished(TEACHER_TEXT):
            self._check_teacher()
        self._cache, self._held = (
            Cache.create(r, self._identity) for r in (self._root, self._held_root)
        )
        register_initial(self._cache.storage, self._student_files, self.name)
        write_file(self._output / "run.json", jsonfile.dump(self._described()))
        self._log.run(TEACHER_TEXT, self._write_teacher_text)
        summary = Summary(self.name)
        before = self._measured(0)
        for version in range(self._config.rounds):
            rolled = self._log.run(f"rollout-{version}", partial(self._roll_out, version))
            scored = self._log.run(f"score-{version}", partial(self._score, version))
            trained = self._log.run(f"train-{version}", partial(self._train, version))
            after = self._measured(version + 1)
            summary.add(round_of(version, rolled, scored, trained, before, after))
            summary.print_round(version)
            before = after
        summary.samples = self._samples()
        summary.print_end()
        write_file(self._output / "summary.json", jsonfile.dump(summary.as_json()))
        return summary

    @property
    def name(self) -> str:
        """A hash of the settings, wherever the run lies and however many rounds it has."""
        settings = {k: v for k, v in self._settings().items() if k not in ("root", "output")}
        return f"run-{jsonfile.digest(jsonfile.dump(settings))[:8]}"

    # The stages: each returns the objects that it left, and what it measured.

    def _write_teacher_text(self) -> Result:
        """The teacher answers the held-out prompts and scores its own answers."""
        from stillroom.replay.transformers_sampler import TransformersSampler

        config = replace(self._config.sampler, samples_per_prompt=1)
        cycle = plan_cycle(
            self._held_prompts,
            config,
            policy_version=0,
            seed=self._config.refresh.seed,
            unit_rollouts=self._config.refresh.unit_rollouts,
            source="teacher",
        )
        cycle = store_cycle(self._held, TEACHER_TEXT, cycle)
        rollout(
            self._held,
            cycle,
            self._held_prompts,
            lambda: TransformersSampler(self._teacher_files, config),
        )
        score(self._held, self._teacher)
        return _commits(self._held, _parts(cycle)), {}

    def _measure(self, version: int) -> Result:
        """Fresh held-out rollouts of a policy, scored by the teacher, and the student's distance on
        them."""
        from stillroom.cache.causal_lm import pick_device
        from stillroom.replay.transformers_sampler import TransformersSampler
        from stillroom.train.evaluate import as_json, evaluate
        from stillroom.train.student import load_student

        config = replace(self._config.sampler, samples_per_prompt=1)
        files = open_policy(self._cache.storage, version)
        cycle = plan_cycle(
            self._held_prompts,
            config,
            policy_version=version,
            seed=self._config.refresh.seed,
            unit_rollouts=self._config.refresh.unit_rollouts,
        )
        cycle = store_cycle(self._held, cycle_name(version), cycle)
        rollout(self._held, cycle, self._held_prompts, lambda: TransformersSampler(files, config))
        score(self._held, self._teacher)
        student = load_student(files, "float32", pick_device(self._config.train.device))
        parts = [*_parts(cycle), *_parts(self._teacher_cycle())]
        measured = evaluate(
            student, self._held, self._held.snapshot(parts), self._config.train.replay
        )
        return _commits(self._held, parts), as_json(measured)

    def _roll_out(self, version: int) -> Result:
        from stillroom.replay.transformers_sampler import TransformersSampler

        files = open_policy(self._cache.storage, version)
        sampler = self._config.sampler
        cycle = refresh(self._cache, self._prompts, sampler, self._config.refresh, version)
        rollout(self._cache, cycle, self._prompts, lambda: TransformersSampler(files, sampler))
        retired = retire_stale(self._cache, version, self._config.refresh.max_lag)
        parts = _parts(cycle)
        return [(self._root, f"rollouts/{part}.parquet") for part in parts], {
            "retired": len(retired)
        }

    def _score(self, version: int) -> Result:
        score(self._cache, self._teacher)
        commits = [
            self._cache.commit_of(p) for p in self._cache.commits() if policy_of(p) == version
        ]
        values = {
            "rollouts": sum(c.rows for c in commits),
            "positions": sum(c.positions for c in commits),
            "stored_bytes": sum(c.stored_bytes for c in commits),
            "teacher_s": sum(c.teacher_s for c in commits),
        }
        return _commits(self._cache, [c.part for c in commits]), values

    def _train(self, version: int) -> Result:
        from stillroom.train.publish import publish
        from stillroom.train.trainer import ReplayTrainer

        files = open_policy(self._cache.storage, version)
        run = f"{self.name}-{version:06d}"
        snapshot = self._cache.snapshot()
        trainer = ReplayTrainer(
            files, version, self._cache, snapshot, self._config.train, self._output, run
        )
        report = trainer.train()
        publish(
            self._cache.storage,
            trainer.student,
            files,
            version=version + 1,
            run=self.name,
            step=report.steps,
        )
        values = {
            "snapshot": snapshot.id,
            "cached_positions": snapshot.positions,
            "cached_teacher_s": sum(c.teacher_s for c in snapshot.commits),
            "steps": report.steps,
            "rows": report.rows,
            "positions": report.positions,
            "drift": report.drift,
            "loss_nats": report.losses[-1] if report.losses else None,
        }
        return [(self._root, policy_path(version + 1))], values

    def _measured(self, version: int) -> Any:
        return self._log.run(f"measure-{version}", partial(self._measure, version))

    def _samples(self) -> list[dict[str, str]]:
        """First words of a few held-out rollouts, from the first and the last policy."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self._student_files.folder)
        texts = []
        for version in (0, self._config.rounds):
            part = _parts(_stored_cycle(self._held, cycle_name(version)))[0]
            table, _, _ = self._held.read_part(part)
            texts.append(
                [
                    tokenizer.decode(c.as_py(), skip_special_tokens=True)
                    for c in table["completion"][:3]
                ]
            )
            names = [n.as_py() or f"prompt {i}" for i, n in enumerate(table["prompt_name"][:3])]
        return [
            {"prompt": name, "before": before, "after": after}
            for name, before, after in zip(names, *texts, strict=True)
        ]

    @cached_property
    def _teacher(self) -> Any:
        from stillroom.cache.transformers_teacher import TransformersTeacher

        return TransformersTeacher(self._teacher_files, self._config.teacher)

    @cached_property
    def _loaded(self) -> tuple[Prompts, Prompts]:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self._student_files.folder)
        longest = min(self._teacher_files.max_length, self._student_files.max_length)
        room = (
            min(longest, self._config.train.replay.max_tokens) - self._config.sampler.max_new_tokens
        )
        return (
            load_prompts(self._config.prompts, tokenizer, room),
            load_prompts(self._config.held_out, tokenizer, room),
        )

    @property
    def _prompts(self) -> Sequence[Prompt]:
        return self._loaded[0].prompts

    @property
    def _held_prompts(self) -> Sequence[Prompt]:
        return self._loaded[1].prompts

    def _check_prompts(self) -> None:
        both = {p.id for p in self._prompts} & {p.id for p in self._held_prompts}
        if both:
            do = "Take them out of one of the two."
            got = f"{len(both)} that are among the training prompts too"
            raise InputError(self._config.held_out.source, "prompts of their own", got, do)
        for config, prompts in zip(
            (self._config.prompts, self._config.held_out), self._loaded, strict=True
        ):
            left_out = (
                f", {prompts.num_too_long} too long and left out" if prompts.num_too_long else ""
            )
            print(f"{config.source}: {len(prompts.prompts)} prompts{left_out}", flush=True)

    def _check_teacher(self) -> None:
        """A teacher that gives NaN is refused before anything is written."""
        identity = self._identity
        rows = canary_rows(identity.vocab_size, identity.max_length)
        for _ in self._teacher.score(rows, identity.topk, identity.temperature):
            pass

    def _check_output(self) -> None:
        path = self._output / "run.json"
        if path.is_file():
            earlier = jsonfile.load(path.read_bytes(), str(path)).get("settings")
            if earlier != jsonfile.load(jsonfile.dump(self._settings()), "settings"):
                do = "Give those settings, or another output and root."
                raise ConfigError(str(path), "the settings of the run that is there", "others", do)

    def _check_root(self, identity: Identity) -> None:
        if Storage(self._root).exists(IDENTITY_PATH):
            where = Storage(self._root).describe(IDENTITY_PATH)
            Cache.open(self._root).identity.check_same(identity, where)

    def _stage_names(self) -> list[str]:
        rounds = range(self._config.rounds)
        own = [f"{stage}-{v}" for v in rounds for stage in ("rollout", "score", "train")]
        return [TEACHER_TEXT, *own, *(f"measure-{v}" for v in range(self._config.rounds + 1))]

    def _settings(self) -> dict[str, Any]:
        """What must not change while the run goes on."""
        value = asdict(self._config)
        del value["rounds"]
        return value

    def _described(self) -> dict[str, Any]:
        models: dict[str, ModelFiles] = {
            "teacher": self._teacher_files,
            "student": self._student_files,
        }
        return {
            "name": self.name,
            "settings": self._settings(),
            "rounds": self._config.rounds,
            "fingerprints": {name: files.fingerprint for name, files in models.items()},
        }

    def _teacher_cycle(self) -> Cycle:
        return _stored_cycle(self._held, TEACHER_TEXT)


def _stored_cycle(cache: Cache, name: str) -> Cycle:
    path = f"units/{name}.json"
    return Cycle.from_json(cache.storage.get(path), cache.storage.describe(path))


def _parts(cycle: Cycle) -> list[str]:
    return [part_name(unit.policy_version, unit.id) for unit in cycle.units]


def _commits(cache: Cache, parts: Sequence[str]) -> list[tuple[str, str]]:
    live = cache.commits()
    return [(str(cache.storage.root), commit_path(part, live[part])) for part in parts]
