"""Fresh interpreters at the price of a fork: most of what one takes to start is the import of PyTorch.

A process that has imported PyTorch, and nothing of ours or of a host, is forked for every call.
"""

import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["torch"])


def python(code, *words, folder=None):
    """What ``python -c code words`` ends with and prints, in ``folder``."""
    with tempfile.TemporaryDirectory() as temporary:
        printed = Path(temporary, "stdout"), Path(temporary, "stderr")
        process = _processes.Process(target=_run, args=(code, words, folder, printed))
        process.start()
        process.join(240)
        process.kill()
        process.join()
        return subprocess.CompletedProcess(words, process.exitcode, *(path.read_text() for path in printed))


def _run(code, words, folder, printed):
    for number, path in enumerate(printed, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    if folder is not None:
        os.chdir(folder)
    sys.argv = ["-c", *words]
    sys.path.insert(0, "")
    exec(code, {"__name__": "__main__"})
