"""Pages on the disk are found after a restart; in any doubt they are computed again, and the text is the same."""

import jax
import numpy as np
import pytest

from deepseek_jax.errors import UserError
from deepseek_jax.serve.disk import fingerprint
from deepseek_jax.serve.engine import Engine
from deepseek_jax.serve.sampling import Sampling

pytestmark = pytest.mark.slow  # every engine traces programs
PROMPT = np.random.default_rng(3).integers(0, 200, 20).tolist()  # two pages and a half


@pytest.fixture(scope="module")
def start(network, engine):
    """Starts engines; those with pages of eight tokens share the programs of `engine`."""

    def make(folder, weights=None, most_bytes=10**9, n_pages=9, page_size=8):
        if page_size == 8:
            made = engine(n_pages=n_pages)
        else:
            made = Engine(network.definition, network.weights, 32, page_size=page_size, n_rows=4, n_pages=n_pages)
        if weights is not None:
            made.replace_weights(weights)
        return made, made.keep_on_disk(folder, most_bytes)

    return make


def run(engine, prompt=PROMPT, **options):
    """Returns the new ids, and how many tokens of the prompt were not computed."""
    request = engine.submit(prompt, Sampling(6, **options))
    ids = []
    while not engine.is_idle:
        for output in engine.step():
            ids += output.ids
    engine.ranks[0].pages.check([])
    return ids, request.n_cached


@pytest.fixture
def written(start, tmp_path):
    """A folder with the pages of a request, its files in the order of the pages, and its ids."""
    engine, disk = start(tmp_path)
    ids, n_cached = run(engine)
    disk.close()
    assert n_cached == 0
    files = sorted(disk.folder.iterdir(), key=lambda path: path.stat().st_mtime_ns)
    assert len(files) == 3  # of 26 tokens
    return tmp_path, files, ids


def test_a_later_engine_finds_them(start, written):
    folder, _, ids = written
    engine, disk = start(folder)
    assert run(engine) == (ids, 16)
    assert run(engine) == (ids, 16)  # from memory
    assert run(engine, [*PROMPT[:16], 5, 6])[1] == 16
    assert run(engine, [5, *PROMPT])[1] == 0
    assert run(engine, salt=b"other") == (ids, 0)
    disk.close()
    continued, disk = start(folder)
    assert run(continued, [*PROMPT, *ids[:5]])[1] == 24
    disk.close()


DAMAGE = {
    "a byte": lambda content: content[:-9] + bytes([content[-9] ^ 1]) + content[-8:],
    "the end": lambda content: content[:-4],
    "more": lambda content: content + b"\0",
    "nothing": lambda content: b"",
    "another file": lambda content: b"PNG" * 1000,
    "the digest": lambda content: content[:25] + bytes([content[25] ^ 1]) + content[26:],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_page_is_computed_again(start, written, damage):
    folder, files, ids = written
    files[1].write_bytes(DAMAGE[damage](files[1].read_bytes()))
    engine, disk = start(folder)
    assert run(engine) == (ids, 8)
    disk.flush()
    disk.close()
    engine, disk = start(folder)
    assert run(engine) == (ids, 16)  # it was written again
    disk.close()


def test_a_page_in_the_place_of_another_is_computed_again(start, written):
    folder, files, ids = written
    files[0].write_bytes(files[1].read_bytes())
    engine, disk = start(folder)
    assert run(engine) == (ids, 0)
    disk.close()


def test_other_weights_and_other_layouts_find_nothing(start, written, network):
    folder, _, ids = written
    leaves, tree = jax.tree.flatten(network.weights)
    leaves[0] = leaves[0].at[(0,) * leaves[0].ndim].multiply(-1)
    other = tree.unflatten(leaves)
    assert fingerprint(other) != fingerprint(network.weights) == fingerprint(network.weights)
    engine, disk = start(folder, other)
    assert run(engine)[1] == 0
    engine.replace_weights(network.weights)
    assert run(engine) == (ids, 16)
    disk.close()
    engine, disk = start(folder, page_size=4)
    assert run(engine) == (ids, 0)
    disk.close()


def test_what_was_used_last_is_kept(start, written):
    folder, files, ids = written
    size = files[0].stat().st_size
    (folder / "mine").mkdir()
    (folder / "mine" / "weights").write_bytes(b"0" * 4 * size)  # nothing that is not a page is counted or deleted
    engine, disk = start(folder, most_bytes=3 * size)
    assert run(engine) == (ids, 16)  # the first two are used, the third is not
    run(engine, [7] * 10)
    disk.close()
    assert files[0].exists() and files[1].exists() and not files[2].exists()
    assert (folder / "mine" / "weights").exists() and files[0].parent.stat().st_mode & 0o77 == 0


def test_too_few_free_pages_are_no_harm(start, written):
    folder, _, ids = written
    engine, disk = start(folder, n_pages=5)
    held = engine.submit([1, 2, 3], Sampling(13))
    engine.step()
    request = engine.submit(PROMPT, Sampling(6))
    found = []
    while not engine.is_idle:
        found += [token for output in engine.step() if output.request is request for token in output.ids]
    assert found == ids and held.has_ended
    disk.close()


def test_a_folder_that_cannot_be_made_is_said(start, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="pages cannot be kept in .*file.*Choose another directory"):
        start(tmp_path / "file")
