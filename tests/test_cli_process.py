"""The process of the command line: exit codes, pipes, disks, signals, and files that are whole or not there."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from helpers.command_server import Server
from torch_nvfp4 import __version__
from torch_nvfp4.cli import app, output
from torch_nvfp4.cli.memory import memory_error
from torch_nvfp4.cli.output import OutputError, json_text, json_writer
from torch_nvfp4.demo import write_checkpoint

ROOT = Path(__file__).parent.parent
# Stops a command where it would work, and says so by making the file `stopped`.
WAIT = "import time, pathlib\ndef wait(*_, **__):\n    pathlib.Path({stopped!r}).touch()\n    time.sleep(60)\n"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write_checkpoint(
        tmp_path_factory.mktemp("checkpoint"), hidden_size=32, moe_intermediate_size=16, n_routed_experts=2,
        num_experts_per_tok=1, num_hidden_layers=1,
    )  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with Server(tmp_path_factory.mktemp("server")) as server:
        yield server


def assert_error(err, *parts):
    assert err.startswith(("torch-nvfp4 ", "torch-nvfp4: "))
    assert err.count("\n") == 1
    assert "Traceback" not in err
    for part in parts:
        assert part in err


@pytest.mark.parametrize("args", [["info"], ["info", "--json", "-"], ["info", "--help"], ["--help"]])
def test_a_closed_pipe(server, args):
    code, _, err = server.run(*args, stdout="/closed pipe")
    assert (code, err) == (141, "")


@pytest.mark.parametrize("args", [["info"], ["info", "--json", "-"], ["info", "--help"]])
def test_stdout_on_a_full_disk(server, args):
    code, _, err = server.run(*args, stdout="/dev/full")
    assert code == 2
    assert_error(err, "the output: expected to write it, got: No space left on device")


def test_json_on_a_full_disk(server, tmp_path):
    code, out, err = server.run("info", "--json", "/dev/full")
    assert (code, out) == (2, "")
    assert_error(err, "--json /dev/full: expected a file that can be written, got: No space left on device")
    # A limit on the size of files stands in for a full disk; what was there stays.
    file = tmp_path / "info.json"
    file.write_text("before")
    limit = "import resource, signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))"
    code, _, err = server.run("info", "--json", file, before=limit, stdout="/dev/null", stderr="/dev/null")
    assert code == 2
    assert file.read_text() == "before"
    assert os.listdir(tmp_path) == ["info.json"]


def test_a_checkpoint_on_a_full_disk(server, tmp_path):
    limit = "import resource, signal\nsignal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (10000, 10000))"
    code, _, err = server.run("demo", "--keep", tmp_path / "kept", before=small_checkpoint() + limit)
    assert code == 2
    assert_error(err, "expected 130 MiB that can be written, got ")
    assert os.listdir(tmp_path) == []


def small_checkpoint():
    return (
        "import functools\nfrom torch_nvfp4.cli import demo\n"
        "demo.write_checkpoint = functools.partial(demo.write_checkpoint, hidden_size=32, moe_intermediate_size=16,"
        " n_routed_experts=2, num_experts_per_tok=1, num_hidden_layers=1)\n"
    )


@pytest.mark.parametrize(("stdout", "stderr"), [(None, "err"), ("out", None), (None, None)])
def test_closed_streams(server, checkpoint, tmp_path, stdout, stderr):
    file = tmp_path / "checks.json"
    code, *_ = server.run("verify", checkpoint, "--device", "cpu", "--json", file, stdout=stdout, stderr=stderr)
    assert code == 0
    assert json.loads(file.read_text())["passed"] is True
    code, *_ = server.run("verify", tmp_path / "nowhere", stdout=stdout, stderr=stderr)
    assert code == 2
    code, *_ = server.run("verify", "--help", stdout=stdout, stderr=stderr)
    assert code == 0


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_stream_that_cannot_hold_every_character(server, checkpoint, tmp_path, encoding):
    link = tmp_path / "é漢\udcff"
    link.symlink_to(checkpoint)
    code, out, err = server.run("inspect", link, "--device", "cpu", encoding=encoding, LC_ALL="C")
    assert (code, err) == (0, "")
    assert r"\u6f22\udcff" in out.replace("\n", "").replace(" ", "")
    code, _, err = server.run("inspect", tmp_path / "漢\udcff", encoding=encoding)
    assert code == 2
    assert_error(err, r"\u6f22\udcff: expected a checkpoint directory")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_while_a_layer_is_checked(server, checkpoint, tmp_path, number, code):
    file, stopped = tmp_path / "checks.json", tmp_path / "stopped"
    before = WAIT.format(stopped=str(stopped)) + "from torch_nvfp4.cli import verify\nverify.verify_layer = wait"
    assert stop(server, number, stopped, "verify", checkpoint, "--json", file, before=before) == code
    assert os.listdir(tmp_path) == ["stopped"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("keep", ["kept", "made/kept", None])
def test_a_signal_while_a_checkpoint_is_written(server, tmp_path, number, code, keep):
    """Half of it is there, but not under the name that was asked for, and not for long."""
    work, stopped = tmp_path / "work", tmp_path / "stopped"
    work.mkdir()
    before = WAIT.format(stopped=str(stopped)) + (
        "from torch_nvfp4.cli import demo\n"
        "def half(path):\n    path.mkdir()\n    (path / 'model.safetensors').touch()\n    wait()\n"
        "demo.write_checkpoint = half"
    )
    option = [] if keep is None else ["--keep", work / keep]
    assert stop(server, number, stopped, "demo", *option, before=before, TMPDIR=str(work)) == code
    assert [path for path in work.rglob("*") if path.name != "made"] == []


def stop(server, number, stopped, *args, **options):
    """Sends the signal once `stopped` is there. The exit code, after a look at stderr."""
    child = server.start(*args, **options)
    deadline = time.monotonic() + 60
    while not stopped.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(child, number)
    code, _, err = server.end()
    assert "Traceback" not in err
    assert err.endswith("interrupted\n") if number == signal.SIGINT else err == ""
    return code


def test_a_second_ctrl_c_ends_at_once(server, checkpoint, tmp_path):
    stopped = tmp_path / "stopped"
    before = WAIT.format(stopped=str(stopped)) + (
        "from torch_nvfp4.cli import verify\n"
        "def stubborn(*_, **__):\n    try:\n        wait()\n    finally:\n        wait()\n"
        "verify.verify_layer = stubborn"
    )
    child = server.start("verify", checkpoint, before=before)
    for _ in range(2):
        while not stopped.exists():
            time.sleep(0.01)
        stopped.unlink()
        os.kill(child, signal.SIGINT)
    assert server.end()[0] == 130


def test_a_signal_that_is_ignored_stays_ignored(server):
    before = "import signal\nsignal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
    before += "from torch_nvfp4.cli import info\ncollect = info.collect_info\n"
    before += (
        "def hang_up():\n    signal.raise_signal(signal.SIGHUP)\n    return collect()\ninfo.collect_info = hang_up"
    )
    assert server.run("info", before=before)[0] == 0


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_json_keeps_links_and_permissions_and_takes_pipes(tmp_path):
    real, link = tmp_path / "real.json", tmp_path / "link.json"
    real.write_text("before")
    real.chmod(0o640)
    link.symlink_to(real)
    with json_writer(link) as write:
        write({"a": 1})
        assert json.loads(real.read_text()) == {"a": 1}
    assert link.is_symlink()
    assert real.stat().st_mode & 0o777 == 0o640
    with json_writer(Path("/dev/null")) as write:
        write({})
    new = tmp_path / ("n" * 250 + ".json")
    before = os.umask(0o027)
    try:
        with json_writer(new) as write:
            write([float("nan"), float("inf"), 1.5, {"k": -float("inf")}, "\udcff\x1b"])
    finally:
        os.umask(before)
    assert new.stat().st_mode & 0o777 == 0o640
    assert json.loads(new.read_text()) == [None, None, 1.5, {"k": None}, "\udcff\x1b"]
    assert "\\udcff\\u001b" in new.read_text(encoding="ascii")
    assert sorted(os.listdir(tmp_path)) == ["link.json", new.name, "real.json"]


def test_a_run_that_fails_leaves_the_old_file(tmp_path):
    file = tmp_path / "x.json"
    file.write_text("before")

    class Stop(BaseException):
        pass

    with pytest.raises(Stop), json_writer(file):
        raise Stop
    with pytest.raises(TypeError), json_writer(file) as write:
        write({"a": object()})
    assert file.read_text() == "before"
    assert os.listdir(tmp_path) == ["x.json"]
    with pytest.raises(TypeError, match="JSON"):
        json_text(json_text)


@pytest.mark.parametrize(
    ("file", "got"),
    [
        ("/nowhere/x.json", "No such file or directory"), ("/dev/null/x.json", "Not a directory"), ("/", "a directory"),
        ("/tmp/" + "n" * 300, "File name too long"), ("a\0b", "embedded null"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_written_is_refused_before_anything_is_measured(file, got, monkeypatch):
    with (
        pytest.raises(OutputError, match=f"expected a file that can be written, got: .*{got}"),
        json_writer(Path(file)),
    ):
        pytest.fail("measured")


def test_a_directory_without_permission(monkeypatch, tmp_path):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(output.os, "open", refuse)
    result = run("info", "--json", tmp_path / "x.json")
    assert result.exit_code == 2
    assert_error(result.stderr, "x.json: expected a file that can be written, got: Permission denied")


@pytest.mark.parametrize("command", ["info", "inspect", "verify", "quantize", "bench", "demo"])
def test_every_command_tries_the_json_file_first(command, checkpoint, monkeypatch, tmp_path):
    arguments = {
        "inspect": [checkpoint], "verify": [checkpoint], "quantize": [checkpoint, tmp_path / "new"],
        "bench": ["--device", "cpu", "--peer", "none"],
    }  # fmt: skip
    result = run(command, *arguments.get(command, []), "--json", tmp_path / "no" / "x.json")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert_error(result.stderr, "--json", "No such file or directory")


@pytest.mark.parametrize("command", ["inspect", "verify", "demo"])
def test_json_replaces_no_file_of_the_checkpoint(command, checkpoint, tmp_path):
    """Whatever it is called: the shards in a download cache are links to files elsewhere."""
    path, blob, link = tmp_path / "checkpoint", tmp_path / "blob", tmp_path / "link.json"
    shutil.copytree(checkpoint, path)
    shard = sorted(path.glob("*.safetensors"))[0]
    shard.rename(blob)
    (path / "hf_quant_config.json").unlink()
    shard.symlink_to(blob)
    link.symlink_to(path / "config.json")
    (tmp_path / "hard").hardlink_to(path / "config.json")
    (tmp_path / "dangling").symlink_to(path / "new.safetensors")
    (path / "tokenizer.json").write_text("{}")
    before = {file: file.read_bytes() for file in (blob, shard, *path.glob("*.json"))}
    arguments = ["--checkpoint", path] if command == "demo" else [path]
    own = [shard, blob, path / "config.json", path / "tokenizer.json", link, tmp_path / "hard"]
    new = [path / "new.safetensors", path / "hf_quant_config.json", tmp_path / "dangling"]
    names = sorted(os.listdir(path))
    for file in (*own, *new):
        result = run(command, *arguments, "--json", file)
        assert (result.exit_code, result.stdout) == (2, "")
        got = "one of its files" if file in own else "one that would be read as part of it"
        assert_error(
            result.stderr, f"--json {file}: expected a file that does not belong to the checkpoint {path}, got {got}"
        )
    assert {file: file.read_bytes() for file in before} == before
    assert sorted(os.listdir(path)) == names


def test_json_beside_the_files_of_a_checkpoint(checkpoint, tmp_path):
    path = shutil.copytree(checkpoint, tmp_path / "checkpoint")
    assert run("inspect", path, "--device", "cpu", "--json", path / "facts.json").exit_code == 0
    assert json.loads((path / "facts.json").read_text())["path"] == str(path)


def test_keep_takes_a_new_or_an_empty_directory(tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "config.json").write_text("{}")
    result = run("demo", "--keep", tmp_path / "full")
    assert result.exit_code == 2
    assert_error(result.stderr, "expected a new or empty directory, got one with 1 entries; --checkpoint ")
    assert (tmp_path / "full" / "config.json").read_text() == "{}"
    (tmp_path / "file").touch()
    for path in (tmp_path / "file" / "x", tmp_path / "file"):
        result = run("demo", "--keep", path, "--layers", "1")
        assert result.exit_code == 2
        assert_error(result.stderr, str(path), "expected a ")
    assert sorted(os.listdir(tmp_path)) == ["file", "full"]


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (MemoryError(), "expected to allocate memory on the CPU, got out of memory"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has"), "2.50 GiB on the GPU"),
        (ValueError("memory"), None),
    ],
)  # fmt: skip
def test_what_memory_errors_say(error, text):
    assert memory_error(error) is None if text is None else text in memory_error(error)


def test_out_of_memory_names_the_step_and_what_to_do(checkpoint, monkeypatch):
    """An allocation that really fails, while the layer is loaded."""
    from torch_nvfp4 import verify

    def greedy(*_, **__):
        torch.empty(2**50, dtype=torch.uint8)

    monkeypatch.setattr(verify.NVFP4Experts, "from_checkpoint", greedy)
    result = run("verify", checkpoint, "--device", "cpu")
    assert result.exit_code == 2
    assert result.stderr == (
        "torch-nvfp4 verify: loading layer 0: expected to allocate 1024.00 TiB on the CPU, got out of memory; "
        "use fewer --tokens, or one layer at a time by --layer\n"
    )


def test_usage_errors_are_one_line():
    for arguments in (["--bogus"], ["nothing"], ["verify"], ["verify", ".", "--tokens", "0"], ["info", "x"]):
        result = run(*arguments)
        assert (result.exit_code, result.stdout) == (2, "")
        assert_error(result.stderr, "expected what torch-nvfp4 ", " --help lists, got: ")
    assert run().exit_code == 2
    assert "Usage:" in run().output


# The start: torch, which takes seconds to import, is a stand-in here.


@pytest.fixture(params=["-m", "script"])
def started(request, tmp_path):
    """Runs the command as it is started, by python -m and by the script that pip writes, with a torch that is text."""
    script = tmp_path / "bin" / "torch-nvfp4"
    script.parent.mkdir()
    script.write_text("import sys\nfrom torch_nvfp4.cli import app\nsys.exit(app())\n")
    command = ["-m", "torch_nvfp4"] if request.param == "-m" else [str(script)]

    def start(torch_text, *args, command=command, **options):
        (tmp_path / "torch.py").write_text(torch_text)
        env = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
        return subprocess.Popen([sys.executable, *command, *args], env=env, text=True, **streams)

    return start


SLOW_TORCH = "import pathlib, time\npathlib.Path({stopped!r}).touch()\ntime.sleep(60)\n"


def test_ctrl_c_while_torch_is_imported(started, tmp_path):
    stopped = tmp_path / "stopped"
    process = started(SLOW_TORCH.format(stopped=str(stopped)), "info")
    while not stopped.exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30) == ("", "torch-nvfp4: interrupted\n")
    assert process.returncode == 130


def test_ctrl_c_that_is_ignored_stays_ignored_at_the_start(started):
    torch_text = (
        "import signal\nprint(signal.getsignal(signal.SIGINT) is signal.SIG_IGN, flush=True)\nraise SystemExit(7)\n"
    )
    process = started(torch_text, "info", preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    assert process.communicate(timeout=30) == ("True\n", "")
    assert process.returncode == 7


def test_the_version_needs_no_torch(started):
    process = started("raise SystemExit('torch was imported')", "--version")
    assert process.communicate(timeout=30) == (f"torch-nvfp4 {__version__}\n", "")
    assert process.returncode == 0
    # What cannot be printed is left to the command, which has words for it.
    with open("/dev/full", "w") as full:
        process = started("raise SystemExit('torch was imported')", "--version", stdout=full)
    assert process.communicate(timeout=30)[1] == "torch was imported\n"


@pytest.mark.parametrize(
    "command", [["-c", "import torch_nvfp4"], ["-m", "other", "-m", "torch_nvfp4"], ["-m", "other", "torch_nvfp4"]]
)
def test_other_programs_keep_their_signals(started, tmp_path, command):
    """Also one that has the command's name among its arguments, and a package of which Python looks for a module."""
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "__init__.py").write_text("import torch_nvfp4")
    torch_text = (
        "import signal\nprint(signal.getsignal(signal.SIGINT) is signal.default_int_handler, flush=True)\n"
        "raise SystemExit(7)\n"
    )
    process = started(torch_text, "--version", command=command)
    assert process.communicate(timeout=30) == ("True\n", "")
    assert process.returncode == 7


def test_a_command_takes_over_from_the_start(server, checkpoint, tmp_path):
    """What has been made by then is cleaned up, and the command says its name."""
    file, stopped = tmp_path / "checks.json", tmp_path / "stopped"
    before = WAIT.format(stopped=str(stopped)) + (
        "import signal\nfrom torch_nvfp4._start import end_at_interrupt\n"
        "signal.signal(signal.SIGINT, end_at_interrupt)\n"
        "from torch_nvfp4.cli import verify\nverify.verify_layer = wait"
    )
    assert stop(server, signal.SIGINT, stopped, "verify", checkpoint, "--json", file, before=before) == 130
    assert (server.folder / "err").read_text() == "torch-nvfp4 verify: interrupted\n"
    assert os.listdir(tmp_path) == ["stopped"]
