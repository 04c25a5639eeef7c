"""Batch calls: what they take, what they refuse, and that they are what single calls are."""

import threading
import time
import warnings

import numpy as np
import pytest

import sssd
from sssd import DraftBatch, Drafter
from sssd.errors import BatchError, ClosedError, InvalidArgumentError, InvalidTokenError, MemoryLimitError
from sssd.requests import Requests

PROMPT = [1, 2, 3, 4, 5, 1, 2, 3, 4, 6, 1, 2, 3]


def private(**options):
    return Drafter(live_bytes=0, soft_bytes=0, **options)


def begin(drafter, count):
    return [drafter.begin([*PROMPT, *range(seed % 4)]) for seed in range(count)]


def same(one, two):
    for name in ("token_ids", "parents", "depths", "probs", "sources"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))


@pytest.mark.parametrize("threads", [1, 3])
def test_a_step_is_extend_and_draft_of_each(threads):
    drafter, alone = private(threads=threads), private()
    sequences, twins = begin(drafter, 20), begin(alone, 20)
    rng, out = np.random.default_rng(0), DraftBatch(20, 400)
    for turn in range(30):
        lengths = rng.integers(0, 4, 20)
        tokens = rng.integers(0, 8, lengths.sum())
        offsets = np.append(0, lengths.cumsum())
        budgets = rng.integers(0, 20, 20)
        if turn % 2:
            batch = drafter.step(sequences, tokens, offsets, budgets, max_depth=5, out=out)
            assert batch is out
        else:
            drafter.extend_batch(sequences, tokens, offsets)
            batch = drafter.draft_batch(iter(sequences), budgets, max_depth=5)
        assert len(batch) == 20
        assert batch.offsets.tolist() == np.append(0, np.cumsum([len(tree) for tree in batch])).tolist()
        for index, twin in enumerate(twins):
            twin.extend(tokens[offsets[index] : offsets[index + 1]])
            same(batch[index], twin.draft(int(budgets[index]), max_depth=5))


def test_the_total_goes_to_the_most_probable_nodes():
    drafter = private(threads=2)
    sequences = begin(drafter, 12)
    whole = drafter.draft_batch(sequences, 64)
    batch = drafter.draft_batch(sequences, 64, total_nodes=30)
    assert batch.offsets[-1] == 30
    assert sorted(batch.probs, reverse=True) == sorted(whole.probs, reverse=True)[:30]
    least = drafter.draft_batch(sequences, 64, total_nodes=30, min_nodes=2)
    assert (np.diff(least.offsets) >= np.minimum(np.diff(whole.offsets), 2)).all()
    assert least.offsets[-1] == 30


def test_trees_know_the_end_of_the_text():
    drafter = private(end_token_ids=[4])
    sequence = drafter.begin(PROMPT, max_length=len(PROMPT) + 2)
    assert sequence.draft(32).depths.tolist() == [1]
    full = drafter.begin(PROMPT, max_length=len(PROMPT))
    batch = drafter.draft_batch([sequence, full, drafter.begin(PROMPT)], 32)
    assert np.diff(batch.offsets)[1] == 0
    tree = batch[2]
    ends = set(np.flatnonzero(tree.token_ids == 4).tolist())
    assert ends
    assert not ends & set(tree.parents.tolist())


def test_topk_is_taken():
    drafter = Drafter(live_bytes=0)
    sequences = begin(drafter, 3)
    batch = drafter.step(
        sequences,
        [7, 7, 7],
        [0, 1, 2, 3],
        topk_ids=np.full((3, 1), 7),
        topk_probs=np.ones((3, 1), np.float32),
    )
    assert len(batch) == 3
    assert drafter.draft_batch(begin(drafter, 1)).token_ids[0] == 7


def test_buffers_are_the_callers():
    dtypes = {"probs": np.float32, "sources": np.int8}
    buffers = {
        name: np.full(100, 77, dtypes.get(name, np.int32))
        for name in ("token_ids", "parents", "depths", "probs", "sources", "offsets")
    }
    out = DraftBatch(4, 64, **buffers)
    drafter = private()
    drafter.draft_batch(begin(drafter, 4), 16, out=out)
    for name, buffer in buffers.items():
        assert getattr(out, name).base is buffer
    assert 0 < buffers["probs"][0] == out.probs[0] <= 1
    assert {sssd.SOURCES[source] for source in out.sources} == {"lower", "request"}
    assert "4 sequences" in repr(out)
    with pytest.raises(IndexError):
        out[4]
    same(out[-1], out[3])
    buffers["parents"][3] = 3
    with pytest.raises(InvalidArgumentError, match="written to"):
        out[0]


@pytest.mark.parametrize(
    "buffer",
    [
        np.zeros(3, np.int32),
        np.zeros(64, np.int64),
        np.zeros(128, np.int32)[::2],
        [0] * 64,
        np.frombuffer(bytes(256), np.int32),
    ],
)
def test_unfit_buffers_are_refused(buffer):
    with pytest.raises(InvalidArgumentError, match="token_ids must be a contiguous, writable int32 array"):
        DraftBatch(4, 64, token_ids=buffer)


