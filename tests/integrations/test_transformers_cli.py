"""``torch-nvfp4 generate`` and ``torch-nvfp4 serve`` on tiny checkpoints."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from helpers.hf_models import greedy, write_model, write_tokenizer
from torch_nvfp4.cli import app

transformers = pytest.importorskip("transformers", minversion="5.23")

from helpers.hf_families import auto_class, config_of, write_family  # noqa: E402
from torch_nvfp4.integrations.transformers import from_pretrained, generation, serving, unregister  # noqa: E402
from torch_nvfp4.integrations.transformers.generation import GeneratedText, Sampling  # noqa: E402


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    packed = write_model(tmp_path_factory.mktemp("cli"), "modelopt", num_hidden_layers=2) / "packed"
    write_tokenizer(packed)
    return packed


def test_generate_prints_the_models_tokens(path: Path, tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    arguments = ["generate", str(path), "--prompt", "w3 w4 w5", "--max-new-tokens", "6", "--dtype", "fp32"]
    result = CliRunner().invoke(app, [*arguments, "--device", "cpu", "--json", str(file)])
    assert result.exit_code == 0, result.output
    ids = torch.tensor([[10, 6, 7, 8, 11]])  # w7 w3 w4 w5 w8: the chat template
    tokens = greedy(from_pretrained(path, dtype=torch.float32), ids, 6)[0].tolist()
    text = " ".join(f"w{token - 3}" for token in tokens)
    assert result.stdout.strip() == text
    content = json.loads(file.read_text())
    assert (content["text"], content["prompt_tokens"], content["new_tokens"]) == (text, 5, 6)
    assert "5 + 6 tokens; loaded in " in result.stderr
    assert " tokens/s; peak memory " in result.stderr


def test_generate_with_fp8_activations_needs_a_gpu(path: Path) -> None:
    result = CliRunner().invoke(
        app, ["generate", str(path), "--prompt", "w3", "--device", "cpu", "--input-quant", "fp8"]
    )
    assert result.exit_code == 2
    words = (
        "torch-nvfp4 generate: --input-quant fp8: expected a GPU of compute capability 9.0, got cpu; leave the option"
    )
    assert result.stderr.startswith(words)


def test_generate_without_the_chat_template(path: Path) -> None:
    arguments = ["generate", str(path), "--prompt", "w3 w4 w5", "--max-new-tokens", "6", "--dtype", "fp32", "--raw"]
    result = CliRunner().invoke(app, [*arguments, "--device", "cpu"])
    tokens = greedy(from_pretrained(path, dtype=torch.float32), torch.tensor([[6, 7, 8]]), 6)[0].tolist()
    assert result.stdout.strip() == " ".join(f"w{token - 3}" for token in tokens)
    assert "3 + 6 tokens" in result.stderr


@pytest.mark.parametrize("family", ["gpt-oss", "nemotron", "minimax-m3 in compressed-tensors' MXFP4"])
def test_generate_with_experts_of_other_kinds(family: str, tmp_path: Path) -> None:
    """Biases in MXFP4, experts without a gate, a model of images: transformers' own in fp32 has the same tokens."""
    path = write_family(tmp_path, family)
    write_tokenizer(path / "packed", chat=False)
    arguments = ["generate", str(path / "packed"), "--prompt", "w3 w4 w5", "--max-new-tokens", "6", "--dtype", "fp32"]
    result = CliRunner().invoke(app, [*arguments, "--device", "cpu"])
    assert result.exit_code == 0, result.output
    oracle = auto_class(config_of(path / "dense")).from_pretrained(path / "dense", dtype=torch.float32)
    tokens = greedy(oracle, torch.tensor([[6, 7, 8]]), 6)[0].tolist()
    assert result.stdout.strip() == " ".join(f"w{token - 3}" for token in tokens)


