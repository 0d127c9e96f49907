"""The teacher run by transformers: which token a row scores, and that its numbers are exact.

Position t of a sequence is scored by the logits at t - 1.

Shapes: P positions, V vocabulary, K entries.
"""

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from stillroom.cache.canary import canary_rows
from stillroom.cache.causal_lm import head_logits
from stillroom.cache.errors import InputError, NumericsError
from stillroom.cache.fingerprint import inspect_model
from stillroom.cache.score import score
from stillroom.cache.store import Cache
from stillroom.cache.teacher import RowScores, ScoreRow, ScoreSpec, TeacherConfig, identity_of
from stillroom.cache.transformers_teacher import TransformersTeacher, length_batches
from tests.cache.conftest import QUICK
from tests.cache.fakes import (
    dense_scores,
    log_softmax,
    make_meta,
    make_rollout,
    make_table,
    same_bits,
)
from tests.conftest import VOCAB, save_llama, save_tokenizer

NAN_ID = next(
    i for i in range(8, VOCAB) if all(i not in row.token for row in canary_rows(VOCAB, 256))
)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_teacher(folder: Path, **settings: int) -> TransformersTeacher:
    """Load a teacher in float32 on the CPU."""
    config = TeacherConfig(model=str(folder), device="cpu", **settings)  # type: ignore[arg-type]
    return TransformersTeacher(inspect_model(str(folder)), config)


def run(
    teacher: TransformersTeacher, rows: list[ScoreRow], topk: int = 8, temperature: float = 1.0
) -> list[RowScores]:
    """Scores in the order of the rows."""
    found = dict(teacher.score(rows, ScoreSpec(topk=topk, temperature=temperature)))
    assert sorted(found) == list(range(len(rows)))
    return [found[i] for i in range(len(rows))]


def make_row(token: list[int], targets: list[int] | None = None) -> ScoreRow:
    """A row of which all but the first token is scored, or some."""
    indices = np.arange(1, len(token)) if targets is None else np.array(targets)
    return ScoreRow(np.array(token, np.uint32), indices)


def random_rows(*lengths: int) -> list[ScoreRow]:
    """Rows of random ids."""
    rng = np.random.default_rng(0)
    return [make_row(rng.integers(0, VOCAB, n).tolist()) for n in lengths]


def save_table(folder: Path, logit_VV: np.ndarray, *, nan_id: int | None = None) -> Path:
    """A Llama whose next-token logits after token a are row a of a table.

    Its one layer adds nothing, so the last hidden state is the token's embedding: 1 at its id. The
    norm makes that the root of the width, by which the head is divided.
    """
    width = 264
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=width,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=256,
        rms_norm_eps=1e-12,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "norm" in name else 0.0)
        weights = dict(model.named_parameters())
        embedding, head = weights["model.embed_tokens.weight"], weights["lm_head.weight"]
        embedding[:, :VOCAB] = torch.eye(VOCAB)
        if nan_id is not None:
            embedding[nan_id] = torch.nan
        head[:, :VOCAB] = torch.from_numpy(logit_VV.T / width**0.5)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def logit_VV() -> np.ndarray:
    """Next-token logits of the table model."""
    return np.random.default_rng(7).normal(0, 3, (VOCAB, VOCAB))


@pytest.fixture(scope="module")
def table_dir(tmp_path_factory: pytest.TempPathFactory, logit_VV: np.ndarray) -> Path:
    """The table model."""
    return save_table(tmp_path_factory.mktemp("table"), logit_VV)


@pytest.fixture(scope="module")
def teacher(teacher_dir: Path) -> TransformersTeacher:
    """The random teacher."""
    return make_teacher(teacher_dir)


def assert_close(found: RowScores, expected: RowScores) -> None:
    """Equal but for float32 arithmetic before the rounding; entries that tie may change places."""
    np.testing.assert_allclose(found.sampled_logprob, expected.sampled_logprob, atol=2e-5, rtol=0)
    for got, want in [
        (found.topk_logprob, expected.topk_logprob),
        (found.tail_logprob, expected.tail_logprob),
    ]:
        ulp = np.spacing(np.abs(want)).astype(np.float32)
        finite = np.isfinite(want)
        assert (np.isfinite(got) == finite).all()
        difference = np.abs(got[finite].astype(np.float32) - want[finite].astype(np.float32))
        assert (difference <= ulp[finite] * 1.001).all()
        assert (got == want).mean() > 0.9
    assert (found.topk_id == expected.topk_id).mean() > 0.9


