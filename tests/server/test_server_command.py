"""``python -m sssd serve``: starts, serves, and at SIGTERM ends what runs and then itself."""

import os
import re
import signal
import subprocess
import sys
import threading

import openai
import pytest
from served import make_model, tiny_tokenizer


@pytest.mark.slow
def test_the_command_serves_and_ends_gracefully(tmp_path):
    folder = tmp_path / "tiny"
    make_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    command = [
        sys.executable,
        "-m",
        "sssd",
        "serve",
        str(folder),
        "--port",
        "0",
        "--grace",
        "60",
        "--max-tokens",
        "200",
    ]
    environment = os.environ | {"SSSD_API_KEYS": "one,two", "SSSD_CACHE": str(tmp_path)}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as process:
        lines = []
        try:
            for line in process.stderr:
                lines.append(line)
                if found := re.search(r"http://127.0.0.1:\d+", line):
                    break
            else:
                pytest.fail("".join(lines))
            rest = threading.Thread(target=lambda: lines.extend(process.stderr))
            rest.start()
            with openai.OpenAI(
                base_url=f"{found[0]}/v1", api_key="two", max_retries=0, timeout=120
            ) as client:
                stream = client.completions.create(
                    model="tiny",
                    prompt="abc",
                    max_tokens=200,
                    stream=True,
                    temperature=1.0,
                    logit_bias={"0": -100, "1": -100, "2": -100},
                )
                chunks = iter(stream)
                text = next(chunks).choices[0].text
                process.send_signal(signal.SIGTERM)
                for chunk in chunks:
                    text += chunk.choices[0].text
                assert len(text) == 200
            assert process.wait(timeout=60) == 0
            rest.join()
        finally:
            process.kill()
    assert not any("Traceback" in line or "rror" in line for line in lines), "".join(lines)


def test_what_is_missing_is_named():
    code = (
        "import sys; sys.modules['uvicorn'] = None; from sssd.cli import main; sys.exit(main(['serve', 'x']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode in (1, 2)
    assert "pip install 'sssd[serve]'" in done.stderr
    assert "Traceback" not in done.stderr
