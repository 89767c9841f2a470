"""Commands in processes that are forked from one that has imported torch, timm and NNI.

A fresh Python takes 5 to 10 s to import them. ``run`` replaces ``subprocess.run`` for commands of Python where the
import is not the subject of the test. Each command still has its own process, folder, environment and arguments.
"""

import atexit
import contextlib
import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from functools import cache
from pathlib import Path

HOSTS = ("torch", "torchvision", "timm", "nni_spaces._nni", "typer", "rich", "matplotlib.figure", "sklearn.datasets")


# --- in the test ------------------------------------------------------------------------------------------------------


class Server:
    """A process of an interpreter that forks one process per command."""

    def __init__(self, python=sys.executable, env=None):
        env = dict(os.environ if env is None else env, OMP_NUM_THREADS="1")
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
        self.process = subprocess.Popen([str(python), __file__], env=env, **pipes)
        atexit.register(self.process.stdin.close)  # it ends when nobody can send a command

    def read(self, timeout):
        """Return the next number, or None after ``timeout`` seconds."""
        ready, *_ = select.select([self.process.stdout], [], [], timeout)
        return int(self.process.stdout.readline()) if ready else None

    def run(self, args, cwd, env=None, timeout=300):
        """Run ``python *args``, as ``subprocess.run`` does with ``capture_output=True, text=True``."""
        with tempfile.TemporaryDirectory() as folder:
            files = [Path(folder, name) for name in ("stdout", "stderr")]
            request = dict(args=[*map(str, args)], cwd=str(cwd), env=dict(os.environ if env is None else env))
            self.process.stdin.write(json.dumps({**request, "files": [*map(str, files)]}).encode() + b"\n")
            pid, status = self.read(600), self.read(timeout)  # the first waits for the imports
            if status is None:
                os.kill(pid, signal.SIGKILL)
                self.read(60)
            stdout, stderr = (file.read_text() for file in files)
        if status is None:
            raise subprocess.TimeoutExpired(args, timeout, stdout, stderr)
        return subprocess.CompletedProcess(args, status, stdout, stderr)


@cache
def server():
    return Server()


def run(args, **kwargs):
    return server().run(args, **kwargs)


# --- in the server ----------------------------------------------------------------------------------------------------


def become(args, cwd, env, files):
    """Make this process what ``python *args`` is before its first line."""
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for target, name in enumerate([os.devnull, *files]):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT, 0o600), target)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()  # as in a fresh process; Python's own generator does so itself
    paths = [path for path in env.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = ["", *paths, *(path for path in sys.path if path not in paths)]


def execute(first, *rest):
    if first == "-m":
        sys.path[0] = os.getcwd()
        sys.argv = list(rest)
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.path[0] = os.path.dirname(os.path.realpath(first))
        sys.argv = [first, *rest]
        runpy.run_path(first, run_name="__main__")


def status_of(args):
    """Run a command; return its exit status, after the exit functions."""
    try:
        execute(*args)
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return status


def serve(replies):
    for line in sys.stdin:
        request = json.loads(line)
        pid = os.fork()
        if not pid:
            replies.close()
            become(**request)
            os._exit(status_of(request["args"]))
        print(pid, file=replies, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), file=replies, flush=True)


def main():
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # an import that prints must not answer for us
    del sys.path[0]  # this folder
    sys.path.insert(0, "")
    for name in HOSTS:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    serve(replies)


if __name__ == "__main__":
    main()
