"""The benchmark of chat completions where there is no vLLM: its client and its protocol, with a stand-in server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from helpers import stand_in_chat
from torch_nvfp4.bench import BenchError
from torch_nvfp4.bench.transformers.tokenizer import chat_tokens, write_tokenizer
from torch_nvfp4.bench.vllm import __main__ as command
from torch_nvfp4.bench.vllm import chat
from torch_nvfp4.bench.vllm.chat import ChatJob, chat_rows, run_side
from torch_nvfp4.bench.vllm.client import Answer, Client, Question, question
from torch_nvfp4.bench.vllm.report import FIRST_TOKEN, OURS, RATE, THEIRS, chat_table

ROOT = Path(__file__).parents[2]
PROGRAM = (sys.executable, str(Path(stand_in_chat.__file__)))
ASKED = Question("w1 w2 w3", 4)
WITHOUT_END = r"expected a stream that ends with \[DONE\]"


@pytest.fixture
def serve():
    """Starts a stand-in server in this process, and returns a client of it."""
    servers = []

    def start(seconds=20.0, **options):
        server = stand_in_chat.Server(**options)
        servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        client = Client(server.server_port, "model", time.monotonic() + seconds)
        client.bodies = server.bodies
        return client

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("stream", [False, True])
def test_a_whole_answer(serve, stream):
    client = serve()
    assert client.healthy()
    answer = client.ask(ASKED, stream=stream)
    assert answer.text == "w1 w2 w3 w1"
    assert (answer.first is not None) == stream
    (body,) = client.bodies
    assert body["messages"] == [{"role": "user", "content": "w1 w2 w3"}]
    assert (body["temperature"], body["max_completion_tokens"], body["ignore_eos"]) == (0, 4, True)


def test_the_first_token_and_the_last_one_are_timed(serve):
    answer = serve(delay=0.1).ask(ASKED, stream=True)
    assert answer.first - answer.begin >= 0.1
    assert answer.end - answer.first >= 0.3


def test_questions_at_once_are_all_there_before_one_is_answered(serve):
    client = serve(together=5)
    questions = [question(index, 6, 3, 100) for index in range(5)]
    answers = client.ask_at_once(questions)
    assert [answer.text.split() for answer in answers] == [asked.message.split()[:3] for asked in questions]
    assert len({asked.message for asked in questions}) == 5


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("status", "expected status 200 from /v1/chat/completions, got 500: the engine is dead"),
        ("html", "expected an object of the protocol, got '<html>'"),
        ("no usage", "expected one choice with text, reason and usage, got .*finish_reason"),
        ("error", r"expected an object of the protocol, got '{\"error\": {\"message\": \"no\"}}'"),
        ("stopped", r"expected a whole answer \(finish_reason length, .*\), got finish_reason stop, prompt_tokens 8, "),
        ("short", "completion_tokens 4, words 4.*, got finish_reason length.* completion_tokens 4, words 3"),
        ("few tokens", "completion_tokens 4, words 4.*, got .* completion_tokens 3, words 4"),
        ("other prompt", "prompt_tokens 8, .*, got finish_reason length, prompt_tokens 9, "),
        ("cut", rf"answer from /v1/chat/completions, got IncompleteRead: .* after \d|{WITHOUT_END}, got 2 events"),
        ("no end", rf"{WITHOUT_END}, got 6 events|expected an object of the protocol, got ''"),
    ],
)  # fmt: skip
def test_an_answer_that_is_not_whole_is_an_error(serve, fault, stream, message):
    with pytest.raises(BenchError, match=message):
        serve(fault=fault).ask(ASKED, stream=stream)
    if stream:
        with pytest.raises(BenchError, match=message):
            serve(fault=fault).ask_at_once([ASKED, ASKED])


@pytest.mark.parametrize("stream", [False, True])
def test_a_server_that_takes_too_long_or_is_gone(serve, stream):
    with pytest.raises(BenchError, match=r"expected an answer from .*, got TimeoutError"):
        serve(seconds=0.2, fault="slow").ask(ASKED, stream=stream)
    gone = Client(serve().port, "model", time.monotonic() - 1)
    assert not gone.healthy()
    with pytest.raises(BenchError, match="got TimeoutError: no time is left"):
        gone.ask(ASKED, stream=stream)


def test_the_template_makes_the_tokens_that_are_expected(tmp_path):
    transformers = pytest.importorskip("transformers")
    write_tokenizer(tmp_path, 60)
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    asked = question(3, 20, 4, 60)
    chatted = [{"role": "user", "content": asked.message}]
    ids = tokenizer.apply_chat_template(chatted, add_generation_prompt=True, return_dict=False)
    assert len(ids) == chat_tokens(asked.message) == 25
    assert tokenizer.unk_token_id not in ids
    assert question(3, 20, 4, 60) == asked != question(4, 20, 4, 60)


def test_the_command_of_the_server():
    options = {"enforce_eager": True, "compilation_config": {"mode": 3}, "enable_prefix_caching": True, "seed": 7}
    job = ChatJob("folder", tensor_parallel_size=4, attention_backend="TRITON_ATTN", options=options)
    line = job.command(123)
    assert line[: len(chat._SERVER) + 1] == [*chat._SERVER, "folder"]
    text = " ".join(line)
    for part in (
        "--port 123 --host 127.0.0.1", "--tensor-parallel-size 4", "--attention-backend TRITON_ATTN", "--enforce-eager",
        '--compilation-config {"mode": 3}', "--enable-prefix-caching", "--seed 7", "--gpu-memory-utilization 0.6",
    ):  # fmt: skip
        assert part in text
    assert "--no-enable-prefix-caching" in ChatJob("folder").command(1)


JOB = ChatJob("folder", requests=(1, 3), words=6, tokens=4, repeats=2, vocab=100, tensor_parallel_size=2)


@pytest.fixture
def stand_in(monkeypatch):
    """The servers are stand-ins with this fault."""
    monkeypatch.setattr(chat, "_SERVER", PROGRAM)
    return lambda fault: monkeypatch.setenv("STAND_IN", fault)


def run(side, tmp_path, timeout=20.0):
    said = []
    return run_side(JOB, side, tmp_path, on_a_cpu=True, timeout=timeout, progress=said.append), said


def child_of(log):
    return int(next(line for line in log.read_text().splitlines() if line.startswith("child")).split()[1])


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()


@pytest.mark.parametrize(("side", "ranks"), [(OURS, ["Worker_TP0 pid=100", "Worker_TP1 pid=101"]), (THEIRS, [])])
def test_a_side(stand_in, tmp_path, side, ranks):
    result, said = run(side, tmp_path)
    assert result["ranks"] == ranks
    assert result["same"] == {"alone": [1 + 3, 4], "at once": [9, 9]}
    assert list(result["requests"]) == ["1", "3"]
    for times in result["requests"].values():
        assert [len(times[kind]) for kind in (FIRST_TOKEN, RATE)] == [2, 2]
        assert min(times[FIRST_TOKEN] + times[RATE]) > 0
    assert said[0].startswith(f"{side}: starting vllm serve on 2 rank(s), log {tmp_path}")
    log = tmp_path / f"chat-{'require' if side == OURS else 'off'}.log"
    assert "--served-model-name model" in log.read_text()
    assert not alive(child_of(log)), "the server's processes go with it"


@pytest.mark.parametrize(
    ("side", "fault", "message"),
    [
        (OURS, "dies", r"plug-in: expected vllm serve to answer, got exit code 1. The end of \S+:\n(.*\n)+expected a"),
        (OURS, "hangs", "plug-in: expected vllm serve to answer, got nothing within 3 s. The end of"),
        (OURS, "one rank", r"experts on 2 rank\(s\) in the log, got Worker_TP0 pid=100. The end of"),
        (THEIRS, "always", r"expected vLLM's own experts with TORCH_NVFP4_VLLM=off, got .*TP1 pid=101'\]. The end of"),
        (THEIRS, "status", "vLLM: expected status 200 .*, got 500: the engine is dead. The end of"),
    ],
)  # fmt: skip
def test_a_side_that_fails_is_shown_with_its_log_and_leaves_no_process(stand_in, tmp_path, side, fault, message):
    stand_in(fault)
    with pytest.raises(BenchError, match=message):
        run(side, tmp_path, timeout=3.0 if fault == "hangs" else 20.0)
    (log,) = tmp_path.glob("*.log")
    assert not alive(child_of(log))


def test_answers_that_change_are_counted(stand_in, tmp_path):
    stand_in("changing")
    result, _ = run(OURS, tmp_path)
    assert result["same"] == {"alone": [0, 4], "at once": [0, 9]}


def test_rates_and_ratios_worked_out_by_hand():
    three = [Answer("", 1.0, 1.5, 3.0), Answer("", 2.0, 2.1, 5.0), Answer("", 2.0, 2.2, 4.0)]
    times = chat._times([three, [Answer("", 0.0, 0.1, 2.0)]], 8)
    assert times[FIRST_TOKEN] == pytest.approx([0.2, 0.1])
    assert times[RATE] == [6.0, 4.0]

    def side(first, rate):
        return {"requests": {"1": {FIRST_TOKEN: [9.0, first, 0.0], RATE: [0.0, rate, 1e6]}}}

    job = ChatJob("folder", requests=(1,))
    rows = chat_rows({OURS: side(0.01, 300.0), THEIRS: side(0.015, 200.0)}, job)
    assert [row["ratio"] for row in rows] == pytest.approx([1.5, 1.5])
    assert chat_table(rows).splitlines() == [
        "                                           plug-in      vLLM   ratio",
        "time to first token, 1 at once, ms            10.0      15.0   1.500",
        "tokens per second, 1 at once                 300.0     200.0   1.500",
    ]
    alone = chat_table(chat_rows({OURS: side(0.01, 300.0)}, job)).splitlines()
    assert alone[1] == "time to first token, 1 at once, ms            10.0         -       -"


@pytest.mark.parametrize("gpus", [0, 3])
def test_the_command(stand_in, tmp_path, monkeypatch, capsys, gpus):
    """On GPUs both sides with a rank on each; on a CPU vLLM has nothing to compare with."""
    monkeypatch.setattr(command, "_check_vllm", lambda: None)
    monkeypatch.setattr(command.torch.cuda, "device_count", lambda: gpus)
    file = tmp_path / "result.json"
    options = ["--layers", "1", "--repeats", "1", "--requests", "1,2", "--answer", "5"]
    assert command.main(["chat", "--tiny", "--dir", str(tmp_path), "--json", str(file), *options]) == 0
    result = json.loads(file.read_text())
    assert list(result["sides"]) == [OURS, *([THEIRS] if gpus else [])]
    assert len(result["sides"][OURS]["ranks"]) == result["job"]["tensor_parallel_size"] == max(1, gpus)
    assert result["job"]["tokens"] == 5
    assert [row["ratio"] is None for row in result["rows"]] == [gpus == 0] * 4
    printed = capsys.readouterr()
    assert "tokens per second, 2 at once" in printed.out
    assert "answers that were the same again, plug-in: 3 of 3 alone, 4 of 4 at once" in printed.out
    assert ("nothing to compare with" in printed.err) == (gpus == 0)
    assert (tmp_path / "model" / "tokenizer_config.json").is_file()


def test_a_plug_in_that_changes_its_answers_fails_after_all_is_known(stand_in, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "_check_vllm", lambda: None)
    stand_in("changing")
    file = tmp_path / "result.json"
    options = ["--layers", "1", "--repeats", "1", "--requests", "1"]
    assert command.main(["chat", "--tiny", "--dir", str(tmp_path), "--json", str(file), *options]) == 1
    assert len(json.loads(file.read_text())["rows"]) == 2
    printed = capsys.readouterr()
    assert "tokens per second, 1 at once" in printed.out
    expected = "error: plug-in: expected the same answer to the same question alone, got another one 3 of 3 times\n"
    assert printed.err.endswith(expected)


def test_a_failure_frees_the_shared_memory(stand_in, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command, "_check_vllm", lambda: None)
    monkeypatch.setattr(command, "_SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(command.shutil, "disk_usage", lambda path: SimpleNamespace(free=1e12))
    stand_in("dies")
    assert command.main(["chat", "--tiny", "--layers", "1"]) == 1
    assert "expected a better model" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "torch-nvfp4-bench-vllm").iterdir()] == ["chat-require.log"]


INTERRUPTED = """
import sys
from pathlib import Path
from torch_nvfp4.bench.vllm import __main__ as command, chat
chat._SERVER = ({python!r}, {program!r})
command._check_vllm = lambda: None
command._SHARED_MEMORY = Path({folder!r})
sys.exit(command.main(["chat", "--tiny", "--layers", "1"]))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interruption_leaves_no_process_and_no_model(tmp_path, number):
    code = INTERRUPTED.format(python=PROGRAM[0], program=PROGRAM[1], folder=str(tmp_path))
    environment = os.environ | {"STAND_IN": "hangs", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.Popen([sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE, text=True)
    folder = tmp_path / "torch-nvfp4-bench-vllm"
    log = folder / "chat-require.log"
    for _ in range(1200):
        if log.is_file() and "child" in log.read_text():
            break
        assert run.poll() is None, run.stderr.read()
        time.sleep(0.05)
    child = child_of(log)
    assert alive(child)
    run.send_signal(number)
    _, error = run.communicate(timeout=60)
    # Python ends by the signal itself after KeyboardInterrupt.
    assert run.returncode == (-signal.SIGINT if number == signal.SIGINT else 128 + signal.SIGTERM), error
    assert not alive(child)
    assert [path.name for path in folder.iterdir()] == ["chat-require.log"]