def dense_of(folder: Path, row: ScoreRow, topk: int, temperature: float = 1.0) -> RowScores:
    """Scores of one row from the whole model's logits."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.from_numpy(row.token.astype(np.int64))[None]
    with torch.no_grad():
        logit_TV = model(ids).logits[0, :, :VOCAB].double().numpy() / temperature
    return dense_scores(logit_TV[row.targets - 1], row.token[row.targets], topk)


def test_each_position_is_scored_by_the_token_before_it(
    table_dir: Path, logit_VV: np.ndarray
) -> None:
    rows = [
        make_row([5, 9, 200, 9, 5, 5]),
        make_row([1, 2, 3, 4, 5, 6, 7, 8, 9], [3, 4, 8]),
        make_row([250, 0]),
        make_row([11, 12, 13, 14], [1, 3]),
    ]
    for row, found in zip(rows, run(make_teacher(table_dir), rows), strict=True):
        before, at = row.token[row.targets - 1], row.token[row.targets]
        assert_close(found, dense_scores(logit_VV[before], at, 8))
        with pytest.raises(AssertionError):
            assert_close(found, dense_scores(logit_VV[at], at, 8))
        with pytest.raises(AssertionError):
            assert_close(found, dense_scores(logit_VV[before], before, 8))


@pytest.mark.parametrize("max_batch_tokens", [1, 60, 8192])
@pytest.mark.parametrize("head_rows", [1, 7, 512])
def test_any_batching_gives_the_dense_log_softmax(
    teacher_dir: Path, max_batch_tokens: int, head_rows: int
) -> None:
    rows = random_rows(2, 30, 17, 3, 30)
    teacher = make_teacher(teacher_dir, max_batch_tokens=max_batch_tokens, head_rows=head_rows)
    for row, found in zip(rows, run(teacher, rows), strict=True):
        assert_close(found, dense_of(teacher_dir, row, 8))


@pytest.mark.parametrize("topk", [1, 8, VOCAB - 1])
def test_the_tail_is_the_mass_of_the_complement(
    teacher_dir: Path, teacher: TransformersTeacher, topk: int
) -> None:
    (row,) = random_rows(40)
    (found,) = run(teacher, [row], topk)
    dense = dense_of(teacher_dir, row, VOCAB)
    logprob_PV = np.empty((39, VOCAB))
    np.put_along_axis(
        logprob_PV, dense.topk_id.astype(int), dense.topk_logprob.astype(float), axis=-1
    )
    rest_PV = np.exp(logprob_PV)
    np.put_along_axis(rest_PV, found.topk_id.astype(int), 0, axis=-1)
    np.testing.assert_allclose(found.tail_logprob, np.log(rest_PV.sum(-1)), rtol=3e-3, atol=3e-3)
    mass = np.exp(found.topk_logprob.astype(float)).sum(-1) + np.exp(found.tail_logprob)
    np.testing.assert_allclose(mass, 1, atol=3e-3)


def test_entries_come_by_rounded_logprob_then_by_id(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    near_VV = rng.integers(0, 4, (VOCAB, VOCAB)) + rng.random((VOCAB, VOCAB)) * 1e-4
    (found,) = run(make_teacher(save_table(tmp_path, near_VV)), random_rows(50), topk=100)
    step = np.diff(found.topk_logprob.astype(np.float32))
    ties = step == 0
    assert ties.mean() > 0.5
    assert (step <= 0).all()
    assert (np.diff(found.topk_id.astype(int))[ties] > 0).all()


def test_k_may_be_the_whole_vocabulary(teacher: TransformersTeacher) -> None:
    (found,) = run(teacher, random_rows(10), topk=VOCAB)
    assert (np.sort(found.topk_id) == np.arange(VOCAB)).all()
    assert (found.tail_logprob == -np.inf).all()


def test_k_may_be_one(teacher_dir: Path, teacher: TransformersTeacher) -> None:
    (row,) = random_rows(10)
    (found,) = run(teacher, [row], topk=1)
    assert found.topk_id.shape == (9, 1)
    assert_close(found, dense_of(teacher_dir, row, 1))


def test_dtypes_and_shapes_are_the_formats(teacher: TransformersTeacher) -> None:
    (found,) = run(teacher, [make_row([1, 2, 3, 4], [2])], topk=5)
    columns = [found.topk_id, found.topk_logprob, found.tail_logprob, found.sampled_logprob]
    assert [str(array.dtype) for array in columns] == ["uint32", "float16", "float16", "float32"]
    assert [array.shape for array in columns] == [(1, 5), (1, 5), (1,), (1,)]


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_divides_the_logits(
    teacher_dir: Path, teacher: TransformersTeacher, temperature: float
) -> None:
    (row,) = random_rows(20)
    (found,) = run(teacher, [row], temperature=temperature)
    assert_close(found, dense_of(teacher_dir, row, 8, temperature))


def test_a_mass_is_cut_from_the_dense_log_softmax(
    teacher_dir: Path, teacher: TransformersTeacher
) -> None:
    (row,) = random_rows(40)
    spec = ScoreSpec(topk=200, mass=0.5)
    found = dict(teacher.score([row], spec))[0]
    assert len(set(found.topk_count.tolist())) > 5
    whole = run(teacher, [row], VOCAB)[0]
    for p, count in enumerate(found.topk_count):
        probability = np.exp(whole.topk_logprob[p].astype(float))
        assert probability[:count].sum() >= 0.5 - 1e-3
        assert probability[: count - 1].sum() < 0.5 + 1e-3
        assert same_bits(found.topk_logprob[p, :count], whole.topk_logprob[p, :count])
        rest = math.log(probability[count:].sum())
        assert float(found.tail_logprob[p]) == pytest.approx(rest, abs=5e-3)


def test_student_ids_are_scored_in_the_rows_that_they_are_of(
    table_dir: Path, logit_VV: np.ndarray
) -> None:
    rng = np.random.default_rng(0)
    rows = [
        replace(row, extra_id=rng.integers(0, VOCAB, (len(row.targets), 3)).astype(np.uint32))
        for row in random_rows(9, 30, 17)
    ]
    spec = ScoreSpec(topk=4, extra=3, extra_kind="student")
    found = dict(make_teacher(table_dir, head_rows=7).score(rows, spec))
    for i, row in enumerate(rows):
        assert row.extra_id is not None
        dense = log_softmax(logit_VV[row.token[row.targets - 1]])
        expected = np.take_along_axis(dense, row.extra_id.astype(int), 1)
        logprob = found[i].extra_logprob
        assert logprob is not None
        np.testing.assert_allclose(logprob, expected, rtol=1e-3, atol=1e-4)


def test_draws_do_not_depend_on_batches(table_dir: Path) -> None:
    rows = [replace(row, seed=seed) for seed, row in enumerate(random_rows(9, 30, 17, 30))]
    spec = ScoreSpec(topk=4, extra=3, extra_kind="tail")

    def drawn(rows: list[ScoreRow], **settings: int) -> list[np.ndarray]:
        found = dict(make_teacher(table_dir, **settings).score(rows, spec))
        return [np.asarray(found[i].extra_id) for i in range(len(rows))]

    whole, parts = drawn(rows), drawn(rows, head_rows=7, max_batch_tokens=20)
    assert [ids.shape for ids in whole] == [(len(row.targets), 3) for row in rows]
    assert all(same_bits(one, other) for one, other in zip(whole, parts, strict=True))
    (other,) = drawn([replace(rows[1], seed=9)])
    assert np.mean(other != whole[1]) > 0.5


def test_a_padded_head_has_no_probability_beyond_the_vocabulary(tmp_path: Path) -> None:
    folder = save_llama(tmp_path, seed=3, width=VOCAB + 10)
    files = inspect_model(str(folder))
    assert (files.vocab_size, files.logit_width) == (VOCAB, VOCAB + 10)
    (row,) = random_rows(20)
    (found,) = run(make_teacher(folder), [row])
    assert_close(found, dense_of(folder, row, 8))
    (whole,) = run(make_teacher(folder), [row], topk=VOCAB)
    assert whole.topk_id.max() == VOCAB - 1
    np.testing.assert_allclose(np.exp(whole.topk_logprob.astype(float)).sum(-1), 1, atol=2e-3)


def test_a_lower_compute_dtype_is_near(teacher_dir: Path, teacher: TransformersTeacher) -> None:
    rows = random_rows(20, 5)
    config = TeacherConfig(model=str(teacher_dir), device="cpu", dtype="bfloat16")
    low = TransformersTeacher(inspect_model(str(teacher_dir)), config)
    assert low.numeric_class.endswith("-bfloat16-cpu")
    assert teacher.numeric_class.endswith("-float32-cpu")
    for one, other in zip(run(teacher, rows), run(low, rows), strict=True):
        assert 0 < np.abs(one.sampled_logprob - other.sampled_logprob).mean() < 0.1


def test_a_row_longer_than_the_teacher_reads_is_named(teacher: TransformersTeacher) -> None:
    rows = random_rows(256, 257)
    with pytest.raises(InputError, match=r"^row 1: expected at most the teacher's 256 tokens; got"):
        run(teacher, rows)
    assert run(teacher, rows[:1], topk=1)[0].sampled_logprob.shape == (255,)


def test_logits_are_held_for_head_rows_at_a_time(
    teacher_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def recording(model: PreTrainedModel, hidden_PH: torch.Tensor) -> torch.Tensor:
        logit_PV = head_logits(model, hidden_PH)
        sizes.append(logit_PV.numel())
        return logit_PV

    monkeypatch.setattr("stillroom.cache.full_logits.head_logits", recording)
    run(make_teacher(teacher_dir, head_rows=16), random_rows(40, 40, 7))
    assert max(sizes) == 16 * VOCAB
    assert sum(sizes) == (39 + 39 + 6) * VOCAB


@QUICK
@given(st.lists(st.integers(1, 50), max_size=40), st.integers(1, 120))
def test_batches_are_a_bounded_partition(lengths: list[int], max_tokens: int) -> None:
    batches = length_batches(lengths, max_tokens)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        longest = max(lengths[i] for i in batch)
        assert len(batch) == 1 or longest * len(batch) <= max_tokens
    order = [lengths[i] for batch in batches for i in batch]
    assert order == sorted(lengths, reverse=True)


def test_batches_are_no_smaller_than_they_must_be() -> None:
    assert length_batches([3, 9, 3, 3, 9], 18) == [[1, 4], [0, 2, 3]]
    assert length_batches([30, 1, 1], 18) == [[0], [1, 2]]
    assert length_batches([], 18) == []


def make_cache(root: Path, folder: Path) -> Cache:
    """A cache for the teacher in a folder."""
    config = TeacherConfig(model=str(folder), device="cpu")
    return Cache.create(root, identity_of(inspect_model(str(folder)), config, ScoreSpec(topk=8)))


def add(cache: Cache, number: int, *completions: list[int]) -> str:
    """Add a part; its name."""
    fingerprint = cache.identity.tokenizer_fingerprint
    meta = make_meta(number, tokenizer_fingerprint=fingerprint, vocab_size=VOCAB)
    rows = [make_rollout(prompt=[1, 2], completion=completion) for completion in completions]
    assert cache.add_part(make_table(rows), meta)
    return meta.name


def test_nothing_of_a_part_with_nan_is_committed(tmp_path: Path, logit_VV: np.ndarray) -> None:
    folder = save_table(tmp_path / "model", logit_VV, nan_id=NAN_ID)
    cache = make_cache(tmp_path / "cache", folder)
    good = add(cache, 0, [3, 4, 5])
    bad = add(cache, 1, [3, 4], [5, NAN_ID, 6], [7])
    with pytest.raises(NumericsError, match=rf"^{bad}, row 1: expected finite teacher logits"):
        score(cache, make_teacher(folder))
    assert cache.commits().keys() <= {good}
    assert all(good in entry.path for entry in cache.storage.list("scores"))


def test_ids_are_never_made_from_text_again(tmp_path: Path, table_dir: Path) -> None:
    tokenizer = Tokenizer.from_file(str(table_dir / "tokenizer.json"))
    vocab = tokenizer.get_vocab()
    letters = [vocab[letter] for letter in "abcab"]
    assert tokenizer.encode("abcab").ids != letters
    assert tokenizer.decode(tokenizer.encode("abcab").ids) == tokenizer.decode(letters)
    cache = make_cache(tmp_path, table_dir)
    part = add(cache, 0, letters)
    assert score(cache, make_teacher(table_dir)).scored == [part]
    assert cache.shard(cache.commit_of(part)).read("token").tolist() == [1, 2, *letters]
