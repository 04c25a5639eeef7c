"""A tiny random model behind the server: its text is characters, a token each."""

import string
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import openai
import pytest
import torch
import uvicorn
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from sssd.server import Engine, Settings, create_app

sys.path.append(str(Path(__file__).parents[1] / "hf"))
from models import tiny_model

CHARACTERS = string.ascii_letters + " .,:;|\n!é"
TEMPLATE = (
    "{% for message in messages %}{{ message.role[0] + ':' + message.content + '|' }}{% endfor %}"
    "{% if messages[0].content == 'refuse' %}{{ raise_exception('not that') }}{% endif %}a:"
)


def tiny_tokenizer():
    """Characters as tokens, behind <pad>, <s> and </s>."""
    vocab = {token: i for i, token in enumerate(["<pad>", "<s>", "</s>", *CHARACTERS])}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="!"))
    tokenizer.decoder = decoders.Fuse()
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=TEMPLATE, **names)


def make_model(name="llama", **changes):
    """A model of ``tests/hf/models.py`` that knows the tokenizer's tokens, and seldom ends by itself."""
    model = tiny_model(name, attention="sdpa", vocab_size=len(CHARACTERS) + 3, **changes)
    with torch.no_grad():
        model.get_output_embeddings().weight[2] *= 0.1
    return model


@contextmanager
def serving(engine, tokenizer, **settings):
    """A server on loopback; gives its address and the application's server."""
    app = create_app(engine, tokenizer, Settings("tiny", **settings))
    config = uvicorn.Config(app, port=0, log_level="error", timeout_graceful_shutdown=5)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
        engine.close()


@pytest.fixture(scope="session")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="session")
def model():
    return make_model()


@pytest.fixture(scope="module")
def address(model, tokenizer):
    """A server with the limits of a small one."""
    engine = Engine(model, tokenizer, max_running=4, max_nodes=6, prefill_tokens=24)
    with serving(engine, tokenizer, max_waiting=16, max_tokens=128, max_body=20_000) as address:
        yield address


@pytest.fixture(scope="module")
def client(address):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="mine", max_retries=0) as client:
        yield client


@pytest.fixture(scope="session")
def alone(model, tokenizer):
    """What ``model.generate`` gives for one prompt: the tokens, and the text."""

    def generate(prompt, seed=None, **options):
        ids = tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else list(prompt)
        if seed is not None:
            torch.manual_seed(seed)
        inputs = torch.tensor([ids])
        output = model.generate(inputs, attention_mask=torch.ones_like(inputs), **options)[
            0, len(ids) :
        ].tolist()
        return output, tokenizer.decode(output, skip_special_tokens=True)

    return generate


@pytest.fixture(scope="session")
def chat_ids(tokenizer):
    """The tokens of a chat."""

    def ids(*messages):
        return tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=True)[
            "input_ids"
        ]

    return ids
