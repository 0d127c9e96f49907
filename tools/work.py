"""What each job does, with the pieces of the other folders.

Each can be run again: what is done is left as it is. An input that cannot be used is an error
before anything is written. torch is imported only where a model runs.
"""

import os
from dataclasses import asdict, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stillroom.cache import jsonfile
from stillroom.cache.errors import InputError, MismatchError, MissingError
from stillroom.cache.fingerprint import ModelFiles, inspect_model
from stillroom.cache.identity import Identity
from stillroom.cache.load_teacher import inspect_teacher
from stillroom.cache.match_ids import match_ids
from stillroom.cache.storage import Storage, local_path
from stillroom.cache.store import IDENTITY_PATH, Cache
from stillroom.cache.teacher import ScoreSpec, identity_of
from stillroom.cache.workers import ALONE, Worker, find_worker
from stillroom.replay.load_sampler import find_and_load_sampler, load_sampler
from stillroom.replay.policies import (
    Policy,
    check_student,
    free_version,
    newest_kept,
    open_policy,
    policy_versions,
    read_policy,
    register_initial,
)
from stillroom.replay.prompts import Prompts, PromptsConfig, load_prompts
from stillroom.replay.refresh import cycle_name, refresh, retire_stale
from stillroom.replay.rollout import rollout
from stillroom.replay.rollout_on_ray import rollout_on_ray
from stillroom.replay.sampler import SamplerConfig
from stillroom.tools.convert import convert
from stillroom.tools.ending import ends_when_told
from stillroom.tools.jobs import ConvertJob, InitJob, RefreshJob, RolloutJob, TrainJob
from stillroom.tools.listing import describe_kept
from stillroom.tools.render import print_json, say
from stillroom.train.durable import write_file
from stillroom.train.run_config import RunConfig

if TYPE_CHECKING:
    from stillroom.train.report import TrainReport


def init(job: InitJob) -> int:
    """`stillroom init`."""
    files, student = inspect_teacher(job.teacher), _known(job.student)
    spec = ScoreSpec(**{f.name: getattr(job, f.name) for f in fields(ScoreSpec)})
    id_map = None if student is None else match_ids(files, student)
    identity = identity_of(files, job.teacher, spec, job.shard_format, id_map)
    if student is not None:
        _check_student(student, identity)
    storage = Storage(job.root)
    there = storage.exists(IDENTITY_PATH)
    cache = Cache.create(job.root, identity, id_map)
    if student is not None:
        register_initial(cache.storage, student, "init")
    say(
        f"init: {job.root} {'was there' if there else 'made'}: {describe_kept(identity)} "
        f"at temperature {identity.temperature}, teacher "
        f"{identity.teacher.name}, policy 0 {job.student or 'not named yet'}"
    )
    if id_map is not None:
        say(
            f"init: {id_map.vocab_size:,} ids of the student are mapped to the teacher's; "
            f"{len(id_map.teacher_only):,} tokens that only the teacher has count in tails"
        )
    return 0


def roll_out(job: RolloutJob) -> int:
    """`stillroom rollout`."""
    worker = ALONE if job.engine == "ray" else find_worker(job.rank, job.world_size, os.environ)
    cache = Cache.open(job.root)
    student = None if job.student is None else _student(job.student, cache.identity)
    is_first = not policy_versions(cache.storage)
    if is_first and student is None:
        do = "Name the initial student with --student."
        raise MissingError(cache.storage.root, "a policy to sample", "none", do)
    version = job.policy if job.policy is not None else 0 if is_first else _newest(cache)
    if student is not None and is_first and version == 0:
        files = student
    else:
        files = open_policy(cache.storage, version, student)
    prompts = _prompts(cache, files, job.prompts, job.sampler)
    if student is not None:
        register_initial(cache.storage, student, "rollout")
    _sample(cache, files, version, prompts, job, worker)
    return 0


def refresh_newest(job: RefreshJob) -> int:
    """`stillroom refresh`."""
    cache = Cache.open(job.root)
    version = _newest(cache)
    files = open_policy(cache.storage, version, _known(job.student))
    prompts = _prompts(cache, files, job.prompts, job.sampler)
    _sample(cache, files, version, prompts, job)
    retired = retire_stale(cache, version, job.refresh.max_lag)
    say(f"refresh: {len(retired)} parts retired, over {job.refresh.max_lag} policies behind")
    return 0


