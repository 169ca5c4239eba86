"""What the command line prints of hostile names, values and paths: plain text in tables and errors, valid JSON."""

import json
import shutil
import struct

import pytest
import torch
from typer.testing import CliRunner

from torch_nvfp4 import verify
from torch_nvfp4.cli import app, demo
from torch_nvfp4.cli.terminal import Terminal, printable, say
from torch_nvfp4.cli.wording import count, size, spans
from torch_nvfp4.demo import write_checkpoint

# Markup that rich would refuse or obey, a title and a colour for the terminal, C1 controls, a line that is not ours,
# text from right to left, a zero-width space, a surrogate alone, and an emoji's name.
HOSTILE = "[/red][bold]\x1b]0;owned\x07\x1b[31m\x9b31m\r\nok\u202edesrever\u200b\ud800 \udcff:boom:\u2028"
NAME = HOSTILE.replace("\ud800 \udcff", "")  # safetensors refuses a header with surrogates
PATH = "[/red][bold]\x1b]0;owned\x07\x1b[31m\r\nok\u202e\u200b\udcff:boom:"


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A checkpoint whose path, tensor names and config values are hostile; its experts are ordinary."""
    path = write_checkpoint(
        tmp_path_factory.mktemp("hostile") / PATH, hidden_size=32, moe_intermediate_size=16, n_routed_experts=2,
        num_experts_per_tok=1, num_hidden_layers=1,
    )  # fmt: skip
    for name in (NAME, "x" * 100_000):
        rename_tensor(path, unquantized(path), name)
    edit_config(path, model_type=HOSTILE)
    for section in ("quant_method", "quant_algo", "moe_quant_algo"):
        config = json.loads((path / "config.json").read_text())
        config["quantization_config"][section] = HOSTILE
        (path / "config.json").write_text(json.dumps(config))
    return path


def unquantized(path):
    index = json.loads((path / "model.safetensors.index.json").read_text())
    return next(name for name in sorted(index["weight_map"]) if name.endswith("norm.weight"))


def rename_tensor(path, old, new):
    index_file = path / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    shard = path / index["weight_map"].pop(old)
    index["weight_map"][new] = shard.name
    index_file.write_text(json.dumps(index))
    content = shard.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    changed = json.dumps({new if name == old else name: entry for name, entry in header.items()}).encode()
    shard.write_bytes(struct.pack("<Q", len(changed)) + changed + content[8 + length :])


def edit_config(path, **changes):
    file = path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def run(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def assert_plain(text):
    """Nothing but printable characters and ends of lines, and no line that begins as the attacker's does."""
    assert all(line.isprintable() for line in text.split("\n")), ascii(text)
    assert not any(line.startswith("ok") for line in text.split("\n"))


def test_printable():
    assert printable("a [red]b[/red] é 漢 \\n") == "a [red]b[/red] é 漢 \\n"
    assert printable("\x1b[31m\x00\x7f\x9b\r\n\t") == r"\x1b[31m\x00\x7f\x9b\r\n\t"
    assert printable("\u202e\u2066\u200b\u2028\ufeff\u00a0\U000e0041") == (
        r"\u202e\u2066\u200b\u2028\ufeff\xa0\U000e0041"
    )
    assert printable("\ud800 \udcff") == r"\ud800 \udcff"
    assert printable("ab" * 5_000_000, 10) == "ababa ... babab (10,000,000 characters)"
    assert len(printable("\U000e0041" * 10**6, 300)) < 4000


@pytest.mark.parametrize("columns", [0, 20, 60, 500])
def test_a_table_loses_no_cell(columns, monkeypatch, capsys):
    monkeypatch.setattr("torch_nvfp4.cli.terminal._Console.is_terminal", True)
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    Terminal().table(("key", "two\nlines", "text"), [("a[b]", "12345678", "word " * 20)], left=("key", "text"))
    Terminal().table(("what", ""), [("a", "b" * 30)], left=("what", ""))
    out = capsys.readouterr().out
    assert "a[b]" in out
    assert "12345678" in out
    assert out.count("word") == 20
    assert "".join(out.split()).count("b") >= 31
    if columns == 20:
        assert "two lines: 12345678\n" in out
        assert f"what a: {'b' * 30}\n" in out


def test_numbers_read_alike():
    assert [size(n) for n in (0, 1023, 1024, 1536 * 1024, 5 * 2**30, 3 * 2**50)] == [
        "0 B", "1023 B", "1.0 KiB", "1.5 MiB", "5.00 GiB", "3072.00 TiB",
    ]  # fmt: skip
    assert [count(1, "layer"), count(12345, "layer"), count(12345)] == ["1 layer", "12,345 layers", "12,345"]
    assert spans([0, 1, 2, 3, 7]) == "0..3, 7"
    assert spans(range(0, 100, 2), most=2) == "0, 2 and 48 more"


def test_errors_are_one_line(capsys):
    say("verify", "no backend can:\n  a: expected b\n  c: expected d")
    assert capsys.readouterr().err == "torch-nvfp4 verify: no backend can: a: expected b; c: expected d\n"


def test_inspect(hostile):
    result = run("inspect", hostile, "--device", "cpu")
    assert result.exit_code == 0, result.output
    assert_plain(result.output)
    assert r"[/red][bold]\x1b]0;owned\x07\x1b[31m" in result.stdout
    assert r"\udcff:boom:" in result.stdout
    assert len(result.stdout) < 10_000
    exact = json.loads(run("inspect", hostile, "--device", "cpu", "--json", "-").stdout)
    assert exact["model_type"] == HOSTILE
    assert exact["path"] == str(hostile)


