"""``sssd.rollout``: groups that learn while they run, policies, snapshots."""

import importlib.util
import io
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sssd import Drafter
from sssd.errors import CorruptStateError, InvalidArgumentError, SssdError
from sssd.rollout import Rollouts
from sssd.sharing import FolderLog, Replica

PROMPT = list(range(10, 30))
TEXT = [(n * n + 7 * n) % 61 + 100 for n in range(60)]


def rollouts(**settings):
    return Rollouts(Drafter(vocab_size=1000, threads=1), **settings)


def say(made, name, tokens, max_nodes=8):
    """A step of one rollout; its tree."""
    return made.step([name], np.array(tokens, np.int32), [0, len(tokens)], max_nodes)[0]


def drafted(made, group):
    """What a new rollout of a group has drafted once it has begun as TEXT does."""
    made.begin("asked", PROMPT, group=group)
    found = say(made, "asked", TEXT[:3]).token_ids.tolist()
    made.abort("asked")
    return found


@pytest.mark.parametrize("commit_tokens", [0, 1, 8, 25])
def test_siblings_draft_what_a_running_one_has_said(commit_tokens):
    made = rollouts(commit_tokens=commit_tokens)
    made.begin("first", PROMPT, group="a")
    assert made["first"].namespace == "a"
    for place in range(0, 40, 4):
        say(made, "first", TEXT[place : place + 4])
    found = drafted(made, "a")
    assert (TEXT[3] in found) == bool(commit_tokens)
    assert TEXT[3] not in drafted(made, "b")
    made.finish("first")
    assert drafted(made, "a")[0] == TEXT[3]


def test_forks_and_rows_are_rollouts_too():
    made = rollouts(commit_tokens=4)
    made.begin("first", PROMPT, group="a")
    made.fork("first", "second")
    say(made, "second", TEXT[:20])
    made.step(["third"], rows=[PROMPT + TEXT[:30]], options=lambda _: {"namespace": "c"}, max_nodes=4)
    assert drafted(made, "c")[0] == TEXT[3]
    assert drafted(made, "a")[0] == TEXT[3]
    made.step([], rows=[], max_nodes=4, ended=["first", "second", "third"])
    assert list(made) == []
    assert made._running == {}
    assert made._groups == {}


def test_texts_of_old_policies_are_forgotten_and_no_others():
    made = rollouts(commit_tokens=0, keep_policies=2)
    for policy in range(5):
        made.policy = policy
        made.begin("one", PROMPT, group="a")
        say(made, "one", [*TEXT[:3], 500 + policy, *TEXT[10:20]])
        made.finish("one")
        found = {token for token in drafted(made, "a") if token >= 500}
        assert found == {500 + kept for kept in (policy - 1, policy) if kept >= 0}
    made.policy = 5
    assert 504 in drafted(made, "a")
    made.policy = 6
    assert "a" not in made.drafter.namespaces()
    assert [token for token in drafted(made, "a") if token >= 100 and token not in TEXT[:3]] == []


def test_a_group_that_runs_is_renewed_later():
    made = rollouts(commit_tokens=0, keep_policies=1)
    made.begin("old", PROMPT, group="a")
    say(made, "old", TEXT[:20])
    made.finish("old")
    made.begin("running", PROMPT, group="a")
    made.policy = 1
    assert TEXT[3] in drafted(made, "a")
    made.abort("running")
    assert TEXT[3] not in drafted(made, "a")


OPERATIONS = st.lists(
    st.tuples(
        st.sampled_from(["begin", "say", "finish", "abort", "policy", "reload"]),
        st.integers(0, 3),
        st.integers(0, 2),
    ),
    max_size=40,
)


