"""The laws of the pool: no page is lost, shared by writers, or found for other tokens than it holds."""

import random

import numpy as np
import pytest

from deepseek_jax.errors import UserError
from deepseek_jax.serve.pages import NULL, PagePool, Table, root

ROOT = root(b"weights")


def filled(pool, tokens, begin=ROOT):
    table = pool.open(begin, tokens)
    assert pool.extend(table, len(tokens))
    pool.name(table, tokens)
    return table


def test_a_table_gets_pages_for_its_tokens_and_returns_them():
    pool = PagePool(n_pages=5, page_size=4)
    table = Table(ROOT)
    assert pool.extend(table, 9) and len(table.pages) == 3
    assert NULL not in table.pages
    assert pool.extend(table, 12) and len(table.pages) == 3  # the last page had space
    assert not pool.extend(table, 17) and len(table.pages) == 3  # five pages, four of them there
    pool.check([table])
    pool.close(table)
    assert pool.n_free == 4
    pool.check([])


def test_a_prompt_with_the_same_beginning_shares_its_full_pages():
    pool = PagePool(n_pages=10, page_size=4)
    first = filled(pool, range(10))
    second = pool.open(ROOT, [*range(8), 90, 91, 92, 93])
    assert second.pages == first.pages[:2]
    pool.check([first, second])
    pool.close(first)
    third = pool.open(ROOT, range(100))  # the second still holds them
    assert third.pages == second.pages


def test_at_least_one_token_is_computed():
    pool = PagePool(n_pages=10, page_size=4)
    filled(pool, range(8))
    assert len(pool.open(ROOT, range(8)).pages) == 1
    assert len(pool.open(ROOT, range(9)).pages) == 2


def test_with_look_ahead_the_next_token_must_be_equal_too():
    pool = PagePool(n_pages=10, page_size=4, look_ahead=1)
    filled(pool, range(9))
    assert len(pool.open(ROOT, range(9)).pages) == 2
    assert len(pool.open(ROOT, range(8)).pages) == 1
    assert len(pool.open(ROOT, [0, 1, 2, 3, 4, 5, 6, 7, 99, 9]).pages) == 1


def test_other_weights_and_other_salts_find_nothing():
    pool = PagePool(n_pages=10, page_size=2)
    filled(pool, range(6), root(b"weights", b"alice"))
    assert not pool.open(root(b"weights", b"bob"), range(6)).pages
    assert not pool.open(root(b"weightsalice"), range(6)).pages
    assert pool.open(root(b"weights", b"alice"), range(6)).pages


def test_new_weights_forget_all():
    pool = PagePool(n_pages=10, page_size=2)
    filled(pool, range(6))
    pool.forget()
    assert not pool.open(ROOT, range(6)).pages


def test_what_new_weights_add_to_pages_of_old_ones_is_found_by_nobody():
    pool, table = PagePool(n_pages=10, page_size=2), Table(ROOT)
    pool.extend(table, 6)
    pool.name(table, range(4))
    pool.forget([table])
    pool.name(table, range(6))  # its third page was computed from two old ones
    filled(pool, range(4))
    assert len(pool.open(ROOT, range(8)).pages) == 2


def test_a_digest_alone_is_no_hit(monkeypatch):
    monkeypatch.setattr("deepseek_jax.serve.pages._digest", lambda before, covered: b"collision")
    pool = PagePool(n_pages=10, page_size=2)
    filled(pool, [1, 2, 3])
    assert not pool.open(ROOT, [4, 5, 6]).pages


def test_the_least_recently_used_pages_are_taken_first_and_ends_before_beginnings():
    pool = PagePool(n_pages=6, page_size=2)
    old, new = filled(pool, [1, 2, 3, 4]), filled(pool, [5, 6, 7, 8])
    pool.close(old)
    pool.close(new)
    assert pool.extend(Table(ROOT), 2)  # the page without a name
    assert len(pool.open(ROOT, [1, 2, 3, 4, 0]).pages) == 2
    pool = PagePool(n_pages=5, page_size=2)
    old, new = filled(pool, [1, 2, 3, 4]), filled(pool, [5, 6, 7, 8])
    pool.close(old)
    pool.close(new)
    other = Table(ROOT)
    assert pool.extend(other, 2)
    assert [len(pool.open(ROOT, tokens).pages) for tokens in ([1, 2, 3, 4, 0], [5, 6, 7, 8, 0])] == [1, 2]


@pytest.mark.parametrize("sizes", [(1, 64, 0), (8, 0, 0), (8, 4, -1)])
def test_impossible_pools_are_refused(sizes):
    with pytest.raises(UserError, match="expected 2 pages or more"):
        PagePool(*sizes)


@pytest.mark.parametrize("look_ahead", [0, 1])
def test_laws_hold_over_random_operations(look_ahead):
    """A model of the memory beside the pool: what a found page holds is what the finder computed."""
    draw = random.Random(look_ahead)
    size = 3
    pool = PagePool(n_pages=24, page_size=size, look_ahead=look_ahead)
    memory: dict[int, tuple] = {}  # by page: all tokens up to its end, and those that its entries depend on
    open_tables: list[tuple[Table, list[int]]] = []
    n_hits = 0
    for number in range(50_000):
        operation = draw.random()
        if operation < 0.4 or not open_tables:
            tokens = [draw.randrange(2) for _ in range(draw.randrange(1, 24))]
            table = pool.open(ROOT, tokens)
            for place, page in enumerate(table.pages):
                assert memory[page] == tuple(tokens[: (place + 1) * size + look_ahead])
            n_hits += len(table.pages)
            assert len(table.pages) * size < len(tokens)
            n_found = len(table.pages)
            if not pool.extend(table, len(tokens)):
                assert len(table.pages) == n_found
                pool.close(table)
                continue
            _write(memory, table, tokens, n_found, size, look_ahead)
            pool.name(table, tokens)
            open_tables.append((table, tokens))
        elif operation < 0.6:
            table, tokens = draw.choice(open_tables)
            n_full = (len(tokens) - look_ahead) // size
            before = [memory[page] for page in table.pages[: max(0, n_full)]]
            tokens.append(draw.randrange(2))
            if pool.extend(table, len(tokens)):
                _write(memory, table, tokens, max(0, n_full), size, look_ahead)
                pool.name(table, tokens)
            else:
                tokens.pop()
            assert before == [memory[page] for page in table.pages[: len(before)]]
        else:
            table, _ = open_tables.pop(draw.randrange(len(open_tables)))
            pool.close(table)
        if number % 50 == 0:
            pool.check(table for table, _ in open_tables)
        if number % 5_000 == 0:
            pool.forget()
    assert n_hits > 1_000
    for table, _ in open_tables:
        pool.close(table)
    assert pool.n_free == 23


def _write(memory, table, tokens, n_settled, size, look_ahead):
    for place in range(n_settled, len(table.pages)):
        memory[table.pages[place]] = tuple(tokens[: (place + 1) * size + look_ahead])


def test_arrays_and_lists_name_alike():
    pool = PagePool(n_pages=4, page_size=2)
    filled(pool, np.arange(4))
    assert pool.open(ROOT, [0, 1, 2]).pages
