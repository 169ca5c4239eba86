"""The benchmark of vLLM where there is no vLLM: the model it writes, its sums, its protocol with a stand-in engine."""

import json
import math
import os
import sys
from dataclasses import replace
from types import ModuleType, SimpleNamespace

import pytest
import torch

from torch_nvfp4.bench import BenchError
from torch_nvfp4.bench.vllm import __main__ as command
from torch_nvfp4.bench.vllm import engine, serve
from torch_nvfp4.bench.vllm.engine import Job, experts_classes, measure, prompt
from torch_nvfp4.bench.vllm.model import TINY, Sizes, write_model
from torch_nvfp4.bench.vllm.reference import closer, distance
from torch_nvfp4.bench.vllm.report import OURS, THEIRS, ratios, table
from torch_nvfp4.checkpoint import open_checkpoint
from torch_nvfp4.format import dequantize

CPU = torch.device("cpu")
ONE_LAYER = replace(TINY, layers=1)


def test_the_model_is_a_checkpoint_whose_experts_enlarge_as_meant(tmp_path):
    checkpoint = open_checkpoint(write_model(tmp_path, TINY, device=CPU))
    assert (checkpoint.layers, checkpoint.num_experts, checkpoint.top_k) == ((0, 1), 8, 2)
    experts = checkpoint.experts(1)
    assert list(experts.w13.data.shape) == [8, 128, 64]
    assert list(experts.w2.data.shape) == [8, 128, 32]
    # What the writer aims at: rows of length 2, and what goes back into the residual stream smaller with the depth.
    for weight, length in ((experts.w13, 2.0), (experts.w2, 2.0 * 0.5 / 2**0.5)):
        assert dequantize(weight).norm(dim=-1).mean() == pytest.approx(length, rel=0.05)


def test_a_model_that_is_there_is_left_and_another_is_written(tmp_path):
    written = []
    write_model(tmp_path, ONE_LAYER, device=CPU, progress=written.append)
    before = (tmp_path / "layer-000.safetensors").read_bytes()
    write_model(tmp_path, ONE_LAYER, device=CPU, progress=written.append)
    assert written == ["writing layer 1 of 1"]
    (tmp_path / "complete.json").unlink()  # as after an interruption
    write_model(tmp_path, ONE_LAYER, device=CPU)
    assert (tmp_path / "layer-000.safetensors").read_bytes() == before
    write_model(tmp_path, ONE_LAYER, device=CPU, seed=1)
    assert (tmp_path / "layer-000.safetensors").read_bytes() != before


def test_distances_worked_out_by_hand():
    reference = torch.tensor([[0.5, 0.25, 0.25], [0.8, 0.1, 0.1]]).log()
    run = torch.tensor([[0.25, 0.5, 0.25], [0.8, 0.1, 0.1]]).log()
    far = distance(run, reference, torch.tensor([0, 2]))
    assert (far.positions, far.same_top) == (2, 0.5)
    assert far.max_error == pytest.approx(math.log(2))
    assert far.mean_error == pytest.approx(math.log(2) / 2)
    assert far.max_kl == pytest.approx(0.25 * math.log(2))  # 0.5 ln 2 - 0.25 ln 2
    assert far.mean_kl == pytest.approx(0.125 * math.log(2))
    gain, error = closer(reference, run, reference)
    assert gain == pytest.approx(0.125 * math.log(2))
    assert error == pytest.approx(0.125 * math.log(2))  # the two gains differ from their mean by it
    assert closer(run, run, reference) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (torch.zeros(1, 3), r"expected log-probabilities \[2, 3\], got \[1, 3\]"),
        (torch.full((2, 3), float("nan")), "expected finite log-probabilities, got 6 others"),
    ],
)
def test_log_probabilities_that_cannot_be_compared(run, message):
    with pytest.raises(BenchError, match=message):
        distance(run, torch.zeros(2, 3), torch.tensor([0, 0]))


def pair(ours, theirs):
    return {
        OURS: {"decode": {"4": [ours, 9.0]}, "prefill": {}},
        THEIRS: {"decode": {"4": [9.0, theirs]}, "prefill": {}},
    }


def test_the_table_has_the_best_of_each_process_and_ratios_within_pairs():
    row = ratios([pair(0.001, 0.002), pair(0.002, 0.003), pair(0.001, 0.0012)], "decode", "4")
    assert (row[OURS], row[THEIRS]) == (0.001, 0.002)
    assert row["ratio"] == pytest.approx(1.5)
    assert row["ratios"] == pytest.approx([2.0, 1.5, 1.2])
    assert table([row]).splitlines() == [
        "                            plug-in ms     vLLM ms   ratio  ratios of the pairs",
        "decode step, batch 4             1.000       2.000   1.500  2.000 1.500 1.200",
    ]


