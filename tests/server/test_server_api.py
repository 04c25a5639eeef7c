"""The ``openai`` client's own calls against the server: every text is that of ``model.generate``."""

import json
import re
import urllib.request

import openai
import pytest
import torch

TURN = {"role": "user", "content": "Say it twice: one two, one two."}
GREEDY = {"do_sample": False}


def post(address, path, body):
    data = json.dumps(body).encode()
    request = urllib.request.Request(f"{address}{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)


def test_chat(client, alone, chat_ids):
    ids = chat_ids(TURN)
    answer = client.chat.completions.create(
        model="tiny", messages=[TURN], temperature=0, max_completion_tokens=60
    )
    tokens, text = alone(ids, max_new_tokens=60, **GREEDY)
    choice = answer.choices[0]
    assert choice.message.content == text
    assert choice.message.role == "assistant"
    assert choice.finish_reason == ("length" if len(tokens) == 60 and tokens[-1] != 2 else "stop")
    usage = answer.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(ids), len(tokens))
    assert usage.total_tokens == len(ids) + len(tokens)
    assert answer.object == "chat.completion"


def test_chat_as_a_stream(client, alone, chat_ids):
    stream = client.chat.completions.create(
        model="tiny",
        messages=[TURN],
        temperature=0,
        max_tokens=60,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    tokens, text = alone(chat_ids(TURN), max_new_tokens=60, **GREEDY)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == text
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] in ("length", "stop")
    assert chunks[-1].usage.completion_tokens == len(tokens)
    assert len({chunk.id for chunk in chunks}) == 1
    assert len(chunks) > 4


def test_completions(client, alone):
    answer = client.completions.create(model="tiny", prompt="abcabcabc", temperature=0, max_tokens=40)
    assert answer.choices[0].text == alone("abcabcabc", max_new_tokens=40, **GREEDY)[1]
    assert answer.object == "text_completion"
    short = client.completions.create(model="tiny", prompt=[5, 6, 7], temperature=0)
    assert short.usage.completion_tokens <= 16
    assert short.choices[0].text == alone([5, 6, 7], max_new_tokens=16, **GREEDY)[1]
    stream = client.completions.create(
        model="tiny", prompt=["abc"], temperature=0, max_tokens=30, stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in stream) == alone("abc", max_new_tokens=30, **GREEDY)[1]


@pytest.mark.parametrize("seed", [0, 7, -3, 2**62])
def test_seeds_give_what_they_give_alone(client, alone, seed):
    options = {"temperature": 0.9, "top_p": 0.9}
    answer = client.completions.create(model="tiny", prompt="abc abc", max_tokens=30, seed=seed, **options)
    expected = alone("abc abc", seed=seed, max_new_tokens=30, do_sample=True, top_k=0, **options)
    assert answer.choices[0].text == expected[1]


def test_without_a_seed_texts_differ(client):
    calls = [client.completions.create(model="tiny", prompt="abc", temperature=1.5) for _ in range(4)]
    assert len({call.choices[0].text for call in calls}) > 1


def test_further_options_are_those_of_generate(client, alone):
    answer = client.completions.create(
        model="tiny",
        prompt="abab",
        max_tokens=30,
        temperature=0,
        logit_bias={"10": 50},
        extra_body={"repetition_penalty": 1.3},
    )
    expected = alone(
        "abab", max_new_tokens=30, repetition_penalty=1.3, sequence_bias=[[[10], 50.0]], **GREEDY
    )
    assert answer.choices[0].text == expected[1]
    answer = client.completions.create(
        model="tiny",
        prompt="abab",
        max_tokens=30,
        temperature=0.8,
        seed=1,
        extra_body={"top_k": 5, "min_p": 0.05},
    )
    expected = alone("abab", seed=1, max_new_tokens=30, do_sample=True, temperature=0.8, top_k=5, min_p=0.05)
    assert answer.choices[0].text == expected[1]


