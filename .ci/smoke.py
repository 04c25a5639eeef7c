"""What an installed wheel must do by itself, with what it requires and nothing else. Run in an empty folder.

python -I .ci/smoke.py
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import sssd
from sssd import Datastore, DatastoreBuilder, Drafter, DraftTree

TEXT = [5, 6, 7, 8, 9, 5, 6]


def command(*arguments: str) -> str:
    """What a command of the package prints."""
    run = [sys.executable, *(["-I"] if sys.flags.isolated else []), "-m", "sssd", *arguments]
    return subprocess.run(run, capture_output=True, text=True, check=True).stdout


def main() -> None:
    """Drafts from a request and from a store, verifies, saves and loads, and asks the commands."""
    with Drafter(end_token_ids=[2]).begin(TEXT) as sequence:
        tree = sequence.draft(max_nodes=4)
        assert tree.token_ids[0] == 7, tree.render()
        nodes, new = tree.accept([7, *(int(token) + 1 for token in tree.token_ids)])
        assert len(new) == len(nodes) + 1 > 1
        sequence.extend(new)
    assert DraftTree([1, 2], [-1, 0]).attention_mask().tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "words.sssd"
        with DatastoreBuilder(path, vocab_size=100) as builder:
            for start in range(50):
                builder.add([1, 2, 3, start])
        with Datastore.open(path) as store:
            assert store.count([1, 2]) == 50
            with Drafter(datastore=store).begin([1]) as sequence:
                assert sequence.draft(2).token_ids.tolist() == [2, 3]
        drafter = Drafter(datastore=path)
        drafter.begin(TEXT).finish()
        drafter.save(Path(folder) / "state")
        Drafter.load(Path(folder) / "state")
        # a mapped file cannot be removed on every system
        del drafter
        assert "200" in command("info", str(path))
        assert "intact" in command("verify", str(path))
    assert sssd.__version__ in command("--version")
    free = "" if getattr(sys, "_is_gil_enabled", bool)() or sys.version_info < (3, 13) else ", no GIL"
    print(f"sssd {sssd.__version__} works on Python {sys.version.split()[0]}{free}, {sys.platform}")


if __name__ == "__main__":
    main()
