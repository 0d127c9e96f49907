"""The identity: written once, compared field by field."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from stillroom.cache import jsonfile
from stillroom.cache.errors import ConfigError, CorruptError, MismatchError, MissingError
from stillroom.cache.identity import Identity, MemberId, TeacherId, fingerprint_of
from stillroom.cache.store import Cache
from tests.cache.fakes import make_identity

TEACHER = TeacherId(
    name="other", revision="main", weight_format="BF16", compute_dtype="bfloat16", fingerprint="g"
)


def test_round_trip_and_digest() -> None:
    identity = make_identity(teacher=TEACHER, temperature=0.7, logit_width=64)
    assert Identity.from_json(identity.to_json(), "here") == identity
    assert Identity.from_json(identity.to_json(), "here").digest() == identity.digest()
    assert identity.digest() != make_identity().digest()


def test_the_digest_is_pinned() -> None:
    """Commits and shards carry it: a change of it makes every cache unreadable."""
    assert make_identity().digest() == "afaf3031ba0ed96911810353cfb3a4f0"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"topk": 0}, "topk"),
        ({"topk": 41}, r"topk: expected 1 to 40 \(the vocabulary\); got 41"),
        (
            {"vocab_size": 100_000, "logit_width": 100_000, "topk": 65_536},
            "topk: expected 1 to 65535",
        ),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"mass": 0.0}, "mass"),
        ({"mass": 1.0001}, "mass"),
        ({"mass": float("nan")}, "mass"),
        ({"extra": -1, "extra_kind": "tail"}, "extra: expected 0 to 1024; got -1"),
        ({"extra": 1025, "extra_kind": "tail"}, "extra"),
        ({"extra": 1, "extra_kind": "both"}, "extra_kind: expected one of"),
        ({"extra": 1}, "extra_kind: expected none without extra ids"),
        ({"extra_kind": "tail"}, "extra_kind: expected none without extra ids"),
        ({"shard_format": "npz"}, "shard_format"),
        ({"logit_width": 39}, "logit_width"),
    ],
)
def test_a_setting_out_of_range_is_refused(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=f"^{named}"):
        make_identity(**changes)


def test_a_part_brings_extra_ids_where_they_are_the_students() -> None:
    assert make_identity().student_extra == 0
    assert make_identity(extra=3, extra_kind="tail").student_extra == 0
    assert make_identity(extra=3, extra_kind="student").student_extra == 3


def test_other_extra_ids_are_another_identity() -> None:
    student, tail = (make_identity(extra=3, extra_kind=kind) for kind in ("student", "tail"))
    with pytest.raises(MismatchError, match=r"^here: expected extra_kind = 'student'; got"):
        student.check_same(tail, "here")
    with pytest.raises(MismatchError, match=r"^here: expected extra = 3; got extra = 2$|extra = 2"):
        student.check_same(make_identity(extra=2, extra_kind="student"), "here")


def test_k_may_be_the_whole_vocabulary() -> None:
    assert make_identity(topk=40).topk == 40


OTHER: dict[str, Any] = {
    "tokenizer_fingerprint": "u",
    "vocab_size": 39,
    "logit_width": 41,
    "max_length": 100,
    "temperature": 2.0,
    "topk": 6,
    "mass": 0.9,
    "shard_format": "parquet",
    "id_map": "0" * 32,
    "required_features": ("new",),
    "format_version": 2,
}
TOLD_BELOW = {"teacher", "extra", "extra_kind", "ensemble"}
TOLD_BY = ["weight_format", "compute_dtype", "fingerprint"]


def test_every_field_is_compared() -> None:
    assert OTHER.keys() | TOLD_BELOW == {field.name for field in fields(Identity)}


@pytest.mark.parametrize("field", OTHER)
def test_a_field_that_differs_is_named(field: str) -> None:
    identity, other = make_identity(), make_identity(**{field: OTHER[field]})
    identity.check_same(make_identity(), "here")
    with pytest.raises(MismatchError, match=rf"^here: expected {field} = [^,]*; got {field} = "):
        identity.check_same(other, "here")


@pytest.mark.parametrize("field", TOLD_BY)
def test_a_field_of_the_teacher_that_differs_is_named(field: str) -> None:
    identity = make_identity()
    teacher = replace(identity.teacher, **{field: getattr(TEACHER, field)})
    with pytest.raises(MismatchError, match=rf"^here: expected teacher\.{field} = [^,]*; got"):
        identity.check_same(make_identity(teacher=teacher), "here")


def test_names_are_for_people() -> None:
    identity = make_identity()
    teacher = replace(identity.teacher, name="/elsewhere", revision="v2")
    identity.check_same(make_identity(teacher=teacher), "here")
    assert {f.name for f in fields(TeacherId)} == {"name", "revision", *TOLD_BY}


def make_ensemble(*weights: float, **changes: Any) -> Identity:
    """The identity of an ensemble of models a, b, ..."""
    members = tuple(
        MemberId(name=n, revision=None, weight_format="F32", fingerprint=n, weight=w)
        for n, w in zip("abc", weights, strict=False)
    )
    members = tuple(replace(member, **changes) for member in members)
    teacher = replace(TEACHER, fingerprint=fingerprint_of(members))
    return make_identity(teacher=teacher, ensemble=members)


def test_an_ensemble_round_trip() -> None:
    identity = make_ensemble(0.25, 0.75)
    assert Identity.from_json(identity.to_json(), "here") == identity
    assert fields_of(identity)["ensemble"][1]["weight"] == 0.75
    assert {"ensemble", "id_map"}.isdisjoint(fields_of(make_identity()))


def test_another_ensemble_is_another_identity() -> None:
    identity = make_ensemble(0.25, 0.75)
    identity.check_same(make_ensemble(0.25, 0.75, name="/elsewhere", revision="v2"), "here")
    for other in (make_ensemble(0.5, 0.5), make_ensemble(0.75, 0.25)):
        with pytest.raises(MismatchError, match=r"ensemble = \[\('a', 0\.25\), \('b', 0\.75\)\]"):
            identity.check_same(other, "here")
    with pytest.raises(MismatchError, match=r"teacher\.fingerprint = .*ensemble = "):
        identity.check_same(make_identity(), "here")


@pytest.mark.parametrize("weights", [[1.0], [0.5, 0.4], [1.5, -0.5], [1.0, 0.0]])
def test_weights_that_are_no_shares_are_refused(weights: list[float]) -> None:
    with pytest.raises(ConfigError, match=r"^ensemble: expected two members or more, weights"):
        make_ensemble(*weights)


def test_the_fingerprint_of_an_ensemble_is_that_of_its_members() -> None:
    with pytest.raises(ConfigError, match=r"^teacher\.fingerprint: expected the digest of its"):
        replace(make_ensemble(0.5, 0.5), teacher=TEACHER)


@pytest.mark.parametrize("empty", [{"id_map": ""}, {"ensemble": []}])
def test_an_empty_field_is_left_out(empty: dict[str, Any]) -> None:
    """Or one identity would have two digests."""
    with pytest.raises(CorruptError, match=r"^here: expected nothing in place of an empty field"):
        Identity.from_json(changed(**empty), "here")


def test_every_field_that_differs_is_named() -> None:
    other = make_identity(**OTHER, teacher=TEACHER)
    with pytest.raises(MismatchError) as caught:
        make_identity().check_same(other, "here")
    names = [*OTHER, *(f"teacher.{name}" for name in TOLD_BY)]
    assert all(f"{name} = " in caught.value.expected for name in names)
    assert all(f"{name} = " in caught.value.got for name in names)


def fields_of(identity: Identity) -> dict[str, Any]:
    """What its bytes hold."""
    return jsonfile.load_sealed(identity.to_json(), "here")


def changed(**changes: Any) -> bytes:
    """The bytes of an identity with other values; `None` takes a field away."""
    value = fields_of(make_identity()) | changes
    return jsonfile.dump_sealed({k: v for k, v in value.items() if v is not None})


@pytest.mark.parametrize("version", [0, 2, "1", 1.5, [1], None])
def test_another_format_version_is_refused(version: object) -> None:
    with pytest.raises(MismatchError, match=r"^here: expected format version 1; got"):
        Identity.from_json(changed(format_version=version), "here")


def test_an_unknown_required_feature_is_refused() -> None:
    with pytest.raises(MismatchError, match=r"^here: .*got \['rank_ids'\]"):
        Identity.from_json(changed(required_features=["rank_ids"]), "here")


@pytest.mark.parametrize(
    "changes",
    [
        {"other": 1},
        {"topk": None},
        {"topk": "5"},
        {"topk": 5.0},
        {"topk": 41},
        {"temperature": "1"},
        {"teacher": None},
        {"teacher": {}},
        {"teacher": "fake"},
        {"teacher": {**fields_of(make_identity())["teacher"], "other": 1}},
        {"teacher": {**fields_of(make_identity())["teacher"], "name": 1}},
        {"required_features": None},
        {"required_features": 1},
        {"required_features": [{}]},
        {"vocab_size": []},
        {"ensemble": 1},
        {"ensemble": [1]},
        {"ensemble": [{"name": "a"}]},
        {"id_map": 1},
    ],
)
def test_what_is_no_identity_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(CorruptError, match=r"^here: "):
        Identity.from_json(changed(**changes), "here")


def test_a_cache_keeps_its_identity(tmp_path: Path) -> None:
    cache = Cache.create(tmp_path / "root", make_identity())
    assert Cache.create(tmp_path / "root", make_identity()).identity == cache.identity
    assert Cache.open(tmp_path / "root").identity == cache.identity
    with pytest.raises(MismatchError, match=r"cache\.json: expected topk = 5; got topk = 6"):
        Cache.create(tmp_path / "root", make_identity(topk=6))
    assert Cache.open(tmp_path / "root").identity == cache.identity


def test_no_cache_is_missing(tmp_path: Path) -> None:
    with pytest.raises(MissingError, match=r"cache\.json: expected a cache"):
        Cache.open(tmp_path)
    assert not list(tmp_path.iterdir())