def test_sampling_is_repeatable(path: Path) -> None:
    def run(seed: int) -> str:
        arguments = ["generate", str(path), "--prompt", "w3", "--max-new-tokens", "8", "--temperature", "1.5"]
        return CliRunner().invoke(app, [*arguments, "--top-k", "50", "--top-p", "0.9", "--seed", str(seed)]).stdout

    assert run(1) == run(1) != run(2)
    assert Sampling(8, 0.5, 0.9, 3).arguments() == {
        "max_new_tokens": 8, "do_sample": True, "temperature": 0.5, "top_p": 0.9, "top_k": 3,
        "num_beams": 1, "num_return_sequences": 1, "return_dict_in_generate": False,
    }  # fmt: skip


def test_the_rate_is_of_the_tokens_after_the_first() -> None:
    assert GeneratedText("", 3, 11, 1.0, 9.0, 0.2, False).decode_tokens_per_s == 5.0
    assert GeneratedText("", 3, 1, 1.0, 0.0, None, False).decode_tokens_per_s is None


def test_what_is_missing_is_one_line(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without = tmp_path / "without"
    without.mkdir()
    for file in path.iterdir():
        if not file.name.startswith("tokenizer"):
            (without / file.name).symlink_to(file)

    def error(*arguments: str) -> str:
        result = CliRunner().invoke(app, list(arguments))
        assert (result.exit_code, result.stdout) == (2, "")
        return result.stderr.splitlines()[-1]

    line = error("generate", str(without), "--prompt", "w3")
    assert f"{without}: expected the files of a tokenizer beside the weights, got " in line
    with monkeypatch.context() as patch:  # the reason where config.json names the class of a tokenizer

        def refuse(*_: object, **__: object) -> None:
            raise ValueError("none of: \n(1) one, \n(2) two. \nInstall sentencepiece.")

        patch.setattr(transformers.AutoTokenizer, "from_pretrained", refuse)
        line = error("generate", str(without), "--prompt", "w3")
        assert line.endswith("beside the weights, got none of: (1) one, (2) two. Install sentencepiece.")
    assert "expected a checkpoint directory, got no such path" in error(
        "generate", str(tmp_path / "no"), "--prompt", "w3"
    )
    assert "expected a checkpoint directory, got no such path" in error("serve", str(tmp_path / "no"))
    monkeypatch.setattr(serving, "is_serve_available", lambda: False)
    assert "got not all of them; pip install 'torch-nvfp4[serve]'" in error("serve", str(path), "--port", "1")


@pytest.mark.parametrize("arguments", [("generate", "--prompt", "w3"), ("serve",)])
def test_another_transformers_is_no_bug(
    path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    command, *options = arguments
    real = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "5.19.0" if name == "transformers" else real(name))
    result = CliRunner().invoke(app, [command, str(path), *options])
    extra = {"generate": "transformers", "serve": "serve"}[command]
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.splitlines()[-1] == (
        f"torch-nvfp4 {command}: expected transformers >= 5.23, < 6, got 5.19.0; "
        f"pip install 'torch-nvfp4[{extra}]', in an environment apart from an engine that asks for 5.19.0"
    )


def test_a_checkpoint_without_nvfp4_weights_is_not_served(tmp_path: Path) -> None:
    """transformers would serve it, with nothing of this package."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_moe", "hidden_size": 64}))
    save_file({"lm_head.weight": torch.zeros(2, 2)}, tmp_path / "model.safetensors")
    result = CliRunner().invoke(app, ["serve", str(tmp_path)])
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.splitlines()[-1] == (
        f"torch-nvfp4 serve: {tmp_path}: expected NVFP4 weights or MXFP4 experts, got none; torch-nvfp4 "
        "quantize makes them"
    )


def edit(file: Path, **changes: Any) -> None:
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(content | changes))


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "a template that refuses": (
        lambda copy: edit(copy / "tokenizer_config.json", chat_template="{{ raise_exception('roles alternate') }}"),
        "expected a checkpoint and a prompt that transformers can run (PATH), got TemplateError: roles alternate",
    ),
    "a template that is none": (
        lambda copy: edit(copy / "tokenizer_config.json", chat_template="{% if %}"), "got TemplateSyntaxError: ",
    ),
    "a config of another type": (
        lambda copy: edit(copy / "config.json", num_attention_heads="x"),
        "got StrictDataclassFieldValidationError: Validation error for field 'num_attention_heads'",
    ),
    "a config that does not fit the weights": (
        lambda copy: edit(copy / "config.json", vocab_size=300), "got RuntimeError: You set `ignore_mismatched_sizes`",
    ),
    "a tokenizer that is none": (lambda copy: (copy / "tokenizer.json").write_text("[]"), "got TypeError: "),
    "a model of the checkpoint's own code": (
        lambda copy: edit(copy / "config.json", model_type="own", auto_map={"AutoConfig": "own.Config"}),
        "custom code",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_what_transformers_raises_is_one_line(path: Path, tmp_path: Path, case: str) -> None:
    change, words = BROKEN[case]
    copy = tmp_path / "copy"
    shutil.copytree(path, copy)
    change(copy)
    result = CliRunner().invoke(app, ["generate", str(copy), "--prompt", "w3", "--device", "cpu"], input="y\n")
    line = result.stderr.splitlines()[-1]
    assert result.exit_code == 2, result.stderr
    assert result.stdout == ""
    assert line.startswith("torch-nvfp4 generate: ")
    assert words.replace("PATH", str(copy)) in line


def test_a_bug_is_still_a_bug(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise TypeError("of this package")

    broken.__code__ = broken.__code__.replace(co_filename=generation.__file__)
    monkeypatch.setattr(generation, "from_pretrained", broken)
    result = CliRunner().invoke(app, ["generate", str(path), "--prompt", "w3", "--device", "cpu"])
    assert result.exit_code == 3
    assert "this is a bug in torch_nvfp4" in result.stderr
    assert "TypeError: of this package" in result.stderr


def test_generate_makes_one_sequence(path: Path, tmp_path: Path) -> None:
    """Whatever the checkpoint's generation_config.json says."""
    copy = tmp_path / "copy"
    shutil.copytree(path, copy)
    edit(copy / "generation_config.json", num_beams=3, num_return_sequences=2, return_dict_in_generate=True)
    arguments = ["--prompt", "w3", "--max-new-tokens", "4", "--device", "cpu", "--dtype", "fp32"]
    results = [CliRunner().invoke(app, ["generate", str(folder), *arguments]) for folder in (path, copy)]
    assert results[1].exit_code == 0, results[1].stderr
    assert results[1].stdout == results[0].stdout


@pytest.mark.parametrize(("arguments", "words"), [
    (["--prompt", "w3 \udcff"], r"--prompt: expected text in UTF-8, got 'w3 \udcff'"),
    (["--prompt", "w3", "--temperature", "1e-40"], "--temperature: expected 0, which takes the likeliest token, or at"),
])  # fmt: skip
def test_requests_that_no_model_can_answer(path: Path, arguments: list[str], words: str) -> None:
    result = CliRunner().invoke(app, ["generate", str(path), *arguments])
    assert result.exit_code == 2
    assert words in result.stderr


@pytest.mark.parametrize("command", ["generate", "serve"])
def test_another_version_of_transformers(path: Path, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "5.22.0")
    result = CliRunner().invoke(app, [command, str(path), *(["--prompt", "w3"] if command == "generate" else [])])
    assert result.exit_code == 2
    assert "expected transformers >= 5.23, < 6, got 5.22.0; pip install 'torch-nvfp4[" in result.stderr


@pytest.fixture(scope="module")
def server(path: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of ``torch-nvfp4 serve``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    root = str(Path(__file__).parents[2])
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")]),
    }  # fmt: skip
    command = [sys.executable, "-m", "torch_nvfp4", "serve", str(path), "--host", "127.0.0.1", "--port", port]
    log = tmp_path_factory.mktemp("serve") / "log"
    with log.open("w") as output:
        arguments = ["--device", "cpu", "--dtype", "float32"]
        process = subprocess.Popen([*command, *arguments], env=environment, stdout=output, stderr=output)
        address = f"http://127.0.0.1:{port}"
        try:
            for _ in range(240):
                if process.poll() is not None:
                    break
                try:
                    urllib.request.urlopen(f"{address}/health", timeout=2)
                    break
                except OSError:
                    time.sleep(0.5)
            assert process.poll() is None, log.read_text()
            yield address
            process.terminate()
            assert process.wait(60) == 143
        finally:
            process.kill()


def test_serve_answers_openais_client(path: Path, server: str) -> None:
    openai = pytest.importorskip("openai")
    client = openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0)
    turn = [{"role": "user", "content": "w3 w4 w5"}]
    request: dict[str, Any] = {"model": str(path), "messages": turn, "max_tokens": 6, "temperature": 0}
    tokens = greedy(from_pretrained(path, dtype=torch.float32), torch.tensor([[10, 6, 7, 8, 11]]), 6)[0].tolist()
    expected = " ".join(f"w{token - 3}" for token in tokens)

    def chat() -> str:
        return str(client.chat.completions.create(**request).choices[0].message.content)

    assert chat().endswith(expected)
    chunks = client.chat.completions.create(stream=True, **request)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices).endswith(expected)
    with ThreadPoolExecutor(2) as clients:
        answers = list(clients.map(lambda _: chat(), range(2)))
    assert all(answer.endswith(expected) for answer in answers)
    with pytest.raises(openai.APIStatusError):
        client.chat.completions.create(model=str(path), messages=[])
    # The server closes the connection of an error; the next client has its own.
    client = openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0)
    assert chat().endswith(expected)


