"""Charts in Weights & Biases: the tags of TensorBoard with the split before them; its errors stop no run."""

import shutil
import sys
import threading
from types import SimpleNamespace

import pytest

from deepseek_jax.errors import UserError
from deepseek_jax.train import board, wandb_run
from deepseek_jax.train.metrics import Metrics
from deepseek_jax.train.wandb_run import WandbRun


class Service:
    """As much of the module wandb as is used; keeps what it receives."""

    def __init__(self, fails: bool = False):
        self.begun, self.logged, self.steps, self.is_finished, self.fails = {}, [], [], False, fails

    def init(self, **given: object) -> "Service":
        self.begun = given
        return self

    def define_metric(self, name: str, step_metric: str) -> None:
        self.steps.append((name, step_metric))

    def log(self, figures: dict) -> None:
        if self.fails:
            raise RuntimeError("no quota left\nand more")
        self.logged.append(figures)

    def finish(self) -> None:
        self.is_finished = True

    def Histogram(self, np_histogram: tuple) -> SimpleNamespace:
        return SimpleNamespace(loads=np_histogram[0].tolist())


@pytest.fixture
def service(monkeypatch) -> Service:
    found = Service()
    monkeypatch.setitem(sys.modules, "wandb", found)
    return found


def run(workdir, service: Service) -> None:
    with Metrics(workdir, 10, live=False, charts=lambda: WandbRun(workdir, "project", {"seed": 0})) as metrics:
        metrics.step(1, {"main": 2.0, "gradient_norm": float("nan")}, {"expert_load": [[3.0, 1.0]]})
        metrics.evaluation(1, {"main": 1.5})


def test_both_splits_arrive_under_the_tags_of_the_board(tmp_path, service):
    run(tmp_path, service)
    assert service.begun["project"] == "project" and service.begun["config"] == {"seed": 0}
    assert service.steps == [("*", "step")] and service.is_finished
    train, held_out = service.logged
    assert train["step"] == 1 and train["train/loss/next_token"] == 2.0 and "train/optimizer/gradient_norm" not in train
    assert train["train/routing/expert_load/layer_00"].loads == [3.0, 1.0]
    assert held_out == {"step": 1, "held_out/loss/next_token": 1.5}


def test_a_run_that_resumes_has_the_same_id_and_another_one_another(tmp_path, service):
    ids = []
    for name in ("a", "a", "b"):
        WandbRun(tmp_path / name, "project", {})
        ids.append(service.begun["id"])
    assert ids[0] == ids[1] != ids[2] and service.begun["resume"] == "allow"


def test_a_copy_of_a_path_is_another_run(tmp_path, service):
    """Its id is not the path's: a workdir that was removed and made anew does not continue the old charts."""
    ids = []
    for _ in range(2):
        WandbRun(tmp_path / "a", "project", {})
        ids.append(service.begun["id"])
        shutil.rmtree(tmp_path / "a")
    assert ids[0] != ids[1]


def test_a_service_that_never_finishes_holds_up_nothing(tmp_path, service, monkeypatch, capfd):
    """Its own files are closed before."""
    monkeypatch.setattr(wandb_run, "FINISH_S", 0.1)
    over, closed = threading.Event(), []
    monkeypatch.setattr(service, "finish", over.wait)
    close = board._EventFile.close
    monkeypatch.setattr(board._EventFile, "close", lambda file: (close(file), closed.append(over.is_set())))
    run(tmp_path, service)
    over.set()
    assert len(closed) == 2 and "has not sent all within" in capfd.readouterr().err


def test_an_error_of_the_service_is_said_once_and_stops_nothing(tmp_path, monkeypatch, capfd):
    service = Service(fails=True)
    monkeypatch.setitem(sys.modules, "wandb", service)
    run(tmp_path, service)
    assert capfd.readouterr().err.count("wandb: no quota left. Its charts end here") == 1


def test_a_service_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"pip install \"deepseek_jax\[wandb\]\""):
        WandbRun(tmp_path, "project", {})