def test_bad_input_changes_nothing():
    drafter = private(vocab_size=10)
    sequences = begin(drafter, 2)
    other = private().begin(PROMPT)
    refused = [
        (([*sequences, sequences[0]], [], [0, 0, 0, 0]), {}, "sequences\\[2\\] is in the batch twice"),
        (([other], [], [0, 0]), {}, "belongs to another drafter"),
        (([1], [], [0, 0]), {}, "must be a Sequence"),
        ((sequences, [1], [0, 1]), {}, "offsets must be 3 numbers that rise from 0 to the 1 tokens"),
        ((sequences, [1, 2], [0, 2, 1]), {}, "offsets"),
        ((sequences, [1, 2], [1, 1, 2]), {}, "offsets"),
        ((sequences, [1, 2], [0, -1, 2]), {}, "offsets"),
        ((sequences, [1, 2], [0, 1, 2], 2000), {}, "max_nodes must be between 0 and 1024"),
        ((sequences, [1, 2], [0, 1, 2], [1]), {}, "max_nodes must be one number or 2"),
        ((sequences, [1, 2], [0, 1, 2]), {"min_nodes": 5, "total_nodes": 9}, "min_nodes are 10"),
        ((sequences, [1, 2], [0, 1, 2]), {"total_nodes": -1}, "total_nodes"),
        ((sequences, [1, 2], [0, 1, 2]), {"min_prob": 2}, "min_prob"),
        ((sequences, [1, 2], [0, 1, 2]), {"max_depth": -1}, "max_depth"),
        ((sequences, [1, 2], [0, 1, 2]), {"out": DraftBatch(2, 63)}, "room for 2 sequences and 63 nodes"),
        ((sequences, [1, 2], [0, 1, 2]), {"topk_ids": [[1]]}, "topk_probs belong together"),
    ]
    for arguments, options, message in refused:
        with pytest.raises(InvalidArgumentError, match=message):
            drafter.step(*arguments, **options)
    with pytest.raises(InvalidTokenError, match="integers"):
        drafter.extend_batch(sequences, [1, 1.5], [0, 1, 2])
    with pytest.raises(TypeError):
        drafter.draft_batch(3)
    assert [len(sequence) for sequence in sequences] == [13, 14]


def test_an_empty_batch_is_fine():
    batch = private().step([], [], [0])
    assert (len(batch), batch.offsets.tolist(), batch.probs.tolist()) == (0, [0], [])


def test_failures_name_their_sequences_and_the_others_are_served():
    drafter = private(max_sequence_bytes=400_000)
    sequences = begin(drafter, 5)
    sequences[1].close()
    long = np.arange(20_000)
    tokens = np.concatenate([[1], [1], long, [1], [1]])
    offsets = [0, 1, 2, 2 + len(long), 3 + len(long), 4 + len(long)]
    with pytest.raises(BatchError, match="sequences 1, 2 of the batch failed") as caught:
        drafter.step(sequences, tokens, offsets, 8)
    failures, batch = caught.value.failures, caught.value.batch
    assert [type(failures[index]) for index in (1, 2)] == [ClosedError, MemoryLimitError]
    assert (np.diff(batch.offsets) > 0).tolist() == [True, False, False, True, True]
    assert [len(sequences[index]) for index in (0, 2, 3)] == [14, 15, 17]
    sequences[2].check_integrity()
    with pytest.raises(BatchError) as caught:
        drafter.extend_batch(sequences, tokens, offsets)
    assert caught.value.batch is None


def test_prompts_come_in_pieces_and_in_the_background():
    prompt = np.random.default_rng(1).integers(0, 50, 30_000)
    drafter = private(threads=2)
    pieces = drafter.begin(prompt[:7])
    pieces.prefill(prompt[7:9000])
    pieces.prefill(prompt[9000:])
    background = drafter.begin(prompt, background=True)
    deadline = time.monotonic() + 60
    while not background.ready:
        assert time.monotonic() < deadline
    same(pieces.draft(64), drafter.begin(prompt).draft(64))
    same(background.draft(64), pieces.draft(64))
    late = private(threads=1).begin(prompt, background=True)
    assert not late.ready
    assert len(late.draft(64)) == 0
    late.extend(prompt[:1])
    assert late.ready
    assert len(late) == len(prompt) + 1


def test_forks_and_truncations():
    drafter = private()
    sequence = drafter.begin(PROMPT * 50)
    before = drafter.memory["used"]
    forks = [sequence.fork() for _ in range(8)]
    # the index is shared
    assert drafter.memory["used"] - before < 8 * (sequence.memory_bytes - 20_000)
    forks[0].extend([9, 9, 9])
    same(forks[1].draft(32), sequence.draft(32))
    forks[0].truncate(len(PROMPT) * 50)
    same(forks[0].draft(32), sequence.draft(32))
    forks[2].truncate(3)
    assert forks[2].token_ids.tolist() == PROMPT[:3]
    same(forks[2].draft(32), drafter.begin(PROMPT[:3]).draft(32))
    for length in (-1, 4):
        with pytest.raises(InvalidArgumentError, match="between 0 and the sequence's 3 tokens"):
            forks[2].truncate(length)
    for fork in forks:
        fork.check_integrity()