@pytest.mark.parametrize("stream", [False, True])
def test_stop(client, alone, stream):
    text = alone("abcabc", max_new_tokens=60, **GREEDY)[1]
    stops = [text[20:22], text[30:33]]
    answer = client.completions.create(
        model="tiny", prompt="abcabc", temperature=0, max_tokens=60, stop=stops, stream=stream
    )
    expected = text[: min(text.index(stop) for stop in stops)]
    if stream:
        chunks = list(answer)
        assert "".join(chunk.choices[0].text for chunk in chunks) == expected
        assert chunks[-1].choices[0].finish_reason == "stop"
    else:
        assert answer.choices[0].text == expected
        assert answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs(client, model, alone, chat_ids, tokenizer, stream):
    ids = chat_ids(TURN)
    tokens, text = alone(ids, max_new_tokens=20, **GREEDY)
    answer = client.chat.completions.create(
        model="tiny",
        messages=[TURN],
        temperature=0,
        max_tokens=20,
        logprobs=True,
        top_logprobs=3,
        stream=stream,
    )
    parts = [answer] if not stream else [chunk for chunk in answer if chunk.choices[0].logprobs]
    content = [entry for part in parts for entry in part.choices[0].logprobs.content]
    with torch.no_grad():
        logits = model(torch.tensor([ids + tokens])).logits[0, len(ids) - 1 : -1]
    known = logits.log_softmax(-1)
    shown = [token for token in tokens if token != 2]
    assert [entry.token for entry in content] == [tokenizer.decode([token]) for token in shown]
    assert "".join(bytes(entry.bytes).decode() for entry in content) == text
    for i, (entry, token) in enumerate(zip(content, shown, strict=True)):
        assert entry.logprob == pytest.approx(float(known[i, token]), abs=1e-3)
        best = known[i].topk(3)
        assert [one.logprob for one in entry.top_logprobs] == pytest.approx(best.values.tolist(), abs=1e-3)
        assert entry.top_logprobs[0].token == entry.token
    plain = client.completions.create(model="tiny", prompt=ids, temperature=0, max_tokens=20, logprobs=2)
    found = plain.choices[0].logprobs
    assert found.tokens == [entry.token for entry in content]
    assert found.token_logprobs == pytest.approx([entry.logprob for entry in content], abs=1e-3)
    assert found.text_offset == list(range(len(found.tokens)))


def test_prediction_is_accepted_and_counted(client, alone):
    prompt = "xyz"
    text = alone(prompt, max_new_tokens=60, **GREEDY)[1]
    told = client.completions.create(
        model="tiny",
        prompt=prompt,
        temperature=0,
        max_tokens=60,
        extra_body={"prediction": {"type": "content", "content": text}},
    )
    assert told.choices[0].text == text
    details = told.usage.completion_tokens_details
    assert details.accepted_prediction_tokens > 40
    wrong = client.chat.completions.create(
        model="tiny",
        messages=[{"role": "user", "content": "xyz"}],
        temperature=0,
        max_tokens=40,
        prediction={"type": "content", "content": [{"type": "text", "text": "nothing of the kind"}]},
    )
    assert wrong.usage.completion_tokens_details.rejected_prediction_tokens > 0


def test_what_was_accepted_is_told(address, alone):
    body = {"model": "tiny", "prompt": "abab", "temperature": 0, "max_tokens": 60, "return_accepted": True}
    drafted = post(address, "/v1/completions", body)
    plain = post(address, "/v1/completions", {**body, "speculate": False})
    text = alone("abab", max_new_tokens=60, **GREEDY)[1]
    for answer in (drafted, plain):
        assert answer["choices"][0]["text"] == text
        assert "".join(token["text"] for token in answer["sssd"]["tokens"]) == text
        assert answer["sssd"]["accepted"] == sum(token["accepted"] for token in answer["sssd"]["tokens"])
    assert drafted["sssd"]["accepted"] > 0
    assert drafted["sssd"]["passes"] + drafted["sssd"]["accepted"] + 1 == drafted["sssd"]["output"]
    assert plain["sssd"]["accepted"] == plain["sssd"]["drafted"] == 0
    assert plain["sssd"]["passes"] == plain["sssd"]["output"] - 1


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="there is no model"):
        client.models.retrieve("other")
    with pytest.raises(openai.NotFoundError, match="there is no model"):
        client.completions.create(model="other", prompt="abc")


def test_the_page_and_what_is_asked_about_the_server(address):
    with urllib.request.urlopen(f"{address}/") as answer:
        page, policy = answer.read().decode(), answer.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'")
    # one file, that asks nobody else
    assert "http://" not in page
    assert "https://" not in page
    assert "v1/chat/completions" in page
    with urllib.request.urlopen(f"{address}/health") as answer:
        assert json.load(answer)["status"] == "ok"
    pytest.importorskip("prometheus_client")
    with urllib.request.urlopen(f"{address}/metrics") as answer:
        text = answer.read().decode()
    assert re.search(r'sssd_server_requests_total{model="[^"]+",outcome="length"}', text)
    assert "sssd_server_output_tokens_total" in text
    assert "sssd_accepted_bucket" in text
