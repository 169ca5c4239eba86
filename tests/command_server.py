"""Runs ``torch-nvfp4`` in a child for each line of JSON on stdin, without importing torch every time.

A request has the arguments, files for stdout and stderr (null: closed), environment variables, and statements that run
before the command. The answers are the child's process id and, when it has ended, its exit code.
"""

import gc
import io
import json
import os
import sys

import torch_nvfp4.cli  # what takes the time


def open_file(file: str) -> int:
    create = 0 if file.startswith("/dev") else os.O_CREAT | os.O_TRUNC
    return os.open(file, os.O_WRONLY | create, 0o600)


def redirect(fd: int, file: str | None, encoding: str) -> io.TextIOWrapper | None:
    os.close(fd)
    if file is None:
        return None
    if file == "/closed pipe":
        reader, opened = os.pipe()
        os.close(reader)
    else:
        opened = open_file(file)
    if opened != fd:
        os.dup2(opened, fd)
        os.close(opened)
    return io.TextIOWrapper(open(fd, "wb"), encoding=encoding, write_through=False)


def serve() -> dict:
    """Returns in the children only."""
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            return json.loads(line)
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)
    sys.exit()


gc.freeze()  # else each child looks through torch's objects when it ends, on pages that it has to copy for that
request = serve()
os.environ.update(request["env"])
os.environ.pop("HOME", None)
sys.stdout = redirect(1, request["stdout"], request["encoding"])
sys.stderr = redirect(2, request["stderr"], request["encoding"])
exec(request["before"])
torch_nvfp4.cli.app(request["args"], prog_name="torch-nvfp4")