def test_requests_go_by_name():
    requests = Requests(private())
    requests.begin("a", PROMPT)
    requests.fork("a", "b").extend([9])
    assert (list(requests), len(requests), "a" in requests) == (["a", "b"], 2, True)
    batch = requests.step(["b", "a"], [1, 2], [0, 1, 2], 8)
    assert len(batch) == 2
    requests.extend_batch(["a"], [3], [0, 1])
    assert requests["a"].token_ids.tolist()[-2:] == [2, 3]
    assert len(requests.draft_batch(["a"], 4)) == 1
    with pytest.raises(InvalidArgumentError, match="'a' is running"):
        requests.begin("a", PROMPT)
    requests.finish("a")
    requests.abort("b")
    for call in (requests.finish, requests.abort, requests.__getitem__):
        with pytest.raises(InvalidArgumentError, match="no request 'a'"):
            call("a")


def test_what_is_done_is_counted():
    drafter = private(threads=1)
    sequences = begin(drafter, 4)
    for _ in range(3):
        batch = drafter.step(sequences, [1, 2] * 4, [0, 2, 4, 6, 8], 8)
    sequences[0].extend([99])
    sequences[0].draft(4)
    sequences[0].finish()
    metrics = drafter.metrics
    assert (metrics["begun"], metrics["finished"], metrics["tokens"]) == (4, 1, 25)
    assert metrics["batch_sequences"]["sum"] == 12
    # drafts whose outcome is known: those of two steps, and of one sequence a third
    assert sum(metrics["nodes"]["counts"]) == sum(metrics["accepted"]["counts"]) == 9
    for sequence in sequences:
        sequence.close()
    sources = drafter.stats["sources"].values()
    assert metrics["nodes"]["sum"] == sum(source["drafted"] for source in sources) >= 9 * len(batch[0]) / 2
    assert metrics["accepted"]["sum"] == sum(source["accepted"] for source in sources) > 0
    assert 0 < metrics["batch_seconds"]["sum"] < 60


def test_one_batch_object_serves_one_batch_at_a_time():
    drafter, out = private(), DraftBatch(4, 64)
    sequences = [begin(drafter, 4) for _ in range(4)]
    problems = []

    def work(own):
        for _ in range(300):
            try:
                drafter.draft_batch(own, 16, out=out)
            except sssd.SssdError as problem:
                if "in use" not in str(problem):
                    problems.append(problem)

    threads = [threading.Thread(target=work, args=(own,)) for own in sequences]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not problems


def aliased(size):
    buffer = np.zeros(size, np.int32)
    return DraftBatch(2, size, token_ids=buffer, parents=buffer)


def overlapping(size):
    buffer = np.zeros(size + 8, np.int32)
    return DraftBatch(2, size, token_ids=buffer[:size], depths=buffer[8:])


def read_only(size):
    buffer = np.zeros(size, np.float32)
    out = DraftBatch(2, size, probs=buffer)
    buffer.flags.writeable = False
    return out


def resized(size):
    buffer = np.zeros(size, np.int8)
    out = DraftBatch(2, size, sources=buffer)
    buffer.resize(1, refcheck=False)
    return out


def retyped(size):
    buffer = np.zeros(3, np.int32)
    out = DraftBatch(2, size, offsets=buffer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        buffer.dtype = np.float32
    return out


@pytest.mark.parametrize("spoiled", [aliased, overlapping, read_only, resized, retyped])
def test_buffers_that_cannot_be_written_to_are_found_before_anything_changes(spoiled):
    drafter, out = private(), spoiled(64)
    sequences = begin(drafter, 2)
    lengths = [len(sequence) for sequence in sequences]
    with pytest.raises(sssd.errors.InvalidArgumentError, match="out cannot be written to"):
        drafter.step(sequences, [3, 3], [0, 1, 2], 8, out=out)
    assert [len(sequence) for sequence in sequences] == lengths
    with pytest.raises(sssd.errors.InvalidArgumentError, match="out cannot be written to"):
        DraftBatch.from_trees([sssd.DraftTree([1], [-1])], out=out)


@pytest.mark.parametrize(("threads", "count"), [(1, 3), (2, 300)])
def test_prompts_that_no_thread_has_room_for_get_ready_when_asked_for(threads, count):
    """One thread has nobody to leave them to, and a queue of 64 prompts is full."""
    drafter = sssd.Drafter(threads=threads, live_bytes=0, soft_bytes=0)
    prompt = np.arange(20_000) % 500
    sequences = [drafter.begin(prompt, background=True) for _ in range(count)]
    for sequence in sequences:
        for _ in range(2000):
            if len(sequence.draft(4)):
                break
            time.sleep(0.001)
        assert sequence.ready
        assert len(sequence) == len(prompt)
