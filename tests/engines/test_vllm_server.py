"""``sssd.vllm`` in vLLM's OpenAI server on loopback, with a small cache: ``make vllm``."""

import http.client
import importlib.util
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.timeout(3600)]
if importlib.util.find_spec("vllm") is None:
    pytest.skip("needs vLLM: make vllm", allow_module_level=True)
MODEL = Path(os.environ.get("SSSD_VLLM_MODEL", "nowhere"))
FULL = os.environ.get("SSSD_FULL_TESTS") == "1"
REQUESTS = 200 if FULL else 40
AT_ONCE = 8
TASKS = [
    "Write the text once more, word for word.",
    "What are three good habits for learning a new language?",
    "Write a short story about a fox who finds a clock in the forest.",
    "List the fruits of the text, one a line.",
]
# so long that a request outgrows its first block of the cache, and not all that run have room for two
TEXT = "The market sells apples, pears, plums, cherries, grapes, figs, dates, limes, kiwis and melons. " * 3
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 12}, "count": {"type": "integer", "maximum": 99}},
    "required": ["name", "count"],
    "additionalProperties": False,
}


class Server:
    """The process, and calls to it."""

    def __init__(self, folder):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        numbers = folder / "numbers"
        numbers.mkdir()
        spec = {"method": "custom_class", "model": "sssd.vllm.Proposer", "num_speculative_tokens": 8}
        options = {
            "model": MODEL,
            "served-model-name": "smol",
            "host": "127.0.0.1",
            "port": self.port,
            "dtype": "float32",
            "max-model-len": 512,
            "max-num-seqs": AT_ONCE,
            "num-gpu-blocks-override": 9,
            "middleware": "sssd.vllm.Middleware",
            "speculative-config": json.dumps(spec),
        }
        self.log = (folder / "server.log").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--enforce-eager"]
            + ["--no-enable-prefix-caching"]
            + [word for name, value in options.items() for word in (f"--{name}", str(value))],
            env={
                **os.environ,
                "VLLM_CPU_KVCACHE_SPACE": "1",
                "HF_HUB_OFFLINE": "1",
                "VLLM_NO_USAGE_STATS": "1",
                "PROMETHEUS_MULTIPROC_DIR": str(numbers),
                "SSSD_VLLM": json.dumps({"stop": False}),
            },
            stdout=self.log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def said(self):
        self.log.flush()
        return Path(self.log.name).read_text()

    def wait(self):
        end = time.monotonic() + 900
        while True:
            assert self.process.poll() is None, self.said()[-4000:]
            assert time.monotonic() < end, self.said()[-4000:]
            try:
                if self.get("/health")[0] == 200:
                    return
            except OSError:
                pass
            time.sleep(1)

    def close(self):
        os.killpg(self.process.pid, signal.SIGTERM)
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.log.close()

    def connect(self):
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)

    def get(self, path):
        connection = self.connect()
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()
        finally:
            connection.close()

    def numbers(self):
        """The metrics, summed over labels."""
        found = {}
        for line in self.get("/metrics")[1].splitlines():
            if line and not line.startswith("#"):
                name, value = line.split("{")[0].split(" ")[0], line.rpartition(" ")[2]
                found[name] = found.get(name, 0) + float(value)
        return found

    def chat(self, task, tokens, *, stream=False, read=None, **extra):
        """The text of a completion; of a stream what comes until ``read`` events, after which it is left."""
        body = {
            "model": "smol",
            "messages": [{"role": "user", "content": f"{TEXT}\n{task}"}],
            "temperature": 0,
            "max_tokens": tokens,
            "stream": stream,
            **extra,
        }
        connection = self.connect()
        try:
            headers = {"Content-Type": "application/json"}
            connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
            answer = connection.getresponse()
            if not stream:
                told = json.loads(answer.read())
                assert answer.status == 200, told
                return told["choices"][0]["message"]["content"]
            text, events = "", 0
            for line in answer:
                if line.startswith(b"data: {"):
                    text += json.loads(line[6:])["choices"][0]["delta"].get("content") or ""
                    events += 1
                    if read is not None and events >= read:
                        break
            return text
        finally:
            connection.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    if not (MODEL / "config.json").is_file():
        pytest.skip("SSSD_VLLM_MODEL names no folder of SmolLM2 in safetensors")
    running = Server(tmp_path_factory.mktemp("vllm"))
    try:
        running.wait()
        yield running
    finally:
        running.close()


