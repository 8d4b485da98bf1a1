"""What the server refuses: requests that are wrong, too large, without a key; and what it counts."""

import http.client
import json
import socket
import threading
import time

import pytest

from tests.serve.scripted import ASK, SCHEMA, Script, ask, message_of, serve, wait_until

DEEP: dict = {"name": "f"}

for _ in range(100):
    DEEP = {"properties": DEEP, "name": "f"}

REFUSED = [
    ({"messages": []}, 422, "messages: List should have at least 1 item"),
    ({}, 422, "messages: Field required"),
    (b"{", 422, "JSON"),
    ({"messages": ASK, "temperature": 3}, 422, "temperature: Input should be less than or equal to 2"),
    ({"messages": ASK, "n": 1000}, 422, "n: Input should be less than or equal to 16"),
    ({"messages": ASK, "max_tokens": 0}, 422, "max_tokens"),
    ({"messages": ASK, "top_logprobs": 2}, 400, "top_logprobs=2 without logprobs"),
    ({"messages": ASK, "logprobs": True, "top_logprobs": 21}, 422, "top_logprobs"),
    ({"messages": ASK, "presence_penalty": 2.5}, 422, "presence_penalty"),
    ({"messages": ASK, "logit_bias": {"x": 1}}, 422, "logit_bias"),
    ({"messages": ASK, "logit_bias": {"5": 101}}, 422, "logit_bias"),
    ({"messages": None}, 422, "messages: Field required"),
    ({"messages": ASK, "n": 9}, 400, "a request for 9 answers: expected 8 or fewer"),
    ({"messages": ASK, "response_format": {"type": "json_schema"}}, 400, "expected the schema"),
    ({"messages": ASK, "response_format": SCHEMA({"type": "nonsense"})}, 400, "cannot be followed: Invalid type"),
    ({"messages": ASK, "response_format": SCHEMA({"$ref": "http://localhost/x"})}, 400, "cannot be followed"),
    ({"messages": ASK, "response_format": SCHEMA({"pattern": "((a"} | {"type": "string"})}, 400, "cannot be followed"),
    ({"messages": ASK, "response_format": SCHEMA({"title": "x" * 200_000})}, 400, "expected at most 200000"),
    ({"messages": ASK, "tool_choice": "required"}, 400, "asks for a call of a tool: expected one of []"),
    ({"messages": ASK, "tool_choice": "some"}, 422, "tool_choice"),
    ({"messages": ASK, "tools": [{"type": "function", "function": DEEP}]}, 422, "nested deeper than 64"),
    ({"messages": ASK, "tools": [{"description": "x" * 10**6}]}, 422, "longer than 1000000 characters"),
    ({"messages": ASK, "response_format": SCHEMA(DEEP)}, 422, "nested deeper than 64"),
    ({"messages": ASK, "response_format": SCHEMA({"allOf": [{"pattern": "a"}] * 17})}, 400, "17 regular expressions"),
    ({"messages": [{"role": "assistant", "content": "Hi", "prefix": True}]}, 400, "no message before it"),
    ({"messages": ASK, "thinking": {"type": "perhaps"}}, 422, "thinking.type"),
    ({"messages": ASK, "model": "gpt-4o"}, 400, "model 'gpt-4o': this server has 'mine'"),
    ({"messages": [{"role": "robot", "content": "Hi"}]}, 400, "messages[0]"),
    ({"messages": [*ASK, {"role": "assistant", "content": "Hi"}]}, 400, "the last message is the assistant's"),
    ({"messages": [{"role": "user", "content": "x" * 600}]}, 400, "expected fewer than 500"),
    ({"messages": [{"role": "user", "content": "x" * 450}]}, 400, "too long"),
]


@pytest.mark.parametrize(("body", "status", "message"), REFUSED)
def test_bad_requests_are_refused_in_words(served, client, body, status, message):
    found_status, found = ask(served, "POST", "/chat/completions", body)
    assert found_status == status and message in message_of(found)
    assert set(found["error"]) == {"message", "type", "param", "code"}
    assert served.worker.is_alive and served.worker.n_open == 0


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"prompt": [None] * 100_000}, 422, "prompt"),
        ({"prompt": ["a"] * 100_000, "n": 16}, 400, "a request for 1600000 answers"),
        ({"prompt": []}, 400, "the prompt is an empty list"),
        (
            {"prompt": "a", "logit_bias": dict.fromkeys(map(str, range(100_000)), "x")},
            422,
            "100000 biases: expected at",
        ),
        ({"prompt": "a", "model": "x" * 10**6}, 400, "model 'xxx"),
    ],
)
def test_large_bodies_get_short_answers(served, body, status, message):
    found_status, found = ask(served, "POST", "/completions", body)
    assert found_status == status and message in message_of(found) and len(message_of(found)) < 1000


