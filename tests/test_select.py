"""The table that chooses CUDA kernels, asked without a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from torch_nvfp4.ops.select import CudaDevice, explain_select

FLASH = {"top_k": 6, "experts": 256, "hidden": 4096, "features": 2048}
QWEN = {"top_k": 8, "experts": 256, "hidden": 2048, "features": 512}
GEMMA = {"top_k": 8, "experts": 128, "hidden": 2816, "features": 704}
KIMI = {"top_k": 16, "experts": 896, "hidden": 3584, "features": 384}
H100 = CudaDevice()
A100 = CudaDevice(8, 108, 166912)


def ask(tokens: int, device: CudaDevice = H100, **changes: Any) -> dict[str, str]:
    return explain_select(tokens, device=device, **{**FLASH, **changes})


def brief(tokens: int, device: CudaDevice = H100, **changes: Any) -> str:
    answer = ask(tokens, device, **changes)
    return f"{answer['kernel'].split()[0]} {answer['tile']}"


# 256 experts and top-k 6: 7 slots per expert are 298.7 tokens, 32 are 1365.3, 112 are 4778.7, 176 are 7509.3.
@pytest.mark.parametrize(
    ("tokens", "changes", "expected"),
    [
        (1, {}, "few_slots_mlp 64 rows x at most 1 tokens"),
        (5, {}, "few_slots_mlp 64 rows x at most 5 tokens"),
        (3, {"dtype": torch.float16}, "few_slots_mlp 64 rows x at most 3 tokens"),  # each is two columns
        (5, {"dtype": torch.float16}, "few_slots_mlp 64 rows x at most 2 tokens"),
        (6, {}, "stream_gemm 64 rows x at most 16 tokens (narrow)"),
        (298, {}, "stream_gemm 64 rows x at most 16 tokens (narrow)"),
        # fp16: 4 slots per expert are 170.7 tokens.
        (6, {"dtype": torch.float16}, "stream_gemm 64 rows x at most 8 tokens (split)"),
        (170, {"dtype": torch.float16}, "stream_gemm 64 rows x at most 8 tokens (split)"),
        (171, {"dtype": torch.float16}, "stream_gemm 64 rows x at most 16 tokens (narrow)"),
        (64, {"dtype": torch.float16, "batch_invariant": True}, "stream_gemm 64 rows x at most 16 tokens (narrow)"),
        (64, {"dtype": torch.float16, "op": "grouped_gemm"}, "stream_gemm 64 rows x at most 16 tokens (narrow)"),
        (64, {"dtype": torch.float16, "device": A100}, "stream_gemm 64 rows x at most 16 tokens (narrow)"),
        (299, {}, "wgmma_experts 256 rows x at most 64 tokens (tall)"),
        (1365, {}, "wgmma_experts 256 rows x at most 64 tokens (tall)"),
        (1366, {}, "wgmma_experts 256 rows x at most 112 tokens (tall)"),
        (4778, {}, "wgmma_experts 256 rows x at most 112 tokens (tall)"),
        (4779, {}, "wgmma_experts 192 rows x at most 192 tokens (wide)"),
        (4779, {"activation": "gelu"}, "wgmma_experts 256 rows x at most 112 tokens (tall)"),
        (4779, {"activation": "silu", "biases": True}, "wgmma_experts 192 rows x at most 192 tokens (wide)"),
        (4779, {"activation": "situ", "biases": True}, "wgmma_experts 192 rows x at most 192 tokens (wide)"),
        (4779, {"activation": "gelu", "biases": True}, "wgmma_experts 256 rows x at most 112 tokens (tall)"),
        (4779, {"activation": "situ", "gated": False}, "wgmma_experts 256 rows x at most 112 tokens (tall)"),
        (4779, {"gated": False}, "wgmma_experts 256 rows x at most 112 tokens (tall)"),
        (1, {"activation": "relu2", "gated": False}, "few_slots_mlp 64 rows x at most 1 tokens"),
        (4779, {"activation": None}, "wgmma_experts 192 rows x at most 192 tokens (wide)"),
        (7509, {}, "wgmma_experts 192 rows x at most 192 tokens (wide)"),
        (7510, {}, "wgmma_experts 256 rows x at most 112 tokens (tall)"),
        (7510, {"dtype": torch.float16}, "wgmma_experts 192 rows x at most 192 tokens (wide)"),
        (299, {"device": A100}, "stream_gemm 64 rows x at most 16 tokens (narrow)"),
        (683, {"device": A100}, "stream_gemm 64 rows x at most 32 tokens (wide)"),
        (1, {"device": A100}, "few_slots_mlp 64 rows x at most 1 tokens"),
        (32, {"experts": 1, "top_k": 1}, "few_slots_mlp 64 rows x at most 2 tokens"),
        (32, {"experts": 1, "top_k": 1, "hidden": 1024}, "few_slots_mlp 64 rows x at most 8 tokens"),
        (5, {"hidden": 1024, "features": 512, "dtype": torch.float16}, "few_slots_mlp 64 rows x at most 4 tokens"),
        (33, {"experts": 1, "top_k": 1}, "wgmma_experts 256 rows x at most 112 tokens (tall)"),
        (2048, {"experts": 2048}, "stream_gemm 64 rows x at most 16 tokens (narrow)"),
        (2400, {"experts": 2048}, "wgmma_experts 256 rows x at most 64 tokens (tall)"),
        (2400, {"experts": 2049}, "stream_gemm 64 rows x at most 16 tokens (narrow)"),
        (1, {"op": "grouped_gemm"}, "stream_gemm 64 rows x at most 16 tokens (narrow)"),
        (16, {"op": "linear", "experts": 1, "top_k": 1}, "stream_gemm 64 rows x at most 16 tokens (narrow)"),
        (1000, {"op": "linear", "experts": 1, "top_k": 1}, "stream_gemm 64 rows x at most 32 tokens (wide)"),
    ],
)
def test_kernel_and_tile(tokens: int, changes: dict[str, Any], expected: str) -> None:
    assert brief(tokens, **changes) == expected


@pytest.mark.parametrize(
    ("layer", "last_streamed"),
    [
        (GEMMA, 80),  # 0.43 GB of weights: 5 slots per expert are 80 tokens
        (QWEN, 160),  # 0.45 GB
        (QWEN | {"experts": 512}, 320),  # 0.91 GB
        (QWEN | {"experts": 640}, 560),  # 1.13 GB: 7 slots per expert
        (KIMI, 392),  # 2.1 GB
        (FLASH, 298),  # 3.6 GB
        (FLASH | {"op": "grouped_gemm", "experts": 64}, 53),  # [64, 2048, 4096] alone: 0.3 GB
    ],
)
def test_small_layers_stream_less(layer: dict[str, Any], last_streamed: int) -> None:
    assert brief(last_streamed, **layer).startswith("stream_gemm")
    assert brief(last_streamed + 1, **layer).startswith("wgmma_experts")
    slots = 5 if last_streamed * layer["top_k"] <= 5 * layer["experts"] else 7
    suffix = " in a layer of at most 1 GB" if slots == 5 else ""
    reason = f"it needs more than {slots} slots per expert to be ahead{suffix}"
    assert ask(last_streamed, **layer)["not wgmma_experts"] == reason


@pytest.mark.parametrize(
    ("tokens", "layer", "rows"),
    [
        (1, GEMMA, 32),  # w13 has 8 x 22 panels for 132 SMs: two of them for some SMs, or three halves
        (2, GEMMA, 32),
        (3, GEMMA, 64),  # 528 panels are four per SM
        (4, GEMMA, 64),
        (1, KIMI, 32),
        (2, KIMI, 64),
        (2, QWEN, 64),
        (1, FLASH, 64),
        (1, GEMMA | {"device": A100}, 64),  # the SM80 kernel has no halves
    ],
)
def test_half_panels_where_whole_ones_spread_badly(tokens: int, layer: dict[str, Any], rows: int) -> None:
    assert brief(tokens, **layer) == f"few_slots_mlp {rows} rows x at most {tokens} tokens"


@pytest.mark.parametrize(
    ("layer", "last"),
    [(QWEN, 1464), (GEMMA, 1065), (KIMI, 418), (FLASH, 976)],  # 48 MB of [tokens x top-k, K] in 16 bits
)
def test_weights_leave_l2_first_where_the_results_fit(layer: dict[str, Any], last: int) -> None:
    assert ask(last, **layer)["L2"] == "weights leave first"
    assert ask(last + 1, **layer)["L2"] == "no hints"
    assert ask(last, **layer, op="grouped_gemm")["L2"] == "no hints"


@pytest.mark.parametrize(
    ("layer", "last"),
    [(FLASH, 2), (KIMI, 1), (GEMMA, 3), (QWEN, 4)],  # Kimi-K3, M = 2: 3584 halves in w2 for 132 x 16 warps
)
def test_parts_where_warps_have_few(layer: dict[str, Any], last: int) -> None:
    for tokens in range(1, last + 1):
        answer = ask(tokens, **layer, batch_invariant=True)
        assert answer["tile"] == f"16 rows x at most {tokens} tokens"
        assert answer["split"] == "none"
    answer = ask(last + 1, **layer, batch_invariant=True)
    assert answer["kernel"].startswith("stream_gemm")
    if (last + 1) * layer["top_k"] <= 32:
        assert answer["not few_slots_mlp"].startswith("a warp would have more than two items")
    assert ask(1, A100, **layer, batch_invariant=True)["kernel"].startswith("stream_gemm")


def test_split() -> None:
    # 132 x 16 = 2112 warps. 8 of them per item up to 264 items, 4 up to 528, then 2; each with 4 blocks of k or more,
    # and 2 only with 6.
    assert ask(6, experts=8)["split"] == "k over 4 warps in w13, over 4 in w2"
    assert ask(6, experts=9)["split"] == "k over 2 warps in w13, over 2 in w2"
    assert ask(16, features=768)["split"] == "k over 2 warps in w13, over 2 in w2"
    assert ask(16, features=704)["split"] == "k over 2 warps in w13, over 1 in w2"
    assert ask(64)["split"] == "k over 2 warps in w13, over 2 in w2"
    one = {"op": "linear", "experts": 1, "top_k": 1}
    assert ask(1, **one, features=64)["split"] == "k over 8 warps"
    assert ask(1, **one, features=64, hidden=31 * 64)["split"] == "k over 4 warps"
    assert ask(1, **one, features=64, hidden=64)["split"] == "k over 1 warps"


def test_who_sorts() -> None:
    # An expert is 14.2 MB; 1.2 GB are 84 of them.
    assert ask(14)["sort"] == "by every CTA"
    assert ask(15)["sort"] == "by a launch before"
    assert ask(14, A100)["sort"] == "by a launch before"
    small = {"hidden": 2048, "features": 512, "top_k": 8}
    assert ask(128, **small)["sort"] == "by every CTA"
    assert ask(129, **small)["sort"] == "by a launch before"  # 1032 slots
    assert ask(128, **small, experts=1023)["sort"] == "by a launch before"  # 1.8 GB
    assert ask(128, **small | {"features": 128}, experts=1023)["sort"] == "by every CTA"
    assert ask(128, **small | {"features": 128}, experts=1024)["sort"] == "by a launch before"
    assert "sort" not in ask(16, op="linear", experts=1, top_k=1)


@pytest.mark.parametrize(
    ("layer", "last"),
    [(QWEN, 256), (GEMMA, 192), (QWEN | {"hidden": 1920}, 256)],  # 2048 slots, or 12 per expert
)
def test_who_sorts_for_wgmma(layer: dict[str, Any], last: int) -> None:
    assert brief(last, **layer).startswith("wgmma_experts")
    assert ask(last, **layer)["sort"] == "by every CTA"
    assert ask(last + 1, **layer)["sort"] == "by a launch before"
    assert "sort" not in ask(last, **layer, op="grouped_gemm")
    assert ask(last, **layer | {"hidden": layer["hidden"] + 64})["sort"] == "by a launch before"  # half a stage of k


def test_large_layers_sort_before_wgmma() -> None:
    assert ask(300)["sort"] == ask(448, **KIMI)["sort"] == "by a launch before"


def test_tables_of_many_experts_leave_room_for_three_stages() -> None:
    """Two would wait for each other for ever."""
    kimi = {"hidden": 3584, "features": 384, "top_k": 16}
    answer = ask(8192, **kimi, experts=896)
    assert answer["tile"] == "192 rows x at most 176 tokens (wide)"
    assert answer["shared memory"].endswith(" 3 stages")
    assert ask(6400, **kimi, experts=640)["tile"] == "192 rows x at most 192 tokens (wide)"
    for experts in range(1, 2049, 31):
        for tokens in (experts, 4 * experts, 8 * experts, 16 * experts):
            shared = ask(tokens, **kimi, experts=experts)["shared memory"]
            assert "stages" not in shared or int(shared.split()[-2]) >= 3


def test_narrower_tiles_where_they_have_a_stage_more() -> None:
    kimi = {"hidden": 3584, "features": 384, "top_k": 16}
    for tokens, experts, width, stages in (
        (2048, 896, 96, 4),  # 37 slots per expert
        (4096, 896, 96, 4),  # 73
        (4256, 896, 96, 4),  # 76
        (4257, 896, 112, 3),  # too many of its experts would need two tiles
        (1700, 896, 64, 5),
        (1024, 256, 112, 4),  # four stages all the same
    ):
        answer = ask(tokens, **kimi, experts=experts)
        assert answer["tile"] == f"256 rows x at most {width} tokens (tall)", answer
        assert answer["shared memory"].endswith(f" {stages} stages"), answer


def test_reasons() -> None:
    answer = ask(64)
    assert list(answer) == [
        "problem", "device", "kernel", "tile", "split", "sort", "not few_slots_mlp", "not wgmma_experts", "why",
    ]  # fmt: skip
    assert "384 slots, 1.5 per expert" in answer["problem"]
    assert answer["device"] == "compute capability 9.x, SM90 kernels, 132 SMs, 232448 bytes of shared memory per CTA"
    assert answer["kernel"] == "stream_gemm (bulk copies, mma.sync)"
    assert answer["not few_slots_mlp"].endswith("at most 32 slots")
    assert answer["not wgmma_experts"] == "it needs more than 7 slots per expert to be ahead"
    assert ask(64, A100)["not wgmma_experts"] == "wgmma needs SM90 instructions"
    # 32 rows of 16,384 fp16 values are 1 MB of a CTA's 227 KB.
    wide = ask(32, top_k=1, experts=4, hidden=16384)
    assert wide["not few_slots_mlp"].startswith("the tokens do not fit")


def test_arch_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_NVFP4_ARCH", "80")
    assert ask(64)["kernel"] == "stream_gemm (cp.async, mma.sync)"
    assert brief(8192).startswith("stream_gemm")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"op": "combine"}, "expected op moe, batched_moe, grouped_gemm or linear, got combine"),
        ({"dtype": torch.float32}, "expected dtype bf16 or fp16, got torch.float32"),
        ({"experts": 0}, "expected experts from 1 to 2\\^30, got 0"),
        ({"hidden": 2**31}, "expected k from 1 to 2\\^30, got 2147483648"),
        ({"hidden": 2**64}, "expected sizes from 0 to 2\\^63 - 1, got"),
        ({"top_k": -1}, "expected sizes from 0 to 2\\^63 - 1, got"),
        ({"op": "linear"}, "expected top_k 1 and experts 1 for linear, got 6 and 256"),
        ({"op": "batched_moe"}, "expected top_k 1 for batched_moe, got 6"),
        ({"device": CudaDevice(9, 0, 1)}, "expected multiprocessors from 1 to 2\\^30, got 0"),
        ({"activation": "tanh"}, "expected activation to be one of"),
    ],
)
def test_bad_problems(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ask(64, **changes)


STREAM = "stream_gemm, tiles of at most {} tokens, for up to {} tokens per expert that has any"
WGMMA = "wgmma_experts, tiles of at most {} tokens, for up to {} tokens per expert that has any"


@pytest.mark.parametrize(
    ("rows", "changes", "expected"),
    [
        (1, {}, [STREAM.format(16, 7)]),
        (7, {}, [STREAM.format(16, 7)]),
        (8, {}, [STREAM.format(16, 7), WGMMA.format(64, 8)]),
        (64, {}, [STREAM.format(16, 7), WGMMA.format(64, 64)]),
        (65, {}, [STREAM.format(16, 7), WGMMA.format(64, 32), WGMMA.format(112, 65)]),
        (1024, {}, [STREAM.format(16, 7), WGMMA.format(64, 32), WGMMA.format(112, 1024)]),
        (16, {"device": A100}, [STREAM.format(16, 16)]),
        (1024, {"device": A100}, [STREAM.format(16, 16), STREAM.format(32, 1024)]),
        (1024, {"experts": 2049}, [STREAM.format(16, 16), STREAM.format(32, 1024)]),
        (0, {}, []),
    ],
)
def test_paths_of_a_batch(rows: int, changes: dict[str, Any], expected: list[str]) -> None:
    answer = ask(rows, op="batched_moe", top_k=1, **changes)
    assert [text for name, text in answer.items() if name.startswith("path ")] == expected
    assert "only the device knows" in answer["why"]


def test_any_size_has_an_answer() -> None:
    """The least and the greatest sizes, on devices from nothing to a GB of shared memory, without an overflow."""
    ends = (1, 2**30)
    for tokens, top_k, experts, hidden, features in [
        (a, b, c, d, e) for a in (0, *ends) for b in ends for c in ends for d in ends for e in ends
    ]:
        for device in (CudaDevice(9, 1, 1), CudaDevice(9, 2**30, 2**30), CudaDevice(8, 132, 102400)):
            answer = explain_select(
                tokens, top_k=top_k, experts=experts, hidden=hidden, features=features, device=device
            )
            assert answer["kernel"]
            assert "-" not in answer["tile"] + answer["split"]
            if top_k == 1:
                answer = explain_select(
                    tokens, top_k=1, experts=experts, hidden=hidden, features=features, device=device, op="batched_moe"
                )
                paths = [text for name, text in answer.items() if name.startswith("path ")]
                assert len(paths) >= min(tokens, 1)
                assert not any("-" in text or " 0 tokens" in text for text in paths)


def test_experts_without_a_gate_have_half_the_rows_in_w13() -> None:
    assert "weights [4096, 4096]" in ask(1)["problem"]
    assert "weights [2048, 4096]" in ask(1, activation="relu2", gated=False)["problem"]
    assert "weights [2048, 4096]" in ask(1, top_k=1, op="batched_moe", activation="relu2", gated=False)["problem"]