class StandInLLM:
    """Answers as vllm.LLM does, and takes 5 s and half a second per step; the logit of token t is t."""

    made = None
    clock = 0.0

    def __init__(self, model, **options):
        type(self).made = options
        self.vocab = 16

    def apply_model(self, function):
        experts = SimpleNamespace(quant_method=SimpleNamespace(moe_kernel=SimpleNamespace(fused_experts=self)))
        return [function(SimpleNamespace(modules=lambda: [experts, SimpleNamespace()]))]

    def generate(self, prompts, params, use_tqdm):
        StandInLLM.clock += 5.0 + 0.5 * params.max_tokens
        flat = None
        if hasattr(params, "prompt_logprobs"):
            positions = len(prompts[0]["prompt_token_ids"])
            order = list(range(self.vocab))[::-1]  # most likely first
            starts = [0, *range(0, self.vocab * (positions - 1), self.vocab)]
            values = torch.arange(self.vocab).float().log_softmax(0).flip(0).tolist()
            flat = SimpleNamespace(
                start_indices=starts, end_indices=[0, *(start + self.vocab for start in starts[1:])],
                token_ids=order * (positions - 1), logprobs=values * (positions - 1),
            )  # fmt: skip
        return [SimpleNamespace(prompt_logprobs=flat) for _ in prompts]


@pytest.fixture
def stand_in(monkeypatch):
    module = ModuleType("vllm")
    module.LLM = StandInLLM
    module.SamplingParams = SimpleNamespace
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr(engine.time, "perf_counter", lambda: StandInLLM.clock)


JOB = Job("model", decode=(1, 4), prefill=((2, 8),), scored=(3, 5), repeats=2, vocab=16)


def test_one_measurement_of_a_stand_in_engine(stand_in, tmp_path):
    job = replace(JOB, attention_backend="TRITON_ATTN", options={"enforce_eager": True, "seed": 7})
    result = measure(job, tmp_path / "log_probs.pt")
    assert result["experts"] == [f"{__name__}.StandInLLM"]
    assert result["decode"] == {"1": [0.5] * 2, "4": [0.5] * 2}  # per step, without what a run takes besides
    assert result["prefill"] == {"2 x 8": [5.5] * 4}
    assert StandInLLM.made == {
        "skip_tokenizer_init": True, "max_logprobs": -1, "dtype": "bfloat16", "max_model_len": 4096,
        "gpu_memory_utilization": 0.6, "enable_prefix_caching": False, "max_num_seqs": 64,
        "max_num_batched_tokens": 8192, "tensor_parallel_size": 1, "attention_backend": "TRITON_ATTN",
        "enforce_eager": True, "seed": 7,
    }  # fmt: skip
    log_probs = torch.load(tmp_path / "log_probs.pt")
    torch.testing.assert_close(log_probs, torch.arange(16).float().log_softmax(0).expand(2 + 4, 16))


def test_jobs_survive_their_file_and_prompts_their_process(tmp_path):
    JOB.save(tmp_path / "job")
    assert Job.load(tmp_path / "job") == JOB
    assert prompt(3, 5, 100) == prompt(3, 5, 100) != prompt(4, 5, 100)
    assert min(prompt(0, 1000, 16)) == 3  # no special tokens


def test_experts_of_a_model_without_any():
    assert experts_classes(torch.nn.Linear(2, 2)) == []


@pytest.fixture
def runs(monkeypatch):
    """What the processes were asked for; each answers in no time."""
    asked = []

    def run(job, side, stem, scores, timeout):
        asked.append((stem.name, side, job.scored, job.repeats))
        seconds = 0.001 if side == OURS else 0.0015
        if scores is not None:
            torch.save(torch.zeros(1), scores)
        return {
            "experts": [side],
            "decode": {str(count): [seconds] for count in job.decode},
            "prefill": {f"{count} x {length}": [seconds] for count, length in job.prefill},
        }

    monkeypatch.setattr(serve, "_run", run)
    monkeypatch.setattr(command, "score", lambda job, files, device, progress: None)
    monkeypatch.setattr(command, "_print_scores", lambda scores: None)
    monkeypatch.setattr(command, "_check_vllm", lambda: None)
    return asked