def train_newest(job: TrainJob) -> int:
    """`stillroom train`."""
    cache, output = _cache_to_train_on(job.root), local_path(job.output).absolute()
    from stillroom.train.outcome import keep_outcome
    from stillroom.train.parallel import same_on_all_ranks
    from stillroom.train.publish import publish
    from stillroom.train.run_snapshot import snapshot_for
    from stillroom.train.trainer import ReplayTrainer

    def choose() -> tuple[int, str] | None:
        version = _policy_to_train(cache, output, job)
        if version is None:
            return None
        return version, snapshot_for(cache, output, f"{job.run_name}-{version:06d}").id

    chosen = same_on_all_ranks(choose, job.train.device)
    if chosen is None:
        return 0
    version, snapshot_id = chosen
    files = open_policy(cache.storage, version, _known(job.student))
    snapshot = cache.open_snapshot(snapshot_id)
    name = f"{job.run_name}-{version:06d}"
    trainer = ReplayTrainer(
        files,
        cache,
        job.train,
        snapshot=snapshot,
        policy_version=version,
        output=output,
        run=name,
    )
    report = trainer.train()
    state = trainer.parallel.full_state_dict()
    if not trainer.is_main:
        return 0
    parent = {"version": version, "fingerprint": files.fingerprint}
    record = _record_of(job, report, parent, snapshot.id)
    policy = publish(
        cache.storage,
        trainer.student,
        files,
        version=free_version(cache.storage, version),
        parent=version,
        run=job.run_name,
        step=report.student_step,
        state=state,
        adapter=job.train.publishes_adapter,
        announce=lambda policy: keep_outcome(output, name, policy, record),
    )
    _say_trained(report, snapshot.id)
    _write_record(output / f"{name}.json", record, policy)
    trainer.release()
    return 0


def _policy_to_train(cache: Cache, output: Path, job: TrainJob) -> int | None:
    """The policy that an unfinished run of this name and output trains, or else the newest one;
    None where that run had published its student, and only its record was missing.

    Raises:
        MismatchError: another run has published meanwhile, so that it could not publish any more.
    """
    from stillroom.train.checkpoint import checkpoints_of
    from stillroom.train.outcome import published_outcome, release_run, unfinished_policy

    storage = cache.storage
    version = unfinished_policy(storage, output, job.run_name)
    if version is None:
        return _newest(cache)
    name = f"{job.run_name}-{version:06d}"
    done = published_outcome(storage, output, name)
    if done is not None:
        policy, record = done
        say(f"train: {name} had trained and published before it was ended; it gets its record now")
        _write_record(output / f"{name}.json", record, policy)
        release_run(storage, output, name, job.train)
        return None
    following = free_version(storage, version)
    if following in policy_versions(storage):
        where = str(checkpoints_of(output, name))
        got = f"policy {following} of {read_policy(storage, following).run}, published meanwhile"
        do = "Train the newest policy under another run name, or delete these checkpoints first."
        raise MismatchError(where, f"policy {version} as the newest, to go on with", got, do)
    say(f"train: going on with {name}, which was not finished")
    return version


def _record_of(
    job: TrainJob, report: "TrainReport", parent: dict[str, Any], snapshot_id: str
) -> dict[str, Any]:
    return {
        "settings": asdict(job),
        "snapshot": snapshot_id,
        "parent": parent,
        "steps": report.steps,
        "rows": report.rows,
        "positions": report.positions,
        "left_out": report.left_out,
        "truncated": report.truncated,
        "stopped": report.stopped,
        "held_out": report.held_out,
        "pace": report.pace,
    }


def _write_record(path: Path, record: dict[str, Any], policy: Policy) -> None:
    write_file(path, jsonfile.dump({**record, "published": asdict(policy)}))
    say(f"train: policy {policy.parent} -> {policy.version}, {policy.path}")


def _cache_to_train_on(root: str) -> Cache:
    from stillroom.train.publish import check_publishable

    check_publishable(Storage(root))
    cache = Cache.open(root)
    _newest(cache, quiet=True)
    if not cache.commits().keys() - cache.retired():
        do = "Run 'stillroom rollout' and 'stillroom score' first."
        raise InputError(cache.storage.root, "scored parts to train on", "none", do)
    return cache


