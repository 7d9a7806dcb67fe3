"""Figures beside metrics.jsonl: TensorBoard, W&B offline and MLflow, begun, resumed and failing."""

import importlib.util
import shutil
import sys

import pytest

import main_moco_isl
from moco_isl.errors import BadInput
from moco_isl.run import loggers
from tests.runs import DIGITS

RUN = [*DIGITS, "--epochs", "2"]


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory):
    """A store of MLflow without a run: it takes seconds to make one."""
    store = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    if importlib.util.find_spec("mlflow"):
        import mlflow

        mlflow.MlflowClient(f"sqlite:///{store}").search_experiments()
    return store


@pytest.fixture
def apart(tmp_path, monkeypatch, empty_store):
    """Libraries write below a folder of the test, and reach no server."""
    if empty_store.exists():
        shutil.copy(empty_store, tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    return tmp_path


def only_mlflow_run(name="moco_isl"):
    client = pytest.importorskip("mlflow").MlflowClient()
    experiment = client.get_experiment_by_name(name)
    (run,) = client.search_runs([experiment.experiment_id])
    return client, run


def stopped_after(n):
    """A launcher's own question whether to stop: yes at the n-th time."""
    asked = iter(range(10**6))
    return lambda: next(asked) + 1 >= n


def test_mlflow_has_the_flags_and_figures_and_how_the_run_ended(apart):
    out = apart / "out"
    assert main_moco_isl.main([*RUN, "--log", "mlflow", "--out", str(out)]) == 0
    client, run = only_mlflow_run()
    assert run.info.status == "FINISHED" and run.info.run_name == "out"
    assert run.data.params["moco_k"] == "128" and run.data.params["dataset"] == "digits"
    losses = client.get_metric_history(run.info.run_id, "epoch/loss")
    assert [metric.step for metric in losses] == [7, 14]
    assert all(metric.value > 0 for metric in losses)
    assert client.get_metric_history(run.info.run_id, "epoch/rankme")


def test_a_stopped_run_goes_on_as_the_same_run_of_mlflow(apart):
    out = apart / "out"
    flags = [*RUN, "--log", "mlflow", "--out", str(out)]
    assert main_moco_isl.main(flags, stopped_after(8)) == 75
    assert only_mlflow_run()[1].info.status == "KILLED"
    assert main_moco_isl.main([*flags, "--resume", "auto"]) == 0
    client, run = only_mlflow_run()
    assert run.info.status == "FINISHED"
    losses = client.get_metric_history(run.info.run_id, "epoch/loss")
    assert [metric.step for metric in losses] == [7, 14]


def test_a_run_from_another_s_file_is_a_run_of_its_own(apart):
    first, second = apart / "one", apart / "two"
    flags = [*RUN, "--log", "mlflow"]
    assert main_moco_isl.main([*flags, "--out", str(first)]) == 0
    file = first / "checkpoint_0000.pth.tar"
    assert main_moco_isl.main([*flags, "--resume", str(file), "--out", str(second)]) == 0
    names = {loggers._read_name(folder, "mlflow") for folder in (first, second)}
    assert len(names) == 2


def test_wandb_offline_resumes_under_the_same_name(apart):
    pytest.importorskip("wandb")
    out = apart / "out"
    flags = [*RUN, "--log", "wandb", "--out", str(out)]
    assert main_moco_isl.main(flags, stopped_after(8)) == 75
    name = (out / "logged_to_wandb.txt").read_text().strip()
    assert main_moco_isl.main([*flags, "--resume", "auto"]) == 0
    assert (out / "logged_to_wandb.txt").read_text().strip() == name
    written = list((out / "wandb").glob("offline-run-*"))
    assert written and all(folder.name.endswith(f"-{name}") for folder in written)
    files = [next(folder.glob("*.wandb")).read_bytes() for folder in written]
    assert any(b"epoch/rankme" in content for content in files)
    assert any(b"moco_k" in content for content in files)


def test_tensorboard_has_the_figures_of_the_epochs(apart):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    out = apart / "out"
    assert main_moco_isl.main([*RUN, "--log", "tensorboard", "--out", str(out)]) == 0
    events = reader.EventAccumulator(str(out))
    events.Reload()
    assert [event.step for event in events.Scalars("epoch/rankme")] == [7, 14]
    assert "step/loss" in events.Tags()["scalars"]


def test_an_unknown_logger_is_named(apart, capfd):
    assert main_moco_isl.main([*RUN, "--log", "mlflow,tensorbord"]) == 2
    said = capfd.readouterr().err
    assert "'tensorbord': expected some of tensorboard, wandb, mlflow" in said


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_missing_library_is_named_with_its_install_command(apart, capfd, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    out = apart / "out"
    assert main_moco_isl.main([*RUN, "--log", name, "--out", str(out)]) == 2
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and f"pip install 'moco_isl[{name}]'" in said
    assert not out.exists()


def test_a_store_that_cannot_be_written_ends_in_one_line(apart, capfd, monkeypatch):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nowhere://x")
    assert main_moco_isl.main([*RUN, "--log", "mlflow", "--out", str(apart / "out")]) == 2
    assert "error: --log mlflow cannot use its store" in capfd.readouterr().err


class Failing:
    """A logger whose server goes away."""

    closed = []

    def __init__(self, folder, flags, total):
        self.left = 1

    def log(self, values, total):
        if not self.left:
            raise ConnectionError("the server is gone")
        self.left -= 1

    def close(self, how):
        self.closed.append(how)


def test_a_logger_that_fails_does_not_end_the_run(apart, capfd, monkeypatch):
    monkeypatch.setitem(loggers.LOGGERS, "mlflow", Failing)
    monkeypatch.setattr(loggers, "require_installed", lambda asked: None)
    out = apart / "out"
    assert main_moco_isl.main([*RUN, "--log", "mlflow", "--out", str(out)]) == 0
    said = capfd.readouterr().out
    assert said.count("=> warning: --log mlflow failed (the server is gone): this run goes on") == 1
    assert len((out / "metrics.jsonl").read_text().splitlines()) > 3


def test_loggers_that_began_are_closed_where_another_cannot_begin(apart, monkeypatch):
    class Refused:
        def __init__(self, folder, flags, total):
            raise BadInput("no login")

    Failing.closed.clear()
    monkeypatch.setitem(loggers.LOGGERS, "mlflow", Failing)
    monkeypatch.setitem(loggers.LOGGERS, "wandb", Refused)
    with pytest.raises(BadInput, match="no login"):
        loggers.open_loggers("mlflow,wandb", apart, {}, None)
    assert Failing.closed == ["FAILED"]