@settings(max_examples=30, deadline=None)
@given(keep=st.sampled_from([None, 1, 2]), operations=OPERATIONS)
def test_what_is_kept_is_what_a_list_keeps(tmp_path_factory, keep, operations):
    """Beside a list of (group, policy, text) that forgets as it is written."""
    made, held, running, policy = rollouts(keep_policies=keep), [], {}, 0
    for what, number, group in operations:
        name = str(number)
        if what == "begin" and name not in running:
            running[name] = str(group), [*PROMPT]
            made.begin(name, PROMPT, group=str(group))
        elif what == "say" and name in running:
            running[name][1].extend(TEXT[number : number + 9])
            say(made, name, TEXT[number : number + 9])
        elif what == "finish" and name in running:
            held.append((running[name][0], policy, running.pop(name)[1]))
            made.finish(name)
        elif what == "abort" and name in running:
            del running[name]
            made.abort(name)
        elif what == "policy":
            policy += number
            made.policy = policy
        elif what == "reload" and not running:
            folder = tmp_path_factory.mktemp("snapshot")
            made.save(folder)
            made = Rollouts.load(folder, keep_policies=keep)
            made.policy = policy
            shutil.rmtree(folder)
        kept = [text for text in held if keep is not None and text[1] > policy - keep]
        found = [
            (name, version, text.tolist()) for name, of in made._groups.items() for version, text in of.texts
        ]
        assert sorted(found) == sorted(kept)
        counts = {name: of.running for name, of in made._groups.items() if of.running}
        names = [group for group, _ in running.values()]
        assert counts == {group: names.count(group) for group in names}


def test_a_snapshot_brings_drafts_and_policies_back(tmp_path):
    made = rollouts(keep_policies=2)
    made.policy = 3
    made.begin("one", PROMPT, group="ä/b")
    say(made, "one", TEXT)
    made.finish("one")
    made.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"drafter.sssd-state", "rollouts.npz"}
    again = Rollouts.load(tmp_path, options={"threads": 1}, keep_policies=2)
    assert again.policy == 3
    assert drafted(again, "ä/b")[0] == TEXT[3]
    again.policy = 5
    assert TEXT[3] not in drafted(again, "ä/b")


def test_damaged_snapshots_are_refused(tmp_path):
    made = rollouts(keep_policies=2)
    made.begin("one", PROMPT, group="a")
    say(made, "one", TEXT)
    made.finish("one")
    made.save(tmp_path)
    path = tmp_path / "rollouts.npz"
    whole = path.read_bytes()
    for damaged in (b"", b"PK", whole[:-30], whole[: len(whole) // 2], b"\0" * 1000):
        path.write_bytes(damaged)
        with pytest.raises(CorruptStateError, match="no snapshot of rollouts"):
            Rollouts.load(tmp_path)
    good = dict(np.load(io.BytesIO(whole)))
    wrong = (
        {"names": np.frombuffer(b"[3]", np.uint8)},
        {"names": np.frombuffer(b"[" * 100_000, np.uint8)},
        {"groups": good["groups"] + 1},
        {"groups": np.array([-1])},
        {"policies": np.array([0.5])},
        {"offsets": np.array([0, 10**12])},
        {"offsets": np.array([], np.int64)},
        {"token_ids": np.array([["a"]])},
        {"token_ids": np.array([None], object)},
    )
    for parts in wrong:
        with path.open("wb") as file:
            np.savez(file, **{**good, **parts})
        with pytest.raises(CorruptStateError, match="no snapshot of rollouts"):
            Rollouts.load(tmp_path)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("names.npy", bytes(1 << 24))
    with pytest.raises(CorruptStateError, match="compressed"):
        Rollouts.load(tmp_path)
    path.unlink()
    with pytest.raises(OSError, match="rollouts"):
        Rollouts.load(tmp_path)


def test_what_finishes_is_shared_with_other_machines(tmp_path):
    with Replica(Drafter(vocab_size=1000), FolderLog(tmp_path), namespaces={"a"}) as replica:
        made = Rollouts(replica._drafter, replica)
        made.begin("one", PROMPT, group="a")
        say(made, "one", TEXT)
        made.finish("one")
    assert replica.metrics["published"] == 1


def test_bad_settings_are_refused():
    for settings_ in ({"commit_tokens": -1}, {"keep_policies": 0}):
        with pytest.raises(InvalidArgumentError):
            rollouts(**settings_)
    made = rollouts()
    made.begin("one", PROMPT, group="a")
    with pytest.raises(SssdError):
        made.begin("one", PROMPT, group="b")
    assert made._groups.keys() == {"a"}
    made.finish("one")
    assert made._groups == {}


def test_the_example(capsys):
    path = Path(__file__).parents[2] / "examples/rollouts.py"
    spec = importlib.util.spec_from_file_location("rollouts_example", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main()
    first, *later = [float(line.split()[2]) for line in capsys.readouterr().out.splitlines()]
    assert min(later) > 2 > first
