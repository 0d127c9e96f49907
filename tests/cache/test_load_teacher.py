"""A teacher's files and identity: one model, an ensemble, or one whose ids are mapped."""

from dataclasses import replace
from pathlib import Path

import pytest

from stillroom.cache import teacher
from stillroom.cache.ensemble_config import Member
from stillroom.cache.errors import ConfigError, MismatchError
from stillroom.cache.fingerprint import inspect_model
from stillroom.cache.identity import fingerprint_of
from stillroom.cache.load_teacher import exact_if_needed, inspect_teacher
from stillroom.cache.match_ids import match_ids
from stillroom.cache.server_config import ServerConfig
from stillroom.cache.teacher import ScoreSpec, TeacherConfig, identity_of
from tests.conftest import VOCAB, save_llama
from tests.vocabularies import reordered

SPEC = ScoreSpec(topk=8)


def config_of(*models: Path) -> TeacherConfig:
    """One model, or an ensemble in which the later ones count twice."""
    first, *others = map(str, models)
    members = tuple(Member(model=model, weight=2.0) for model in others)
    return TeacherConfig(model=first, ensemble=members)


def test_one_model_is_inspected_as_ever(teacher_dir: Path) -> None:
    config = config_of(teacher_dir)
    assert inspect_teacher(config) == inspect_model(str(teacher_dir))
    identity = identity_of(inspect_teacher(config), config, SPEC)
    assert (identity.ensemble, identity.id_map) == ((), "")


def test_an_ensemble_is_recorded(teacher_dir: Path, student_dir: Path, tmp_path: Path) -> None:
    padded = save_llama(tmp_path / "padded", 4, width=VOCAB + 3)
    config = config_of(teacher_dir, student_dir, padded)
    files = inspect_teacher(config)
    short = replace(files, members=(replace(files.members[0], max_length=99), files.members[1]))
    identity = identity_of(short, config, SPEC)
    assert [member.name for member in identity.ensemble] == [
        str(folder) for folder in (teacher_dir, student_dir, padded)
    ]
    assert [member.weight for member in identity.ensemble] == [0.2, 0.4, 0.4]
    assert identity.ensemble[1].fingerprint == inspect_model(str(student_dir)).fingerprint
    assert identity.teacher.fingerprint == fingerprint_of(identity.ensemble)
    assert identity.teacher.name == f"{teacher_dir} + {student_dir} + {padded}"
    assert (identity.teacher.weight_format, identity.max_length) == ("F32", 99)


def test_members_have_one_vocabulary(teacher_dir: Path, tmp_path: Path) -> None:
    other = reordered(teacher_dir, tmp_path / "other")
    with pytest.raises(MismatchError, match=r"other: expected the tokenizer and vocabulary of"):
        inspect_teacher(config_of(teacher_dir, other))


def test_files_of_all_members_are_needed(teacher_dir: Path, student_dir: Path) -> None:
    config = config_of(teacher_dir, student_dir)
    with pytest.raises(ConfigError, match=r"teacher\.ensemble: expected files of 1 members; got 0"):
        identity_of(inspect_model(str(teacher_dir)), config, SPEC)


def test_a_map_makes_the_students_vocabulary_the_caches(
    teacher_dir: Path, student_dir: Path, tmp_path: Path
) -> None:
    other = reordered(teacher_dir, tmp_path / "other", more=["m1", "m2"])
    config, student = config_of(other), inspect_model(str(student_dir))
    files = inspect_teacher(config)
    id_map = match_ids(files, student)
    assert id_map is not None
    identity = identity_of(files, config, SPEC, id_map=id_map)
    assert identity.tokenizer_fingerprint == student.tokenizer_fingerprint
    assert (identity.vocab_size, identity.logit_width) == (VOCAB, VOCAB + 2)
    assert identity.id_map == id_map.digest()
    with pytest.raises(MismatchError, match="expected the tokenizer that ids are mapped to"):
        identity_of(inspect_teacher(config_of(teacher_dir)), config, SPEC, id_map=id_map)
    drawn = ScoreSpec(topk=8, extra=1, extra_kind="tail")
    with pytest.raises(ConfigError, match="extra_kind: expected none or student; got a teacher"):
        identity_of(files, config, drawn, id_map=id_map)


def test_a_map_with_too_many_ids_of_the_teachers_is_refused_before_a_cache_is_made(
    teacher_dir: Path, monkeypatch: pytest.MonkeyPatch, student_dir: Path, tmp_path: Path
) -> None:
    other = reordered(teacher_dir, tmp_path / "other", more=["m1", "m2"])
    files, config = inspect_model(str(other)), config_of(other)
    id_map = match_ids(files, inspect_model(str(student_dir)))
    for backend in ("vllm", "transformers"):
        identity_of(files, replace(config, backend=backend), SPEC, id_map=id_map)
    monkeypatch.setattr(teacher, "MOST_MORE", 1)
    identity_of(files, config, SPEC, id_map=id_map)
    with pytest.raises(ConfigError, match=r"teacher\.backend: expected at most 1 .*vllm, and 2"):
        identity_of(files, replace(config, backend="vllm"), SPEC, id_map=id_map)


def test_extra_ids_need_full_vocabularies(teacher_dir: Path, student_dir: Path) -> None:
    config = config_of(teacher_dir, student_dir)
    files, spec = inspect_teacher(config), ScoreSpec(topk=8, extra=1, extra_kind="student")
    assert identity_of(files, config, spec).extra == 1
    member = replace(config.ensemble[0], urls=("http://b",))
    server = replace(
        config, backend="server", server=ServerConfig(urls=("http://a",)), ensemble=(member,)
    )
    with pytest.raises(ConfigError, match="extra_kind: expected none, or an ensemble of transf"):
        identity_of(files, server, spec)


@pytest.mark.parametrize(
    ("padding", "spec", "why"),
    [
        (0, None, ""),
        (0, ScoreSpec(topk=4, extra=1, extra_kind="student"), ""),
        (8, None, f"the head has {VOCAB + 8} rows for {VOCAB} tokens"),
        (0, ScoreSpec(topk=4, temperature=0.5), "the temperature is 0.5"),
        (0, ScoreSpec(topk=4, extra=1, extra_kind="tail"), "extra ids are drawn from the tail"),
    ],
)
def test_vllm_gives_hidden_states_where_nothing_else_will_do(
    teacher_dir: Path,
    padding: int,
    spec: ScoreSpec | None,
    why: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    files = replace(inspect_model(str(teacher_dir)), logit_width=VOCAB + padding)
    config = TeacherConfig(model=str(teacher_dir), backend="vllm")
    assert exact_if_needed(files, config, spec) == replace(config, exact_tail=bool(why))
    said = capsys.readouterr().err
    assert why in said
    assert said.count("\n") == bool(why)
    exact = replace(config, exact_tail=True)
    assert exact_if_needed(files, exact, spec) == exact
    assert not capsys.readouterr().err