@pytest.mark.parametrize("what", ["serve", "layer"])
def test_without_vllm_nothing_is_written(what, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    assert command.main([what, "--tiny", "--dir", str(tmp_path / "model")]) == 1
    captured = capsys.readouterr()
    assert captured.err == (
        "error: expected vLLM beside torch_nvfp4, got no module vllm; pip install both into one environment\n"
    )
    assert not (tmp_path / "model").exists()


def test_the_first_pair_scores_and_does_not_count_and_sides_change_places(runs, tmp_path, capsys):
    file = tmp_path / "result.json"
    assert command.main(["--tiny", "--layers", "1", "--pairs", "2", "--dir", str(tmp_path), "--json", str(file)]) == 0
    scored = command._SCORED
    assert runs == [
        ("0-require", OURS, scored, 1), ("0-off", THEIRS, scored, 1),
        ("1-off", THEIRS, (), 3), ("1-require", OURS, (), 3),
        ("2-require", OURS, (), 3), ("2-off", THEIRS, (), 3),
    ]  # fmt: skip
    result = json.loads(file.read_text())
    assert len(result["pairs"]) == 2
    assert [row["ratio"] for row in result["rows"]] == pytest.approx([1.5] * 3)
    assert "decode step, batch 4             1.000       1.500   1.500" in capsys.readouterr().out


def test_no_pair_begins_that_would_end_too_late(runs, tmp_path, capsys):
    arguments = ["--tiny", "--layers", "1", "--pairs", "9", "--dir", str(tmp_path), "--seconds", "0", "--no-scores"]
    assert command.main(arguments) == 0
    assert [name for name, *_ in runs] == ["0-require", "0-off"]
    assert "no time for pair 1 within 0 s" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("side", "experts", "message"),
    [
        (OURS, ["vllm.MarlinExperts"], r"expected torch_nvfp4's experts .* got \['vllm.MarlinExperts'\].*entry point"),
        (OURS, [], "expected torch_nvfp4's experts .* got none"),
        (THEIRS, ["torch_nvfp4.Experts"], r"expected vLLM's own experts .* got \['torch_nvfp4.Experts'\]"),
        (THEIRS, [], "expected vLLM's own experts .* got none"),
    ],
)
def test_a_side_that_ran_other_experts_is_an_error(side, experts, message):
    with pytest.raises(BenchError, match=message):
        serve._check_experts(side, experts)


def test_a_process_that_fails_is_shown_with_its_log(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/sh")  # which knows no -m
    with pytest.raises(BenchError, match=r"plug-in: expected a result, got exit code \d+. The end of .*0-require.log"):
        serve.run_pair(JOB, 0, tmp_path, timeout=20, progress=print)


def test_a_process_that_takes_too_long(tmp_path, monkeypatch):
    """It ends with its workers, which would keep a GPU's memory."""
    slow = tmp_path / "slow"
    slow.write_text(f"#!/bin/sh\nsleep 60 &\necho $! > {tmp_path}/worker\nwait\n")
    slow.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(slow))
    with pytest.raises(BenchError, match="plug-in: expected a result, got none within 1 s"):
        serve.run_pair(JOB, 0, tmp_path, timeout=1.0, progress=print)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "worker").read_text()), 0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layers", "0"], "argument --layers: expected a number of at least 1, got '0'"),
        (["layer", "--tokens", "1,,4"], "argument --tokens: expected a number of at least 1, got ''"),
        (["--tensor-parallel-size", "two"], "expected a number of at least 1, got 'two'"),
    ],
)
def test_arguments_that_make_no_sense(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        command.main(arguments)
    assert message in capsys.readouterr().err


def test_where_the_model_goes(tmp_path, monkeypatch):
    assert command._directory(tmp_path, 1e9) == tmp_path
    monkeypatch.setattr(command, "_SHARED_MEMORY", tmp_path)
    assert command._directory(None, 0.0) == tmp_path / "torch-nvfp4-bench-vllm"
    assert command._directory(None, 1e9).parent != tmp_path  # no room for it
    assert Sizes().layers == 24


@pytest.mark.parametrize("error", [BenchError("no result"), KeyboardInterrupt(), RuntimeError("CUDA out of memory")])
@pytest.mark.parametrize("named", [False, True])
def test_a_failure_frees_the_shared_memory(runs, tmp_path, monkeypatch, error, named):
    """Of the gigabytes nothing is left, of the logs everything; a directory of the user's stays as it is."""

    def fail(job, number, directory, **_):
        assert (directory / "model" / "complete.json").is_file()
        (directory / "log_probs-require.pt").write_bytes(b"scores")
        (directory / "0-require.log").write_text("what happened")
        raise error

    monkeypatch.setattr(command, "run_pair", fail)
    monkeypatch.setattr(command, "_SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(command.shutil, "disk_usage", lambda path: SimpleNamespace(free=1e12))
    directory = tmp_path / "torch-nvfp4-bench-vllm"
    arguments = ["--tiny", "--layers", "1", *(["--dir", str(directory)] if named else [])]
    if isinstance(error, BenchError):
        assert command.main(arguments) == 1
    else:
        with pytest.raises(type(error)):
            command.main(arguments)
    left = {path.name for path in directory.iterdir()}
    assert left == ({"0-require.log", "log_probs-require.pt", "model"} if named else {"0-require.log"})


def test_a_success_leaves_the_model_for_another_run(runs, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "_SHARED_MEMORY", tmp_path)
    monkeypatch.setattr(command.shutil, "disk_usage", lambda path: SimpleNamespace(free=1e12))
    assert command.main(["--tiny", "--layers", "1", "--pairs", "0"]) == 0
    assert (tmp_path / "torch-nvfp4-bench-vllm" / "model" / "complete.json").is_file()
