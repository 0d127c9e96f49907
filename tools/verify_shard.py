"""One shard read again: its manifest, its object, every chunk, and what the numbers say."""

import numpy as np

from stillroom.cache import jsonfile
from stillroom.cache.codec import decode_chunk
from stillroom.cache.commits import Commit, attempt_path, commit_path
from stillroom.cache.errors import CorruptError
from stillroom.cache.manifest import (
    BLOCK_ROWS,
    OBJECT_NAME,
    ArrayEntry,
    Chunk,
    Manifest,
    chunk_numbers,
)
from stillroom.cache.part import part_arrays
from stillroom.cache.schema import Arrays
from stillroom.cache.score import check_agreement
from stillroom.cache.shard import Shard
from stillroom.cache.store import Cache
from stillroom.tools.container import check_container
from stillroom.tools.findings import Report

SCORES = ("topk_id", "topk_logprob", "topk_count", "tail_logprob", "sampled_logprob")


def verify_shard(cache: Cache, commit: Commit, report: Report) -> None:
    """Verify what one commit names; everything wrong goes into the report."""
    path = commit_path(commit.part, commit.n)
    with report.watch(path):
        commit.row_lengths()
    folder = attempt_path(commit.part, commit.attempt)
    with report.watch(f"{folder}/manifest.json"):
        shard = cache.shard(commit)
        _check_manifest(cache, commit, shard.manifest)
        if _verify_object(cache, commit, shard.manifest, report):
            with report.watch(f"{folder}/{OBJECT_NAME}"):
                _verify_numbers(cache, commit, shard, report)


def _check_manifest(cache: Cache, commit: Commit, manifest: Manifest) -> None:
    attributes = manifest.attributes
    found = (manifest.part, manifest.attempt, manifest.identity)
    expected = (commit.part, commit.attempt, commit.identity)
    manifest_bytes = len(manifest.to_json())
    _require(found == expected, "manifest", f"part, attempt, identity {expected}", f"{found}")
    stated = (attributes["part"], attributes["identity"], attributes["policy_version"])
    wanted = (commit.part, commit.identity, commit.policy_version)
    _require(stated == wanted, "attributes", f"part, identity, policy {wanted}", f"{stated}")
    temperature = attributes["temperature"]
    own = cache.identity.temperature
    _require(temperature == own, "attributes", f"temperature {own}", f"{temperature}")
    size = manifest.size + manifest_bytes
    _require(
        size == commit.stored_bytes, "commit", f"{size} stored bytes", f"{commit.stored_bytes}"
    )


def _verify_object(cache: Cache, commit: Commit, manifest: Manifest, report: Report) -> bool:
    """Whether the object is what the manifest says, to the byte."""
    path = f"{attempt_path(commit.part, commit.attempt)}/{OBJECT_NAME}"
    before = len(report.findings)
    with report.watch(path):
        data = cache.storage.get(path)
        report.read_bytes += len(data)
        digest = jsonfile.digest(data)
        if (len(data), digest) != (manifest.size, manifest.hash):
            expected = f"{manifest.size} bytes with hash {manifest.hash}"
            report.find(path, f"expected {expected}; got {len(data)} with {digest}")
        for name, entry in manifest.arrays.items():
            for i, chunk in enumerate(entry.chunks):
                with report.watch(path):
                    _check_chunk(data, chunk, entry, f"{name}, chunk {i}")
        with report.watch(path):
            check_container(data, manifest, "container")
    return len(report.findings) == before


def _check_chunk(data: bytes, chunk: Chunk, entry: ArrayEntry, where: str) -> None:
    encoded = data[chunk.offset : chunk.offset + chunk.length]
    digest = jsonfile.digest(encoded)
    _require(digest == chunk.hash, where, f"hash {chunk.hash}", f"{digest} ({len(encoded)} bytes)")
    decode_chunk(encoded, np.dtype(entry.dtype), chunk_numbers(entry.shape), where)


