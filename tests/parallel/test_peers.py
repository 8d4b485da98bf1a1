"""What processes know of one another: a lost one is named, the others leave with a reason, a good end is not a loss."""

import threading
import time

import jax
import pytest

from deepseek_jax.errors import LocalError, UserError
from deepseek_jax.parallel import peers as peers_module
from deepseek_jax.parallel.peers import FAILED, GOODBYE, LOST, Peers


class Store:
    """The texts that the processes share; may fail or wait, as the service does when process 0 is gone."""

    def __init__(self):
        self.texts: dict[str, str] = {}
        self.answer = lambda: None

    def set(self, key: str, value: str) -> None:
        self.answer()
        self.texts[key] = value

    def get(self, key: str) -> str:
        self.answer()
        return self.texts.get(key, "")

    def under(self, folder: str) -> list[str]:
        self.answer()
        return [text for key, text in self.texts.items() if key.startswith(folder)]


class Stop:
    is_running = True
    exit_code = 143


@pytest.fixture
def store(monkeypatch):
    """Process 1 of 2, with short times."""
    shared = Store()
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(peers_module.compat, "process_store", lambda: shared)
    for name, seconds in (("BEAT_S", 0.02), ("JUDGE_S", 0.02), ("LOST_S", 0.3), ("GRACE_S", 0.1)):
        monkeypatch.setattr(peers_module, name, seconds)
    return shared


def watch(seconds: float, during=lambda beat: None) -> list[int]:
    """The exit codes with which process 1 would have left within some time."""
    codes = []
    with Peers(lambda: "The newest checkpoint is of step 7.", leave=codes.append):
        for beat in range(round(seconds / 0.02)):
            during(beat)
            time.sleep(0.02)
            if codes:
                break
    return codes


def test_a_process_that_beats_is_alive(store, capfd):
    assert watch(0.8, lambda beat: store.texts.update({"deepseek_jax/beat/0": str(beat)})) == []
    assert capfd.readouterr().err == ""
    assert store.texts["deepseek_jax/beat/1"] == GOODBYE


def test_a_beat_under_way_does_not_undo_the_goodbye(store, monkeypatch):
    def slow(key: str, value: str) -> None:
        time.sleep(0 if value == GOODBYE else 0.1)
        store.texts[key] = value

    monkeypatch.setattr(store, "set", slow)
    assert watch(0.2, lambda beat: store.texts.update({"deepseek_jax/beat/0": str(beat)})) == []
    time.sleep(0.2)
    assert store.texts["deepseek_jax/beat/1"] == GOODBYE


def test_a_process_that_stops_beating_is_lost(store, capfd):
    store.texts["deepseek_jax/beat/0"] = "5"
    assert watch(3) == [LOST]
    said = capfd.readouterr().err
    assert "process 0 of this run has not been heard of" in said and "checkpoint is of step 7" in said
    assert "process 0" in store.texts[FAILED]  # the others hear of it


def test_the_beats_say_what_a_process_is_doing(store):
    store.texts |= {"deepseek_jax/beat/0": "7 compile", "deepseek_jax/beat/2": GOODBYE}
    with Peers(lambda: "") as peers:
        peers.doing = lambda: "wait"
        deadline = time.monotonic() + 10
        while "wait" not in peers.others() and time.monotonic() < deadline:
            time.sleep(0.01)
        assert peers.others() == {"compile", "wait"}


def test_a_process_that_has_said_goodbye_is_not_lost(store):
    store.texts["deepseek_jax/beat/0"] = GOODBYE
    assert watch(0.8) == []


def test_the_reason_of_one_reaches_all(store, capfd):
    store.texts |= {"deepseek_jax/beat/0": GOODBYE, FAILED: "process 3: UserError: a.jsonl is missing"}
    assert watch(3) == [LOST]
    assert "another process of this run has left (process 3: UserError: a.jsonl is missing)" in capfd.readouterr().err


@pytest.mark.parametrize("answer", [lambda: time.sleep(1000), lambda: 1 / 0])
def test_a_coordinator_that_is_gone_is_noticed(store, capfd, monkeypatch, answer):
    store.answer = answer
    monkeypatch.setattr(peers_module, "ANNOUNCE_S", 0.1)
    assert watch(3) == [LOST]
    assert "process 0, which all others rely on, has not answered" in capfd.readouterr().err


@pytest.mark.parametrize("problem", [OSError("stale file handle"), None])
def test_checkpoints_that_cannot_be_looked_at_do_not_keep_a_process(store, capfd, monkeypatch, problem):
    def advice():
        if problem is None:
            never.wait(5)
            return "too late"
        raise problem

    never, codes = threading.Event(), []
    monkeypatch.setattr(peers_module, "ANNOUNCE_S", 0.1)
    Peers(advice, leave=codes.append).lost("process 0 is gone.")
    never.set()
    assert codes == [LOST]
    shown = capfd.readouterr().err
    assert "process 0 is gone." in shown and "too late" not in shown


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (jax.errors.JaxRuntimeError("UNKNOWN: Gloo ReduceScatter failed: Connection reset by peer"), LOST),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory for the peer buffers of NCCL"), 1),
        (LocalError("tokens.uint16 has changed"), 2),
        (KeyboardInterrupt(), 130),
        (ZeroDivisionError("division by zero"), 1),
    ],
)
def test_an_error_of_one_process_does_not_wait_for_the_others(store, error, code, capfd):
    codes = []
    peers = Peers(lambda: "", leave=codes.append)
    with pytest.raises(type(error)), peers.guard(Stop()):
        raise error
    assert codes == [code]
    assert FAILED in store.texts and "process 1" in capfd.readouterr().err


def test_an_error_that_all_meet_takes_the_usual_way(store):
    codes = []
    peers = Peers(lambda: "", leave=codes.append)
    with pytest.raises(UserError), peers.guard(Stop()):
        raise UserError("5 steps in a row were not finite")
    assert codes == [] and FAILED not in store.texts


def test_one_process_alone_watches_nobody():
    before = threading.active_count()
    with Peers(lambda: "") as peers, peers.guard(Stop()):
        assert threading.active_count() == before