def test_a_long_body_is_refused(served, client):
    status, found = ask(served, "POST", "/completions", b" " * (32 * 2**20 + 1))
    assert (status, found["error"]["type"]) == (413, "invalid_request_error")


CHUNKED = ["Authorization: Bearer secret", "Transfer-Encoding: chunked", "", "2", "{}"]  # a body of 2 bytes


@pytest.mark.parametrize(
    "lines",
    [
        ["GET /health HTTP/1.1", "Host: x", "X: " + "y" * 10**6],
        ["GET /health HTTP/1.1", "Host: x", *(f"X-{n}: {'y' * 100}" for n in range(10_000))],
        ["POST /tokenize HTTP/1.1", "Host: x", *CHUNKED, "0", "X: " + "y" * 10**6],
        ["POST /tokenize HTTP/1.1", "Host: x", *CHUNKED, "2;" + "y" * 10**6, "{}", "0"],
        ["GET /" + "y" * 10**6 + " HTTP/1.1", "Host: x"],
    ],
    ids=["line", "lines", "trailer", "chunk", "path"],
)
def test_long_heads_are_refused(served, client, lines):
    place = served.url.removeprefix("http://").split(":")
    with socket.create_connection((place[0], int(place[1])), timeout=10) as connection:
        try:
            connection.sendall("\r\n".join([*lines, "", ""]).encode())
            answer = connection.recv(100)
        except ConnectionError:
            answer = b""
    assert answer[:12] in (b"", b"HTTP/1.1 400")
    assert ask(served, "GET", "/health")[0] == 200


@pytest.mark.parametrize("key", ["", "wrong", "secret2", "ключ"])
def test_every_route_asks_for_a_key(served, key):
    """All that the application has, so that none is forgotten."""
    paths = served.server.config.app.app.openapi()["paths"]
    routes = {(method.upper(), path) for path, methods in paths.items() for method in methods} - OPEN
    assert {("POST", "/v1/chat/completions"), ("GET", "/metrics"), ("GET", "/beta/tokenizer_info")} < routes
    for method, path in routes:
        status, found = ask(served, method, path, key=key)
        assert (status, found["error"]["type"]) == (401, "invalid_request_error")


OPEN = {("GET", "/"), ("GET", "/health")}


@pytest.mark.parametrize(("key", "status"), [("secret", 200), ("other", 200), ("wrong", 401), ("", 401)])
def test_every_key_is_compared_in_constant_time(served, monkeypatch, key, status):
    compared = []

    def compare(given, expected):
        compared.append((given, expected))
        return given == expected

    monkeypatch.setattr("hmac.compare_digest", compare)
    assert ask(served, "GET", "/models", key=key)[0] == status
    assert compared == [(key.encode(), b"secret"), (key.encode(), b"other")]


def test_no_address_in_a_request_is_opened(served, client):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/x.png"
        content = [{"type": "text", "text": "What is it?"}, {"type": "image_url", "image_url": {"url": url}}]
        body = {"messages": [{"role": "user", "content": content}]}
        assert ask(served, "POST", "/chat/completions", body)[0] == 400
        body = {"messages": ASK, "response_format": SCHEMA({"$ref": url}), "tools": [{"url": url}]}
        assert ask(served, "POST", "/chat/completions", body)[0] == 400
        with pytest.raises(BlockingIOError):
            listener.accept()


def test_without_a_key_a_body_is_not_read(served):
    assert ask(served, "POST", "/v1/completions", b"{", key="")[0] == 401
    assert ask(served, "POST", "/v1/completions", b"{")[0] == 422
    address, length = served.url.removeprefix("http://"), {"Content-Length": "1000000"}
    connection = http.client.HTTPConnection(address, timeout=20)
    connection.request("POST", "/v1/completions", b"", length)  # the body does not come
    assert connection.getresponse().status == 401
    connection.close()