def _verify_numbers(cache: Cache, commit: Commit, shard: Shard, report: Report) -> None:
    path = f"{attempt_path(commit.part, commit.attempt)}/{OBJECT_NAME}"
    token, scored = shard.read("token"), shard.read("scored")
    vocab_size = cache.identity.vocab_size
    with report.watch(path):
        largest = max(int(token.max(initial=0)), int(shard.read("teacher_prompt").max(initial=0)))
        _require(largest < vocab_size, "token", f"ids below {vocab_size}", f"{largest}")
        _require(bool((scored <= 1).all()), "scored", "0 or 1", f"{scored.max(initial=0)}")
        _check_rows(commit, shard, scored)
    with report.watch(path):
        _check_rollouts(cache, commit, shard)
    sampled = token[scored == 1]
    for start in range(0, commit.positions, BLOCK_ROWS):
        stop = min(start + BLOCK_ROWS, commit.positions)
        block = shard.read_ranges([(name, start, stop) for name in SCORES])
        arrays: Arrays = dict(zip(SCORES, block, strict=True))
        arrays |= {"token": sampled[start:stop], "scored": np.ones(stop - start, np.uint16)}
        with report.watch(path):
            where = f"positions {start} to {stop - 1}"
            _check_scores(arrays, cache.identity.topk, vocab_size, where)
            check_agreement(arrays, where)


def _check_rows(commit: Commit, shard: Shard, scored: np.ndarray) -> None:
    """The edges, the prompt lengths and the mask must give the row table that the commit holds."""
    table = commit.row_lengths().astype(np.int64)
    tokens = shard.read("sequence_start").astype(np.int64)
    positions = shard.read("position_start").astype(np.int64)
    counted = np.concatenate([[0], np.cumsum(scored, dtype=np.int64)])[tokens]
    stored = np.stack([np.diff(tokens), shard.read("prompt_length"), np.diff(positions)], axis=1)
    fits = np.array_equal(stored, table) and np.array_equal(counted, positions)
    _require(fits, "row lengths", "those of the commit's row table", "others")
    first = tokens[:-1] + shard.read("prompt_length")
    prompts = np.concatenate([[0], np.cumsum(scored, dtype=np.int64)])[first] - positions[:-1]
    _require(not prompts.any(), "scored", "no position in a prompt", f"{int(prompts.sum())}")


def _check_rollouts(cache: Cache, commit: Commit, shard: Shard) -> None:
    """Every column that comes from the rollouts must equal them."""
    table, meta, digest = cache.read_part(commit.part)
    if digest != commit.rollouts_hash:
        return  # found with the rollouts
    sampler = shard.manifest.attributes["sampler"]
    _require(sampler == meta.sampler, "sampler", f"{meta.sampler} (rollouts)", f"{sampler}")
    for name, expected in part_arrays(table).items():
        found = shard.read(name)
        floats = expected.dtype.kind == "f"
        same = np.array_equal(found, expected, equal_nan=floats)
        _require(same, name, "the values of the part's rollouts", "others")


def _check_scores(arrays: Arrays, topk: int, vocab_size: int, where: str) -> None:
    ids, top = arrays["topk_id"], arrays["topk_logprob"].astype(np.float32)
    _require(bool((arrays["topk_count"] == topk).all()), where, f"{topk} entries each", "others")
    largest = int(ids.max(initial=0))
    _require(largest < vocab_size, where, f"top-k ids below {vocab_size}", f"{largest}")
    sorted_ids = np.sort(ids, axis=1)
    twice = int((sorted_ids[:, 1:] == sorted_ids[:, :-1]).any(axis=1).sum())
    _require(twice == 0, where, "every top-k id once", f"{twice} positions with one twice")
    for name in ("topk_logprob", "tail_logprob", "sampled_logprob"):
        above = int((~(arrays[name] <= 0)).sum())
        _require(above == 0, where, f"{name} of at most 0", f"{above} that are not")
    falling = (top[:, 1:] < top[:, :-1]) | (
        (top[:, 1:] == top[:, :-1]) & (ids[:, 1:] > ids[:, :-1])
    )
    unsorted = int((~falling).any(axis=1).sum())
    _require(unsorted == 0, where, "entries sorted by logprob, then id", f"{unsorted} that are not")


def _require(holds: bool, where: str, expected: str, got: str) -> None:
    if not holds:
        raise CorruptError(where, expected, got, "Score the part again.")
