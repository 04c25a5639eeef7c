"""The tests of the server, where it can run."""

from importlib.util import find_spec

NEEDED = ("torch", "transformers", "starlette", "uvicorn", "pydantic", "openai")

if any(find_spec(name) is None for name in NEEDED):
    # pip install 'sssd[hf,serve,dev]'
    collect_ignore_glob = ["test_*.py"]
else:
    from served import address, alone, chat_ids, client, model, tokenizer  # noqa: F401