def _say_trained(report: "TrainReport", snapshot_id: str) -> None:
    last = report.last_loss
    loss = "" if last is None else f", last loss {last:.4f} nats a position"
    say(
        f"train: {report.steps:,} steps, {report.rows:,} rollouts, {report.positions:,} positions "
        f"replayed from snapshot {snapshot_id} in {report.train_s:.1f} s{loss}"
    )
    pace, best = report.pace, report.held_out.get("best_reverse_kl_nats")
    say(
        f"train: {pace['tokens_per_s']:,.0f} tokens/s, {pace['waiting_share']:.1%} of the time "
        f"waiting for data, in place of {pace['teacher_s_replayed']:.1f} s of the teacher"
    )
    if best is not None:
        step = report.held_out["best_step"]
        say(f"train: held-out reverse KL {best:.4f} nats at best, at step {step}")
    if report.stopped:
        say(f"train: stopped early: {report.stopped}")


def run_rounds(job: RunConfig) -> int:
    """`stillroom run`."""
    from stillroom.train.pipeline import Pipeline

    Pipeline(job).run()
    return 0


def convert_cache(job: ConvertJob) -> int:
    """`stillroom convert`."""
    done = convert(Cache.open(job.source), job.destination, job.shard_format)
    if job.json:
        print_json(asdict(done))
        return 0
    sizes = f"{done.source_bytes:,} -> {done.stored_bytes:,} bytes" if done.shards else "none to do"
    say(
        f"convert: {len(done.shards)} shards encoded as {job.shard_format} and compared bit for "
        f"bit ({sizes}), {done.already} there already, {done.copied} other objects copied"
    )
    return 0


def _student(model: str, identity: Identity) -> ModelFiles:
    files = inspect_model(model)
    _check_student(files, identity)
    return files


def _check_student(files: ModelFiles, identity: Identity) -> None:
    fingerprint, vocab_size = identity.tokenizer_fingerprint, identity.vocab_size
    check_student(files, fingerprint, vocab_size, identity.teacher.name)


def _known(student: str | None) -> ModelFiles | None:
    return None if student is None else inspect_model(student)


def _name_elsewhere(files: ModelFiles, student: str | None) -> str:
    """How other machines find a model: the hub id that it was given as, or else its folder."""
    if student is None or local_path(student).is_dir():
        return str(files.folder.absolute())
    is_it = inspect_model(student).fingerprint == files.fingerprint
    return student if is_it else str(files.folder.absolute())


def _newest(cache: Cache, *, quiet: bool = False) -> int:
    """The newest policy with weights; says so where students without any are newer."""
    newest = newest_kept(cache.storage)
    if newest is None:
        do = "Run 'stillroom rollout --student ...' first."
        raise MissingError(cache.storage.root, "a policy", "none", do)
    later = policy_versions(cache.storage)[-1]
    if later > newest and not quiet:
        say(f"policy {newest} is the newest with weights: later ones, up to {later}, have none")
    return newest


def _prompts(
    cache: Cache, files: ModelFiles, config: PromptsConfig, sampler: SamplerConfig
) -> Prompts:
    """Prompts that leave room for a completion in the student and in the teacher."""
    from transformers import AutoTokenizer

    longest = min(files.max_length, cache.identity.max_length)
    tokenizer = AutoTokenizer.from_pretrained(files.folder)
    return load_prompts(config, tokenizer, longest - sampler.max_new_tokens)


def _sample(
    cache: Cache,
    files: ModelFiles,
    version: int,
    prompts: Prompts,
    job: RolloutJob | RefreshJob,
    worker: Worker = ALONE,
) -> None:
    cycle = refresh(cache, prompts.prompts, job.sampler, job.refresh, version)
    with ends_when_told():
        if isinstance(job, RolloutJob) and job.engine == "ray":
            model = _name_elsewhere(files, job.student)
            load = partial(find_and_load_sampler, model, files.fingerprint, job.sampler)
            wants_gpu = job.sampler.device != "cpu"
            report = rollout_on_ray(cache, cycle_name(version), load, job.ray, wants_gpu=wants_gpu)
        else:
            report = rollout(cache, cycle, lambda: load_sampler(files, job.sampler), worker=worker)
    num_planned = sum(len(unit.prompt_ids) for unit in cycle.units)
    rate = report.positions / report.sample_s if report.sample_s else 0.0
    say(
        f"prompts: {num_planned} of {len(prompts.prompts)} are planned for policy {version}, "
        f"{prompts.num_too_long} too long and left out"
    )
    say(
        f"rollout: {len(report.added)} of {len(cycle.units)} parts added, {report.rollouts:,} "
        f"rollouts, {report.positions:,} tokens in {report.sample_s:.1f} s ({rate:,.0f} tokens/s)"
    )
