"""The Numba kernels: the reference's bits, whatever the threads, processes and folders are."""

import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from kernel_cases import Case, cases, check_against_reference

from qif_plugins.neuron.functional import qif_multi_step
from qif_plugins.neuron.parameters import QIFParameters
from qif_plugins.neuron.surrogate import Window
from qif_plugins.ops import numba_backend, shortcuts, threads
from qif_plugins.ops.contract import Coefficient, Coefficients, Kind, Shape
from qif_plugins.ops.shortcuts import openmp

pytest.importorskip("numba", reason="Numba is not installed")
pytestmark = pytest.mark.host_independent

PARAMS = QIFParameters()
WINDOW = Window.unbiased(PARAMS)


@settings(max_examples=300)
@given(cases())
def test_bits_of_the_reference(case):
    check_against_reference(numba_backend, case)


@pytest.mark.parametrize("blocks", [(1, 1, 50_001), (3, 5, 4096), (40_007, 1, 1), (7, 2, 3001), (2, 17_000, 1)])
@pytest.mark.parametrize("layout", ["float", "channel"])
def test_many_chunks(blocks, layout):
    """Several chunks, ends that fit no block, and coefficients that begin in the middle of either."""
    case = Case(
        steps=2, blocks=blocks, dtype=torch.float32, layouts=(layout,) * 9,
        kind=Kind(soft=False, detach_reset=False, strict=False, shape=Shape.WINDOW, pre_reset=True),
        start=torch.float32, store_v_seq=False, save_h=True, specials=False, gradients=(True, True, False),
        needs=(layout != "float",) * 6, needs_v0=True, seed=3,
    )  # fmt: skip
    check_against_reference(numba_backend, case)


def run(neurons=1 << 17, dtype=torch.float32):
    """Spikes, membrane and all gradients of a job that is large enough for several threads."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, neurons, generator=generator).to(dtype).requires_grad_()
    a = torch.tensor(0.25, requires_grad=True)
    spikes, v = qif_multi_step(x, 0.0, QIFParameters.unchecked(a=a), WINDOW, backend="numba")
    (spikes.sum() + v.float().square().sum()).backward()
    return spikes, v, x.grad, a.grad


def assert_same(got, wanted):
    assert all(torch.equal(one, other) for one, other in zip(got, wanted, strict=True))


@pytest.fixture(params=["team", "pool"])
def two_threads(request, monkeypatch):
    """Of PyTorch's OpenMP team where there is one, and of our own pool."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    if request.param == "pool":
        monkeypatch.setattr(openmp, "_start_team", None)
    elif openmp._start_team is None:
        pytest.skip("PyTorch runs on no OpenMP that speaks GNU's language here")
    monkeypatch.setattr(openmp, "_team_again", 0.0)
    yield request.param
    torch.set_num_threads(before)


def of_our_pool():
    """Who works on a large job: whether a thread of our pool does, with two threads that must both come."""
    reached, names = threading.Barrier(2, timeout=60), []

    def note(first, stop):
        if threading.current_thread().name not in names:
            names.append(threading.current_thread().name)
            reached.wait()

    threads.for_each_chunk(100 * 16384, 16384, 100 * 16384, note)
    return any(name.startswith("qif") for name in names)


def test_the_team_is_there_and_rests_after_it_was_late(monkeypatch):
    """A member that comes when all is done held the caller up: our pool takes the next jobs."""
    if sys.platform != "linux" or "USE_OPENMP=ON" not in torch.__config__.show():
        pytest.skip("PyTorch runs on GNU's OpenMP on Linux only")
    if not shortcuts.ENABLED:
        pytest.skip("shortcuts are off")
    monkeypatch.setattr(openmp, "_team_again", 0.0)
    monkeypatch.setattr(openmp, "LATE", 10.0)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert not of_our_pool()
        monkeypatch.setattr(openmp, "LATE", 0.0)
        monkeypatch.setattr(openmp, "PAUSE", 1000.0)
        caller = threading.get_ident()
        threads.for_each_chunk(
            2 * 16384, 16384, 100 * 16384, lambda *_: time.sleep(0.05 if threading.get_ident() == caller else 0.3)
        )
        assert of_our_pool()
    finally:
        torch.set_num_threads(before)


