"""`run`: the whole loop on one machine, in rounds.

Round v samples policy v, scores its rollouts, trains on them and publishes policy v + 1; held-out
measurements stand before and after each round. Every arrow goes through the files that separate
jobs would use; nothing is handed over in memory.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property, partial
from importlib.metadata import version as version_of
from typing import Any

from stillroom.cache import jsonfile
from stillroom.cache.commits import commit_path, read_commit
from stillroom.cache.fingerprint import ModelFiles
from stillroom.cache.load_teacher import load_teacher
from stillroom.cache.part import part_name, policy_of
from stillroom.cache.score import score
from stillroom.cache.storage import local_path
from stillroom.cache.store import Cache
from stillroom.cache.teacher import Teacher
from stillroom.replay.cycle import Cycle, load_cycle, plan_cycle, store_cycle
from stillroom.replay.load_sampler import load_sampler
from stillroom.replay.policies import open_policy, policy_path, register_initial
from stillroom.replay.prompts import Prompt, Prompts
from stillroom.replay.refresh import cycle_name, refresh, retire_stale
from stillroom.replay.rollout import rollout
from stillroom.replay.sampler import SamplerConfig
from stillroom.train.durable import write_file
from stillroom.train.preflight import (
    check_machine,
    check_models,
    check_output,
    check_root,
    check_teacher,
    describe_prompts,
    read_prompts,
    settings_of,
)
from stillroom.train.preflight_data import check_held_out, check_phases
from stillroom.train.run_config import RunConfig
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
        """Check models and settings; nothing is written."""
        self._config = config
        self._root = str(local_path(config.root).absolute())
        self._output = local_path(config.output).absolute()
        self._held_root = str(self._output / "held_out")
        self._models = check_models(config)
        check_output(self._output / "run.json", config)
        check_root(self._root, self._models.identity)
        self._log = StageLog(self._output / "stages")

    def run(self) -> Summary:
        """Run all rounds that are not finished; returns what all of them did.

        Raises:
            StillroomError: an input cannot be used; if no stage was finished, nothing is written.
        """
        if not all(self._log.finished(name) for name in self._stage_names()):
            self._check_inputs()
        identity = self._models.identity
        self._cache, self._held = (
            Cache.create(root, identity) for root in (self._root, self._held_root)
        )
        register_initial(self._cache.storage, self._models.student, self.name)
        write_file(self._output / "run.json", jsonfile.dump(self._described()))
        self._log.run(TEACHER_TEXT, self._write_teacher_text)
        summary = Summary(self.name)
        before = self._measured(0)
        for version in range(self._config.rounds):
            rolled = self._log.run(f"rollout-{version}", partial(self._roll_out, version))
            scored = self._log.run(f"score-{version}", partial(self._score_round, version))
            trained = self._log.run(f"train-{version}", partial(self._train, version))
            after = self._measured(version + 1)
            summary.add(round_of(version, rolled, scored, trained, before, after))
            summary.print_round(version)
            before = after
        summary.samples = self._samples()
        write_file(self._output / "summary.json", jsonfile.dump(summary.as_json()))
        summary.print_end()
        return summary

    @property
    def name(self) -> str:
        """A hash of the settings, wherever the run lies and however many rounds it has."""
        decisive = settings_of(self._config)
        settings = {k: v for k, v in decisive.items() if k not in ("root", "output")}
        return f"run-{jsonfile.digest(jsonfile.dump(settings))[:8]}"

    def _check_inputs(self) -> None:
        """The checks that load models and prompts; skipped when all is done."""
        check_machine(self._config)
        check_held_out(self._config, self._models.identity)
        check_phases(self._config, self._models.student)
        for source, prompts in zip(
            (self._config.prompts, self._config.held_out), self._loaded, strict=True
        ):
            print(describe_prompts(source.source, prompts), flush=True)
        if not self._log.finished(TEACHER_TEXT):
            check_teacher(self._teacher, self._models.identity)

    # The stages: each returns the objects that it left, and what it measured.

    def _write_teacher_text(self) -> Result:
        """The teacher answers the held-out prompts and scores its own answers."""
        cycle = self._plan_held_out(TEACHER_TEXT, self._loaded[1].prompts, 0, source="teacher")
        sampler = self._held_sampler
        rollout(self._held, cycle, lambda: load_sampler(self._models.teacher, sampler))
        self._score(self._held)
        return _commits(self._held, _parts(cycle)), {}

    def _measure(self, version: int) -> Result:
        """Fresh held-out rollouts of a policy, scored, and the student's distance on them."""
        from stillroom.cache.causal_lm import pick_device
        from stillroom.train.evaluate import as_json, evaluate
        from stillroom.train.student import load_student

        files = open_policy(self._cache.storage, version, self._models.student)
        written = load_cycle(self._held, TEACHER_TEXT)
        cycle = self._plan_held_out(cycle_name(version), written.prompts, version)
        sampler = self._held_sampler
        rollout(self._held, cycle, lambda: load_sampler(files, sampler))
        self._score(self._held)
        student = load_student(files, "float32", pick_device(self._config.train.device))
        parts = [*_parts(cycle), *_parts(written)]
        measured = evaluate(
            student, self._held, self._held.snapshot(parts), self._config.train.replay
        )
        return _commits(self._held, parts), as_json(measured)

    def _roll_out(self, version: int) -> Result:
        files = open_policy(self._cache.storage, version, self._models.student)
        sampler = self._config.sampler
        prompts = self._loaded[0].prompts
        cycle = refresh(self._cache, prompts, sampler, self._config.refresh, version)
        rollout(self._cache, cycle, lambda: load_sampler(files, sampler))
        retired = retire_stale(self._cache, version, self._config.refresh.max_lag)
        parts = _parts(cycle)
        objects = [(self._root, f"rollouts/{part}.parquet") for part in parts]
        return objects, {"retired": len(retired)}

    def _score_round(self, version: int) -> Result:
        self._score(self._cache)
        live = {p: n for p, n in self._cache.commits().items() if policy_of(p) == version}
        commits = [read_commit(self._cache.storage, commit_path(*item)) for item in live.items()]
        values = {
            "rollouts": sum(c.rows for c in commits),
            "positions": sum(c.positions for c in commits),
            "stored_bytes": sum(c.stored_bytes for c in commits),
            "teacher_s": sum(c.teacher_s for c in commits),
        }
        return _commits(self._cache, [c.part for c in commits]), values

    def _train(self, version: int) -> Result:
        from stillroom.train.outcome import published_outcome, release_run

        run, storage = f"{self.name}-{version:06d}", self._cache.storage
        done = published_outcome(storage, self._output, run)
        if done is None:
            values = self._train_and_publish(version, run)
        else:
            release_run(storage, self._output, run, self._config.train)
            _, values = done
        return [(self._root, policy_path(version + 1))], values

    def _train_and_publish(self, version: int, run: str) -> dict[str, Any]:
        from stillroom.train.outcome import keep_outcome
        from stillroom.train.publish import publish
        from stillroom.train.run_snapshot import snapshot_for
        from stillroom.train.trainer import ReplayTrainer

        files = open_policy(self._cache.storage, version, self._models.student)
        snapshot = snapshot_for(self._cache, self._output, run)
        trainer = ReplayTrainer(
            files,
            self._cache,
            self._config.train,
            snapshot=snapshot,
            policy_version=version,
            output=self._output,
            run=run,
        )
        report = trainer.train()
        values = {
            "snapshot": snapshot.id,
            "cached_positions": snapshot.positions,
            "cached_teacher_s": sum(c.teacher_s for c in snapshot.commits),
            "steps": report.steps,
            "rows": report.rows,
            "positions": report.positions,
            "left_out": report.left_out,
            "truncated": report.truncated,
            "drift": report.drift,
            "stopped": report.stopped,
            "held_out": report.held_out,
            "pace": report.pace,
            "loss_nats": report.last_loss,
        }
        publish(
            self._cache.storage,
            trainer.student,
            files,
            version=version + 1,
            parent=version,
            run=self.name,
            step=report.student_step,
            state=trainer.parallel.full_state_dict(),
            adapter=self._config.train.publishes_adapter,
            announce=lambda policy: keep_outcome(self._output, run, policy, values),
        )
        trainer.release()
        return values

    def _plan_held_out(
        self, name: str, prompts: Sequence[Prompt], version: int, source: str = "student"
    ) -> Cycle:
        cycle = plan_cycle(
            prompts,
            self._held_sampler,
            policy_version=version,
            seed=self._config.refresh.seed,
            unit_rollouts=self._config.refresh.unit_rollouts,
            source=source,
        )
        return store_cycle(self._held, name, cycle)

    @property
    def _held_sampler(self) -> SamplerConfig:
        return replace(self._config.sampler, samples_per_prompt=1)

    def _measured(self, version: int) -> Any:
        return self._log.run(f"measure-{version}", partial(self._measure, version))

    def _samples(self) -> list[dict[str, str]]:
        """First words of a few held-out rollouts, from the first and the last policy."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self._models.student.folder)
        texts = []
        for version in (0, self._config.rounds):
            part = _parts(load_cycle(self._held, cycle_name(version)))[0]
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
    def _teacher(self) -> Teacher:
        spec = self._config.score_spec
        return load_teacher(self._models.teacher, self._config.teacher, spec=spec)

    @cached_property
    def _loaded(self) -> tuple[Prompts, Prompts]:
        return read_prompts(self._config, self._models)

    def _score(self, cache: Cache) -> None:
        score(cache, self._teacher, accept_numerics=self._config.accept_numerics)

    def _stage_names(self) -> list[str]:
        rounds = range(self._config.rounds)
        own = [f"{stage}-{v}" for v in rounds for stage in ("rollout", "score", "train")]
        return [TEACHER_TEXT, *own, *(f"measure-{v}" for v in range(self._config.rounds + 1))]

    def _described(self) -> dict[str, Any]:
        models: dict[str, ModelFiles] = {
            "teacher": self._models.teacher,
            "student": self._models.student,
        }
        return {
            "name": self.name,
            "settings": settings_of(self._config),
            "rounds": self._config.rounds,
            "versions": {name: version_of(name) for name in ("stillroom", "torch", "transformers")},
            "fingerprints": {name: files.fingerprint for name, files in models.items()},
        }


def _parts(cycle: Cycle) -> list[str]:
    return [part_name(unit.policy_version, unit.id) for unit in cycle.units]


def _commits(cache: Cache, parts: Sequence[str]) -> list[tuple[str, str]]:
    live = cache.commits()
    return [(str(cache.storage.root), commit_path(part, live[part])) for part in parts]
