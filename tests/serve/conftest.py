"""A small V3 with random weights, created without initialisers, which would need compiling."""

import jax
import numpy as np
import pytest

from deepseek_jax import run_config
from deepseek_jax.abstract_model import abstract_module
from deepseek_jax.layers.base import bind, split
from deepseek_jax.serve.engine import Engine
from deepseek_jax.serve.pages import PagePool
from deepseek_jax.serve.ranks import Rank

SIZES = {"d_model": 16, "n_layers": 3, "dense_width": 24, "n_heads": 2, "q_rank": 12, "kv_rank": 8, "nope_width": 8}
SIZES |= {"rope_width": 4, "value_width": 8, "n_experts": 8, "expert_width": 8, "top_k": 2, "mtp_depth": 0}


class Network:
    """A definition with weights, and the full forward pass to compare with."""

    def __init__(self, config):
        self.config, self.vocab_size = config, config.model.vocab_size
        self.definition, params, router_bias = split(abstract_module(config))
        definition = self.definition
        draw = np.random.default_rng(0)

        def leaf(path, array):
            noise = draw.normal(size=array.shape) * (0.3 if len(array.shape) > 1 else 0.1)
            is_gain = path[-1].key == "gain"
            return jax.device_put(np.asarray(noise + 1.0 if is_gain else noise, array.dtype))

        self.weights = jax.tree_util.tree_map_with_path(leaf, (params, router_bias))
        self.forward = jax.jit(lambda params, bias, ids_BT: bind(definition, params, bias)(ids_BT))

    def last_logits(self, ids):
        """Logits after `ids`, by a forward pass over the whole sequence (padded at its end)."""
        padded = np.zeros((1, 32), np.int32)
        padded[0, : len(ids)] = ids
        return np.asarray(self.forward(*self.weights, padded))[0, len(ids) - 1]


@pytest.fixture(scope="session")
def network():
    """Without a dense layer, of which serving knows nothing; `test_families.py` has networks with one."""
    config = run_config.load("tiny_v3")
    config.model.update(SIZES | {"n_layers": 2, "n_dense_layers": 0})
    return Network(config)


@pytest.fixture(scope="session")
def engine(network):
    """Makes engines that share their programs: all have memory for 49 pages of 8 tokens, of which some use fewer.

    Unless `is_padded` is False they run the programs of the most rows only, so that few are compiled.
    """
    programs = set()

    def make(n_positions=32, n_pages=17, is_padded=True, **options):
        options = {"n_rows": 4, "chunk": 16} | options
        made = Engine(network.definition, network.weights, n_positions, page_size=8, n_pages=49, **options)
        made.ranks[0] = Rank(PagePool(n_pages, 8), options["n_rows"], options["chunk"])
        made._pads_to_largest = is_padded
        programs.add(made.programs)  # or they would go with the last engine
        return made

    return make


@pytest.fixture(scope="session")
def foreseeing():
    """A network with multi-token prediction, whose drafts are wrong mostly."""
    config = run_config.load("tiny_v3")
    config.model.update(SIZES | {"mtp_depth": 1, "n_layers": 1, "n_dense_layers": 0})
    return Network(config)


@pytest.fixture(scope="module")
def script():
    """The scripted engine of `served`."""
    from tests.serve.scripted import Script

    return Script()


@pytest.fixture(scope="module")
def served(script):
    """A server of a scripted engine, with keys."""
    from tests.serve.scripted import serve

    made = serve(script, keys=("secret", "other"))
    yield made
    made.stop()


@pytest.fixture(scope="module")
def their_client(served):
    """OpenAI's client of that server."""
    import openai

    with openai.OpenAI(base_url=served.url + "/v1", api_key="secret", max_retries=0) as made:
        yield made


@pytest.fixture
def client(their_client, served, script):
    """The client, when nothing runs and the script is as at first."""
    from tests.serve.scripted import wait_until

    wait_until(lambda: script.is_idle and served.worker.n_open == 0)
    script.__init__()
    return their_client


@pytest.fixture
def compilations():
    """Names of programs as JAX compiles them, or finds them in its cache on the disk."""
    found = []

    def note(event, _, **about):
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(about.get("fun_name", event))

    jax.monitoring.register_event_duration_secs_listener(note)
    yield found
    jax.monitoring.unregister_event_duration_listener(note)
