"""10,000 requests that schemathesis invents from the server's own description: none is answered with a status of 5xx.

    pip install schemathesis && pytest -m matrix -n0 -s tests/serve/test_fuzz.py
    DEEPSEEK_JAX_CASES=500 pytest …                                             # another number of requests

Half of them follow the description, half break it somewhere. Before a real engine, so that what passes the checks runs.
"""

import collections
import os
import warnings

import pytest

from deepseek_jax import run_config
from deepseek_jax.serve.engine import Engine
from tests.serve import twin
from tests.serve.conftest import SIZES, Network
from tests.serve.scripted import serve, wait_until

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed")
import hypothesis  # noqa: E402
import hypothesis.strategies as st  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.matrix, pytest.mark.filterwarnings("default"), pytest.mark.timeout(7200)]
NEEDED = ("messages", "prompt", "tokens")
N_CASES = int(os.environ.get("DEEPSEEK_JAX_CASES", "10000"))
SHARES = {"/chat/completions": 0.4, "/completions": 0.4, "/tokenize": 0.12, "/detokenize": 0.08}
TEXT = {"type": "string", "maxLength": 12}
CALL = {"type": "object", "properties": {"id": TEXT, "type": {"const": "function"}}, "required": ["function"]}
CALL["properties"]["function"] = {"type": "object", "properties": {"name": TEXT, "arguments": TEXT}}
PART = {"type": "object", "properties": {"type": {"enum": ["text", "image_url"]}, "text": TEXT}, "required": ["type"]}
MESSAGE = {
    "type": "object",
    "properties": {
        "role": {"enum": ["user", "system", "assistant", "tool"]},
        "content": {"anyOf": [TEXT, {"type": "null"}, {"type": "array", "items": PART, "maxItems": 3}]},
        "prefix": {"type": "boolean"},
        "reasoning_content": TEXT,
        "tool_call_id": TEXT,
        "tool_calls": {"type": "array", "items": CALL, "maxItems": 2},
    },
    "required": ["role", "content"],
}
ASKED = {"type": "object", "properties": {"role": {"const": "user"}, "content": TEXT}, "required": ["role", "content"]}
FUNCTION = {"type": "object", "properties": {"name": TEXT, "description": TEXT, "strict": {"type": "boolean"}}}
FUNCTION["properties"]["parameters"] = {
    "type": "object",
    "properties": {
        "type": {"enum": ["object", "string", "array", "nonsense"]},
        "properties": {"type": "object", "additionalProperties": {"type": "object"}, "maxProperties": 3},
        "pattern": TEXT,
        "enum": {"type": "array", "maxItems": 3},
        "$ref": {"enum": ["#", "#/a", "http://localhost/a"]},
        "minimum": {"type": "number"},
    },
}
TOOL = {"type": "object", "properties": {"type": {"const": "function"}, "function": FUNCTION}}


def description(app):
    """The server's own, in which models, messages, tools and schemas look as clients send them."""
    found = app.openapi()
    forms = found["components"]["schemas"]

    def refine(form, field, **better):
        one = forms[form]["properties"][field]
        forms[form]["properties"][field] = (
            {**one, "anyOf": [{**one["anyOf"][0], **better}, *one["anyOf"][1:]]}
            if "anyOf" in one
            else {**one, **better}
        )

    for form in ("ChatBody", "Tokenize"):
        several = [{"type": "array", "items": item, "minItems": 1, "maxItems": 3} for item in (ASKED, MESSAGE)]
        forms[form]["properties"]["messages"] = {"anyOf": several}
        refine(form, "tools", items=TOOL, maxItems=3)
    for form in ("ChatBody", "TextBody"):
        refine(form, "model", enum=["", "mine"])
        refine(form, "n", maximum=3)
        refine(form, "max_tokens", maximum=20)
    forms["JsonSchema"]["properties"]["schema"] = FUNCTION["properties"]["parameters"]
    return found


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A small V3 with random weights whose tokenizer has all special tokens, so that calls can be asked for too."""
    tokenizer = twin.write_tokenizer(tmp_path_factory.mktemp("tokenizer"))
    config = run_config.load("tiny_v3")
    config.model.update(SIZES | {"n_layers": 1, "n_dense_layers": 0, "vocab_size": tokenizer.vocab_size})
    network = Network(config)
    options = {"page_size": 8, "n_pages": 49, "n_rows": 4, "chunk": 16, "n_steps": 8}
    engine = Engine(network.definition, network.weights, 160, **options)
    engine.compile_largest()
    made = serve(engine, name="v31", tokenizer=tokenizer, end_ids=(tokenizer.eos_id,), n_positions=160, most=64)
    yield made
    made.stop()


@pytest.fixture(scope="module")
def invented(served):
    """Makes requests of the description."""
    with warnings.catch_warnings(action="ignore"):
        made = schemathesis.openapi.from_dict(description(served.server.config.app.app))
    made.config.update(base_url=served.url)
    return made


@pytest.mark.parametrize("path", SHARES)
def test_no_invented_request_is_an_error_of_the_server(served, invented, path):
    statuses = collections.Counter()
    operation = invented[path]["POST"]
    modes = list(schemathesis.GenerationMode)

    def run(mode):
        @hypothesis.settings(
            max_examples=round(N_CASES * SHARES[path]) // len(modes),
            deadline=None,
            database=None,
            derandomize=False,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.seed(0)
        @hypothesis.given(case=operation.as_strategy(generation_mode=mode), kept=st.sets(st.integers(0, 9)))
        def ask(case, kept):
            if isinstance(case.body, dict):  # of many fields at once one is wrong nearly always
                fields = [field for n, field in enumerate(case.body) if n % 10 in kept or field in NEEDED]
                case.body = {field: case.body[field] for field in fields}
            status = case.call(timeout=120).status_code
            statuses[status] += 1
            assert status < 500

        ask()

    for mode in modes:
        run(mode)
    print(path, sum(statuses.values()), dict(sorted(statuses.items())))
    assert served.worker.is_alive and 200 in statuses and all(status == 200 or status >= 400 for status in statuses)
    wait_until(lambda: served.worker.n_open == 0)
    pages = served.worker.engine.ranks[0].pages
    assert pages.n_free == pages.n_pages - 1
