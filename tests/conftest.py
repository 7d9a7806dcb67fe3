"""One thread a process: the tests' tensors are small, and ranks and workers share the cores."""

import os
import signal
import time

# tests send these to processes that they start; under nohup, or in the background, those would
# ignore them
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the processes that tests start

import pytest  # noqa: E402 (what is set above is read when torch is imported)
import torch  # noqa: E402 (likewise)

torch.set_num_threads(1)


def pytest_terminal_summary(terminalreporter) -> None:
    """How fast this machine is, beside the time that the tests took: machines differ by three."""
    threads = torch.get_num_threads()
    cores = os.cpu_count()
    torch.set_num_threads(cores)
    a = torch.ones(1024, 1024)
    products = 0
    start = time.perf_counter()
    while time.perf_counter() - start < 0.2:
        a @ a
        products += 1
    rate = products * 2 * len(a) ** 3 / (time.perf_counter() - start)
    torch.set_num_threads(threads)
    terminalreporter.write_line(f"{cores} cores, {rate / 1e9:.0f} GFLOP/s in float32 products")


@pytest.fixture
def undrawn(monkeypatch):
    """No random weights, which take most of the time in which a network is built: for tests of
    names and shapes.
    """
    for draw in ("normal_", "uniform_"):
        monkeypatch.setattr(torch.Tensor, draw, lambda x, *_, **__: x)


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """The folder of a run of two epochs on the digits that has ended. Nothing may write there."""
    from tests.test_bad_input import RUN, ask

    out = tmp_path_factory.mktemp("finished") / "out"
    assert ask([*RUN, "--out", str(out)])[0] == 0
    return out