def schema(of):
    return {"type": "json_schema", "json_schema": {"name": "thing", "schema": of}}


def ask(server, plain, number):
    """One request of some kind; whether its text is the plain one."""
    choose = random.Random(number)
    task, tokens = choose.choice(TASKS), choose.choice((24, 48))
    truth = plain[task, tokens]
    kind = choose.choice(("plain", "off", "right", "wrong", "stream", "left", "schema", "namespace"))
    if kind == "left":
        text = server.chat(task, tokens, stream=True, read=choose.randrange(1, 12))
        return kind, truth.startswith(text)
    if kind == "schema":
        text = server.chat(task, 48, response_format=schema(SCHEMA))
        return kind, text == plain["schema", task]
    extra = {
        "off": {"sssd_off": True},
        "right": {"prediction": {"type": "content", "content": truth}},
        "wrong": {"prediction": {"type": "content", "content": TEXT[choose.randrange(90) :]}},
        "namespace": {"vllm_xargs": {"sssd_namespace": f"tenant {number % 3}"}},
        "stream": {"stream": True},
    }.get(kind, {})
    return kind, server.chat(task, tokens, **extra) == truth


def test_whatever_is_asked_every_text_is_plain_decodings_and_nothing_is_left(server):
    plain = {
        (task, tokens): server.chat(task, tokens, sssd_off=True) for task in TASKS for tokens in (24, 48)
    }
    plain |= {
        ("schema", task): server.chat(task, 48, sssd_off=True, response_format=schema(SCHEMA))
        for task in TASKS
    }
    for task in TASKS:
        assert json.loads(plain["schema", task]).keys() == {"name", "count"}
    before = server.numbers()
    with ThreadPoolExecutor(AT_ONCE) as threads:
        told = list(threads.map(lambda number: ask(server, plain, number), range(REQUESTS)))
    assert [kind for kind, right in told if not right] == []
    assert len({kind for kind, _ in told}) == 8
    end = time.monotonic() + 60
    while (after := server.numbers())["vllm:num_requests_running"] or after["vllm:num_requests_waiting"]:
        assert time.monotonic() < end, after
        time.sleep(0.5)
    # a last one, after which the adapter has seen all others end
    server.chat(TASKS[0], 24)
    after = server.numbers()
    assert after["vllm:num_preemptions_total"] > before["vllm:num_preemptions_total"]
    assert after["vllm:kv_cache_usage_perc"] == 0
    drafted, accepted = (
        after[name] - before.get(name, 0)
        for name in ("vllm:spec_decode_num_draft_tokens_total", "vllm:spec_decode_num_accepted_tokens_total")
    )
    assert drafted > accepted > REQUESTS
    assert after.get("sssd_vllm_failed", 0) == 0
    assert "sssd: a step goes without drafts" not in server.said()


def test_a_prediction_saves_passes(server):
    truth = server.chat(TASKS[0], 48, sssd_off=True)

    def rounds(**extra):
        before = server.numbers().get("vllm:spec_decode_num_drafts_total", 0)
        accepted = server.numbers().get("vllm:spec_decode_num_accepted_tokens_total", 0)
        assert server.chat(TASKS[0], 48, **extra) == truth
        after = server.numbers()
        return (
            after["vllm:spec_decode_num_drafts_total"] - before,
            after["vllm:spec_decode_num_accepted_tokens_total"] - accepted,
        )

    namespace = {"vllm_xargs": {"sssd_namespace": "fresh"}}
    drafts, accepted = rounds(prediction={"type": "content", "content": truth}, **namespace)
    assert accepted / drafts > 4


def test_malformed_bodies_are_refused_by_the_server_itself(server):
    connection = server.connect()
    for body in (b"{", b"[]", b'{"model": "smol", "prediction": 3}', b"\xff" * 100):
        connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        answer.read()
        assert 400 <= answer.status < 500
    connection.close()
    assert server.get("/health")[0] == 200