@pytest.mark.parametrize("written", ["--port {}", "--port={}"])
def test_an_address_in_use(path: Path, written: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before the model is loaded."""
    monkeypatch.setattr(serving, "is_serve_available", lambda: True)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        arguments = ["serve", str(path), "--host", "127.0.0.1", *written.format(port).split()]
        result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    words = f"torch-nvfp4 serve: --host, --port: expected an address that is free, got 127.0.0.1:{port}, which another"
    assert result.stderr.startswith(words)


def ending(error: BaseException | int) -> Callable[..., int]:
    def run(**_: object) -> int:
        if isinstance(error, int):
            return error
        raise error

    return run


def test_how_serve_ends(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C is 130 as in every command; a server that does not start is no bug of this package."""
    from transformers.cli import transformers as program

    monkeypatch.setattr(serving, "is_serve_available", lambda: True)
    interrupted = RuntimeError()
    interrupted.__cause__ = KeyboardInterrupt()
    cases: list[tuple[BaseException | int, int, str]] = [
        (interrupted, 130, "torch-nvfp4 serve: interrupted"), (0, 0, ""), (4, 4, ""), (SystemExit(143), 143, ""),
        (SystemExit(3), 2, "torch-nvfp4 serve: expected the server to start, got what it says above"),
    ]  # fmt: skip
    for error, code, words in cases:
        monkeypatch.setattr(program, "app", ending(error))
        result = CliRunner().invoke(app, ["serve", str(path), "--port", "0"])
        unregister()
        assert result.exit_code == code
        assert words in result.stderr


def test_an_option_that_the_server_does_not_have(path: Path) -> None:
    pytest.importorskip("fastapi")
    result = CliRunner().invoke(app, ["serve", str(path), "--nonsense"])
    unregister()
    assert result.exit_code == 2
    assert "--nonsense" in result.stderr


def test_serve_hands_its_options_on(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And registers, so that the server's from_pretrained takes the checkpoint, MXFP4 too."""
    from transformers.cli import transformers as program

    calls: list[tuple[list[str], bool]] = []

    def run(args: list[str], **_: object) -> None:
        mapping = transformers.quantizers.auto.AUTO_QUANTIZATION_CONFIG_MAPPING
        calls.append((args, mapping["modelopt"].takes_mxfp4))

    monkeypatch.setattr(serving, "is_serve_available", lambda: True)
    monkeypatch.setattr(program, "app", run)
    try:
        result = CliRunner().invoke(app, ["serve", str(path), "--port", "8123", "--compile", "--log-level=info"])
    finally:
        unregister()
    assert result.exit_code == 0, result.output
    assert calls == [(["serve", str(path), "--port", "8123", "--compile", "--log-level=info"], True)]