def numbers(served):
    """The metrics by name, their labels behind it."""
    connection = http.client.HTTPConnection(served.url.removeprefix("http://"), timeout=20)
    connection.request("GET", "/metrics", headers={"Authorization": "Bearer secret"})
    lines = connection.getresponse().read().decode().splitlines()
    connection.close()
    pairs = [line.removeprefix("deepseek_jax_").rsplit(" ", 1) for line in lines if not line.startswith("#")]
    return {name: float(value) for name, value in pairs}


def test_metrics_count_what_was_served(client, served, script):
    before = numbers(served)
    script.answer = lambda prompt: "word " * 4
    client.chat.completions.create(model="mine", messages=ASK, max_tokens=10)
    stream = client.chat.completions.create(model="mine", messages=ASK, stream=True)
    list(stream)
    after = numbers(served)

    def more(name):
        return after[name] - before.get(name, 0)

    assert more("completion_tokens_total") == 30 and more("prompt_tokens_total") == 16
    assert more("cached_prompt_tokens_total") == 16
    assert more('completions_total{reason="length"}') == 2
    assert more('http_responses_total{route="/chat/completions",status="200"}') == 2
    assert more("time_to_first_token_seconds_count") == more("time_per_output_token_seconds_count") == 2
    assert (after["alive"], after["requests_open"], after["pages"], after["pages_free"]) == (1, 0, 8, 8)
    script.answer, script.speed, script.delay_s = lambda prompt: "word " * 90, 1, 0.01
    stream = client.chat.completions.create(model="mine", messages=ASK, stream=True)
    next(iter(stream))
    assert numbers(served)["requests_open"] == 1
    stream.close()
    wait_until(lambda: numbers(served)["requests_open"] == 0)
    assert numbers(served)['completions_total{reason="unfinished"}'] >= 1
    assert ask(served, "GET", "/nothing")[0] == 404 and numbers(served)[NO_ROUTE] >= 1


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("after", [b"", b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"], ids=["alone", "one waits behind"])
def test_who_leaves_ends_all_requests_of_the_connection(served, script, stream, after):
    script.answer, script.speed, script.delay_s = lambda prompt: "word " * 90, 1, 0.02
    body = json.dumps({"messages": ASK, "stream": stream, "max_tokens": 400}).encode()
    head = f"POST /chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer secret\r\nContent-Length: {len(body)}"
    host, port = served.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(f"{head}\r\nContent-Type: application/json\r\n\r\n".encode() + body)
        wait_until(lambda: served.worker.n_open == 1 and script.requests)
        connection.sendall(after)
        time.sleep(0.05)  # for the server to read it
    (job,) = script.requests
    wait_until(lambda: served.worker.n_open == 0 and not script.requests)
    assert len(job.ids) > 100, "it ended long before its answer would have"


NO_ROUTE = 'http_responses_total{route="none",status="404"}'


def test_an_error_of_the_server_is_counted_and_its_words_are_kept_from_clients(served, monkeypatch):
    def fail(*_):
        raise OSError(2, "No such file", "/home/alice/weights")

    name = 'http_responses_total{route="/completions",status="500"}'
    before = numbers(served).get(name, 0)
    monkeypatch.setattr("deepseek_jax.serve.api.completions.text_prompt", fail)
    status, found = ask(served, "POST", "/completions", {"prompt": "a"})
    assert status == 500 and message_of(found) == "an error of the server: see its log"
    assert numbers(served)[name] == before + 1


def test_models(client):
    assert [model.id for model in client.models.list()] == ["mine"]


def test_unknown_routes_and_health(served):
    assert ask(served, "GET", "/v1/nothing")[0] == 404
    assert ask(served, "GET", "/health", key="") == (200, {"requests": 0})


def test_a_refusal_that_is_held_does_not_hold_up_the_end_of_the_server():
    served = serve(Script(), most=0)
    refusals = served.server.config.app.refusals
    refusals._n_refused, refusals._draw = 1000.0, lambda: 1.0
    answers = []
    asking = threading.Thread(target=lambda: answers.append(ask(served, "POST", "/completions", {"prompt": "a"})))
    asking.start()
    wait_until(lambda: refusals.n_held == 1)
    ended = []
    refusals.end = lambda end=refusals.end: (ended.append(refusals.n_held), end())
    served.stop()
    asking.join(10)
    assert [status for status, _ in answers] == [429] and ended == [1] and not served.thread.is_alive()