@pytest.fixture
def interruptible():
    """As in a terminal: what a shell starts in the background ignores interrupts."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_ends_a_job(two_threads):
    """In the caller while it works: nothing is called finished that is not."""
    caller, came = threading.get_ident(), threading.Event()

    def interrupted(first, stop):
        if threading.get_ident() != caller:
            came.wait(60)  # or a fast helper leaves the caller nothing to do
        else:
            came.set()
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        threads.for_each_chunk(100 * 16384, 16384, 100 * 16384, interrupted)


def test_number_of_threads_changes_no_bit(two_threads):
    parallel = run()
    torch.set_num_threads(1)
    assert_same(run(), parallel)


def test_set_num_threads_is_respected(two_threads):
    seen = {}
    for count in (1, 2):
        torch.set_num_threads(count)
        names = set()
        reached = threading.Barrier(count, timeout=60)

        def note(first, stop, names=names, reached=reached):
            if threading.current_thread().name not in names:
                names.add(threading.current_thread().name)
                reached.wait()  # holds this thread until as many as are allowed have come

        threads.for_each_chunk(100 * 16384, 16384, 100 * 16384, note)
        seen[count] = len(names)
    assert seen == {1: 1, 2: 2}


def test_small_jobs_stay_in_the_caller(two_threads):
    callers = set()
    threads.for_each_chunk(1 << 15, 1 << 14, 1 << 15, lambda first, stop: callers.add(threading.get_ident()))
    assert callers == {threading.get_ident()}


def test_an_error_in_a_thread_reaches_the_caller(two_threads):
    def fail(first, stop):
        raise MemoryError(f"no room for {first}")

    with pytest.raises(MemoryError, match="no room"):
        threads.for_each_chunk(100 * 16384, 16384, 100 * 16384, fail)
    run()


def test_several_python_threads_at_once(two_threads):
    wanted = run()
    results = [None] * 6

    def work(index):
        for _ in range(3):
            results[index] = run()

    workers = [threading.Thread(target=work, args=(index,)) for index in range(len(results))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for result in results:
        assert_same(result, wanted)


LARGE = torch.linspace(-2, 3, 1 << 18).view(2, -1)


def _sums(_=None):
    with torch.no_grad():
        spikes, v = qif_multi_step(LARGE, 0.0, PARAMS, WINDOW, backend="numba")
    return spikes.numpy().sum().item(), v.numpy().sum(dtype="float64").item()


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="this platform does not fork")
def test_workers_that_fork_after_the_parent_used_the_kernel(two_threads):
    """With two threads allowed in the worker too. (PyTorch's own operators would wait there for ever.)"""
    wanted = _sums()
    assert (threads._executor if two_threads == "pool" else openmp._start_team) is not None
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert pool.map_async(_sums, range(4)).get(timeout=100) == [wanted] * 4


def test_a_data_loader_that_forks(two_threads):
    class Spikes(torch.utils.data.Dataset):
        def __len__(self):
            return 8

        def __getitem__(self, index):
            x = torch.full((4, 16), float(index))
            return qif_multi_step(x, 0.0, PARAMS, WINDOW, backend="numba")[0]

    plain = [Spikes()[index] for index in range(8)]
    _sums()
    loaded = [batch[0] for batch in torch.utils.data.DataLoader(Spikes(), num_workers=2)]
    assert_same(loaded, plain)


SCRIPT = """
import os, sys, torch
from qif_plugins import QIFParameters, Window, qif_multi_step
p = QIFParameters()
spikes, v = qif_multi_step(torch.ones(3, 4), 0.0, p, Window.unbiased(p), backend="numba")
print(spikes.sum().item(), sum(len(files) for _, _, files in os.walk(sys.argv[1])))
"""


@pytest.mark.parametrize("writable", [True, False])
def test_the_folder_of_compiled_kernels(tmp_path, writable):
    """Kernels are kept where a folder can be written, and compiled in memory where none can."""
    folder = tmp_path / "kernels"
    if writable:
        folder.mkdir()
    else:
        (tmp_path / "kernels").write_text("a file, where a folder is wanted")
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(folder)], env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr
    spikes, files = done.stdout.split()
    assert float(spikes) == 12.0
    assert (int(files) > 0) == writable


def _free_memory():
    try:
        with open("/proc/meminfo") as lines:
            return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) * 1024
    except (OSError, StopIteration):
        return 0


@pytest.mark.skipif(_free_memory() < 12 * 2**30, reason="needs 12 GiB of free memory")
def test_more_than_two_to_the_31_elements(two_threads):
    """Zeros throughout, whose pages take no memory, but for the last neurons: they meet what a small call gives."""
    steps, neurons, kind = 2, 2**30 + 1, Kind(False, False, False, Shape.WINDOW, False)
    c = Coefficients(*map(Coefficient, (0.25, 0.0, 0.5, 1.0, 0.0, 1.0, 0.5, 1.5, 0.8)))
    ends = torch.tensor([[0.3, 1.2, 0.7], [0.9, 0.1, 1.4]]).bfloat16()

    def passes(neurons):
        # NumPy's zeros, unlike PyTorch's, are not written before they are needed.
        x = torch.from_numpy(np.zeros((steps, neurons), np.int16)).view(torch.bfloat16)
        x[:, -3:] = ends
        spike, v = torch.empty_like(x), torch.empty(neurons, dtype=torch.bfloat16)
        numba_backend.forward(x, 0.0, c, kind, spike, v, None, None)
        outcome = [spike[:, -3:].clone(), v[-3:].clone(), spike[:, 5].clone(), v[5].clone()]
        grad_x, h = spike, torch.from_numpy(np.zeros((steps, neurons), np.float32))
        h[:, -3:] = ends.float()
        numba_backend.backward(x, None, None, h, 0.0, None, c, kind, grad_x, None, (False,) * 6)
        return [*outcome, grad_x[:, -3:].clone(), grad_x[:, 5].clone()]

    assert_same(passes(neurons), passes(100))


def test_other_devices_are_refused():
    assert "CPU" in numba_backend.unavailable(torch.device("meta"))