def test_a_surrogate_in_a_tensor_name(hostile, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(hostile, broken)
    rename_tensor(broken, unquantized(broken), "\ud800")
    for command in ("inspect", "verify"):
        result = run(command, broken, "--device", "cpu")
        assert result.exit_code in (0, 2), result.output
        assert_plain(result.output)


@pytest.mark.parametrize("command", ["verify", "demo"])
def test_commands_that_run_layers(hostile, command, tmp_path, monkeypatch):
    path = tmp_path / PATH.replace("\udcff", "")  # which safetensors cannot open
    path.parent.mkdir()
    path.symlink_to(hostile)
    monkeypatch.setattr(demo, "DEMO_TOKENS", (2,))
    monkeypatch.setattr(torch, "compile", lambda model, **_: model)
    checkpoint = [path] if command == "verify" else ["--checkpoint", path]
    file = tmp_path / f"{PATH.replace('/', '')}.json"
    result = run(command, *checkpoint, "--device", "cpu", "--json", file)
    assert result.exit_code == 0, result.output
    assert_plain(result.output)
    assert json.loads(file.read_text(encoding="ascii"))["checkpoint"] == str(path) or command == "demo"


def test_errors_from_the_config(hostile, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(hostile, broken)
    edit_config(broken, hidden_act=HOSTILE)
    for command in (["inspect", broken], ["verify", broken], ["demo", "--checkpoint", broken]):
        result = run(*command, "--device", "cpu")
        # inspect and demo show the rest too, and the layers as those that loading refuses.
        assert result.exit_code == (1 if command[0] == "inspect" else 2), result.output
        assert result.stderr.count("\n") == 1
        assert r"\x1b]0;owned" in (result.stderr if command[0] == "verify" else result.stdout)
        assert_plain(result.output)


@pytest.mark.parametrize(
    "arguments",
    [
        ["info", "--json", f"/nowhere/{PATH}"], ["info", "--select", HOSTILE],
        ["info", "--select", "1", "--dtype", HOSTILE],
        ["info", "--select", "1", "--shape", HOSTILE], ["inspect", PATH], ["inspect", ".", "--device", HOSTILE],
        ["verify", PATH], ["verify", ".", "--dtype", HOSTILE], ["verify", ".", "--tokens", HOSTILE],
        ["demo", "--checkpoint", PATH], ["demo", "--keep", f"/dev/null/{PATH}"], ["demo", "--backend", HOSTILE],
        ["bench", "--shape", HOSTILE], ["bench", "--tokens", HOSTILE], ["bench", "--peer", HOSTILE],
        ["bench", "--device", HOSTILE], [HOSTILE],
        [f"--{HOSTILE}"], ["verify", ".", f"--{HOSTILE}"], ["info", HOSTILE],
    ],
    ids=ascii,
)  # fmt: skip
def test_errors_from_the_user(arguments, monkeypatch, hostile):
    if arguments[:2] == ["demo", "--backend"]:
        arguments = ["demo", "--checkpoint", hostile, *arguments[1:]]
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("torch-nvfp4")
    assert result.stderr.count("\n") == 1
    assert "expected" in result.stderr
    assert "got" in result.stderr
    assert_plain(result.stderr)


def test_environment_variables(monkeypatch, hostile):
    monkeypatch.setenv("TORCH_NVFP4_CPU_LEVEL", PATH)
    result = run("info")
    assert result.exit_code == 0
    assert_plain(result.output)
    for command in (["info", "--select", "1"], ["verify", hostile]):
        result = run(*command, "--device", "cpu")
        assert result.exit_code == 2
        assert result.stderr.count("\n") == 1
        assert_plain(result.output)


def test_progress(hostile, monkeypatch):
    """On a terminal, where the bars are drawn, descriptions are taken literally too."""
    monkeypatch.setattr("torch_nvfp4.cli.terminal._Console.is_terminal", True)
    with Terminal().progress() as progress:
        progress.stage(1)
        progress.begin(HOSTILE)
        (task,) = progress._bar.tasks
        assert_plain(task.description)
        (column, *_) = progress._bar.columns
        assert column.render(task).plain == printable(HOSTILE)


def test_a_bug_is_escaped_too(hostile, monkeypatch):
    def broken(*_, **__):
        raise ZeroDivisionError(HOSTILE)

    monkeypatch.setattr(verify.NVFP4Experts, "from_checkpoint", broken)
    result = run("verify", hostile, "--device", "cpu")
    assert result.exit_code == 3
    assert result.stderr.startswith("torch-nvfp4 verify: this is a bug in torch_nvfp4 ")
    assert "ZeroDivisionError: [/red]" in result.stderr
    assert "TORCH_NVFP4_DEBUG=1" in result.stderr
    assert result.stderr.count("\n") == 1
    assert_plain(result.stderr)
    monkeypatch.setenv("TORCH_NVFP4_DEBUG", "1")
    result = run("verify", hostile, "--device", "cpu")
    assert result.exit_code == 3
    assert "Traceback (most recent call last):" in result.stderr
    assert all(line.isprintable() for line in result.stderr.split("\n"))
