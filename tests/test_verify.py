"""One layer against fp64 as a library function: what passes, and that nothing passes of which nothing was checked."""

import json
import math

import pytest
import torch
import typer

from torch_nvfp4 import reference, reference_fp8
from torch_nvfp4 import verify as library
from torch_nvfp4.checkpoint import Checkpoint
from torch_nvfp4.cli import inspect
from torch_nvfp4.cli.terminal import Terminal
from torch_nvfp4.cli.verify import _print_checks as print_checks
from torch_nvfp4.demo import write_checkpoint
from torch_nvfp4.errors import CheckpointError
from torch_nvfp4.nn import NVFP4Experts
from torch_nvfp4.verify import covering_routing, relative_error, verify_layer

EXPERTS, TOP_K = 40, 2
CPU = {"dtype": torch.float32, "device": "cpu"}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_checkpoint(
        tmp_path_factory.mktemp("verify"), hidden_size=32, moe_intermediate_size=16, n_routed_experts=EXPERTS,
        num_experts_per_tok=TOP_K, num_hidden_layers=1,
    )  # fmt: skip


@pytest.fixture
def checkpoint(path):
    return Checkpoint.open(path)


def with_top_k(path, tmp_path, top_k):
    for file in path.iterdir():
        (tmp_path / file.name).symlink_to(file)
    config = json.loads((path / "config.json").read_text())
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_experts_per_tok": top_k}))
    return Checkpoint.open(tmp_path)


def test_by_default_every_expert_is_reached(checkpoint):
    check = verify_layer(checkpoint, 0, **CPU)
    assert check.passed
    assert check.problem is None
    assert (check.tokens, check.num_experts, check.experts_hit, check.experts_unchecked) == (20, EXPERTS, EXPERTS, ())
    assert check.relative_l2 < 1e-5
    assert 0.1 < check.clamped_share < 0.5


def test_experts_that_no_token_reaches_are_named(checkpoint):
    check = verify_layer(checkpoint, 0, tokens=3, seed=5, **CPU)
    ids = covering_routing(3, EXPERTS, TOP_K, generator=generator_after_tokens(3, seed=5))[1]
    hit = set(ids.flatten().tolist())
    assert len(hit) == 6
    assert check.passed
    assert check.experts_unchecked == tuple(sorted(set(range(EXPERTS)) - hit))
    assert check.experts_hit == 6


def generator_after_tokens(tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    torch.randn(tokens, 32, generator=generator)
    return generator


@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(1, 1, 1), (7, 5, 3), (2, 8, 8), (50, 7, 2), (3, 100, 6)])
def test_covering_routing(tokens, experts, top_k):
    weights, ids = covering_routing(tokens, experts, top_k, generator=torch.Generator().manual_seed(1))
    assert ids.shape == weights.shape == (tokens, top_k)
    assert all(len(set(row)) == top_k for row in ids.tolist())
    assert len(set(ids.flatten().tolist())) >= min(experts, tokens * top_k)
    assert set(ids.flatten().tolist()) <= set(range(experts))
    torch.testing.assert_close(weights.sum(-1), torch.ones(tokens))


@pytest.mark.parametrize("top_k", [0, EXPERTS + 1, 10**30, 10**400])
def test_a_top_k_that_routes_nothing_or_too_much(path, tmp_path, top_k):
    with pytest.raises(CheckpointError, match=r"expected .* per token|per_tok: expected an integer of at most"):
        verify_layer(with_top_k(path, tmp_path, top_k), 0, **CPU)


def test_top_k_of_each_layer(tmp_path, capsys):
    write_checkpoint(
        tmp_path, hidden_size=32, moe_intermediate_size=16, n_routed_experts=[8, 4], num_experts_per_tok=2,
        num_hidden_layers=2,
    )  # fmt: skip
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_experts_per_tok": [6, 1]}))
    checkpoint = Checkpoint.open(tmp_path)
    checks = [verify_layer(checkpoint, layer, tokens=1, **CPU) for layer in (0, 1)]
    assert [(check.passed, check.experts_hit) for check in checks] == [(True, 6), (True, 1)]
    inspect.print_checkpoint(Terminal(None), inspect.collect_checkpoint(checkpoint, torch.device("cpu")))
    assert "top-k 1 to 6," in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("skipped", [-1, EXPERTS, 2**62])
def test_no_layer_passes_when_every_id_is_skipped(checkpoint, monkeypatch, skipped):
    def nowhere(tokens, num_experts, top_k, **_):
        return torch.ones(tokens, top_k), torch.full((tokens, top_k), skipped, dtype=torch.int64)

    monkeypatch.setattr(library, "covering_routing", nowhere)
    check = verify_layer(checkpoint, 0, **CPU)
    assert not check.passed
    assert check.problem == "no token was routed to an expert, so that nothing was checked"
    assert check.experts_hit == 0
    assert check.to_json()["passed"] is False


def test_no_layer_passes_when_all_weights_of_the_routing_are_zero(checkpoint, monkeypatch):
    def weightless(tokens, num_experts, top_k, **arguments):
        weights, ids = covering_routing(tokens, num_experts, top_k, **arguments)
        return torch.zeros_like(weights), ids

    monkeypatch.setattr(library, "covering_routing", weightless)
    check = verify_layer(checkpoint, 0, **CPU)
    assert check.problem == "the reference is zero everywhere, so that nothing was checked"


def test_nan_on_both_sides_does_not_pass(checkpoint, monkeypatch):
    moe = reference.moe_with_clamped_share
    forward = NVFP4Experts.forward

    def with_nan(value):
        value[0, 0] = math.nan
        return value

    def nan_reference(*args, **kwargs):
        result = moe(*args, **kwargs)
        return result._replace(output=with_nan(result.output))

    monkeypatch.setattr(reference, "moe_with_clamped_share", nan_reference)
    monkeypatch.setattr(NVFP4Experts, "forward", lambda *args: with_nan(forward(*args)))
    check = verify_layer(checkpoint, 0, **CPU)
    assert check.problem == "the reference has NaN or infinities, so that nothing was checked"
    assert check.to_json()["relative_l2"] is None


def test_one_wrong_expert_is_seen(checkpoint, monkeypatch):
    from_checkpoint = NVFP4Experts.from_checkpoint

    def one_wrong(*args, **kwargs):
        experts = from_checkpoint(*args, **kwargs)
        w13, w2 = experts.unpacked_weights()
        w2.data[17] ^= 8  # the sign of every second value
        return NVFP4Experts.from_weights(w13, w2, quant_config=experts.quant_config)

    monkeypatch.setattr(NVFP4Experts, "from_checkpoint", one_wrong)
    check = verify_layer(checkpoint, 0, **CPU)
    assert not check.passed
    assert check.problem == f"a relative error of {check.relative_l2:.2e}"
    assert check.relative_l2 > 0.01


def test_relative_error():
    ones = torch.ones(2, 2)
    assert relative_error(ones * 1.5, ones) == pytest.approx(0.5)
    assert relative_error(ones, torch.zeros(2, 2)) == math.inf
    assert relative_error(torch.zeros(2, 2), torch.zeros(2, 2)) == math.inf
    assert relative_error(torch.zeros(0, 2), torch.zeros(0, 2)) == math.inf
    for bad in (math.nan, math.inf):
        broken = torch.tensor([[1.0, bad]])
        assert relative_error(broken, broken) == math.inf
        assert relative_error(broken, torch.ones(1, 2)) == math.inf


def test_fp8_specification_of_a_layer(checkpoint):
    x = torch.randn(9, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    routing = covering_routing(9, EXPERTS, TOP_K, generator=torch.Generator().manual_seed(1))
    weights = checkpoint.experts(0)
    usual = library._references(checkpoint, 0, x, *routing, None)
    assert usual.specification is None
    expected = library._references(checkpoint, 0, x, *routing, "fp8")
    assert torch.equal(expected.output, usual.output)
    options = {"clamp_limit": checkpoint.gate(0).clamp_limit}
    w13 = weights.w13._replace(global_scale=weights.w13.global_scale.reshape(EXPERTS, -1).expand(-1, 2))
    assert torch.equal(expected.specification, reference_fp8.moe(x, w13, weights.w2, *routing, **options))
    assert 0.02 < relative_error(expected.specification, expected.output) < 0.1


@pytest.mark.parametrize(("limit", "least", "most"), [(10.0, 0.15, 0.3), (None, 0.0, 0.0)])
def test_fp8s_own_error_is_within_the_tolerance_of_the_demos_layers(limit, least, most, tmp_path):
    """Layers as ``torch-nvfp4 demo`` writes them, a fifth of whose values the limit clamps; and without a limit."""
    path = write_checkpoint(
        tmp_path, hidden_size=1024, moe_intermediate_size=512, n_routed_experts=4, num_experts_per_tok=2,
        num_hidden_layers=1, swiglu_limit=limit,
    )  # fmt: skip
    x = torch.randn(16, 1024, generator=torch.Generator().manual_seed(0)).bfloat16()
    routing = covering_routing(16, 4, 2, generator=torch.Generator().manual_seed(1))
    expected = library._references(Checkpoint.open(path), 0, x, *routing, "fp8")
    assert least <= expected.clamped_share <= most
    # The specification in the place of the kernel.
    errors = library._errors(expected.specification, expected, torch.bfloat16, 4)
    assert errors["problem"] is None
    assert errors["specification_l2"] == 0.0
    assert errors["relative_l2"] == errors["quantization_l2"]
    assert errors["tolerance"] == pytest.approx(0.06 + 0.1 * expected.clamped_share)
    assert (errors["relative_l2"] > 0.06) == (limit is not None)


def fp8_check(of_specification, error):
    output = torch.ones(2, 2, dtype=torch.float64)
    expected = library._Expected(output / (1 + error), 0.25, output / (1 + of_specification))
    errors = library._errors(output, expected, torch.bfloat16, 4)
    return library.LayerCheck(
        layer=3, backend="wgmma_fp8", gate="silu, clamp_limit 10", tokens=2, num_experts=4, experts_unchecked=(),
        clamped_share=0.25, seconds=0.0, input_quant="fp8", **errors,
    )  # fmt: skip


def test_a_kernel_at_fault_and_a_layer_that_fp8_does_not_suit(capsys):
    good, rough, wrong = fp8_check(0.01, 0.08), fp8_check(0.01, 0.09), fp8_check(0.021, 0.05)
    assert (good.passed, good.tolerance, good.specification_tolerance) == (True, 0.06 + 0.1 * 0.25, 0.02)
    assert good.quantization_l2 == pytest.approx(1.08 / 1.01 - 1)
    assert rough.problem == (
        "a relative error of 9.00e-02, which is FP8's own rounding of this layer: its specification is off by "
        "7.92e-02, and the kernel within 1.00e-02 of that; run it with activations in 16 bits"
    )
    assert wrong.problem == (
        "a relative error of 2.10e-02 against the specification of FP8 activations, where at most 0.02 is right: the "
        "kernel is at fault"
    )
    assert fp8_check(math.nan, math.nan).problem == "the reference has NaN or infinities, so that nothing was checked"
    print_checks(Terminal(None), [good])
    text = " ".join(capsys.readouterr().out.split())
    assert "rel. L2 tolerance to FP8 spec. tolerance" in text
    assert "8.00e-02 0.085 1.00e-02 0.02 ok" in text
    assert "1 layer within 0.085 of the fp64 reference and 0.02 of the specification of FP8 activations" in text
    with pytest.raises(typer.Exit) as left:
        print_checks(Terminal(None), [good, rough])
    assert left.value.exit_code == 1
    assert "expected an error of at most 0.085, got a relative error of 9.00e-02, which" in capsys.readouterr().err
    assert good.to_json()["specification_l2"] == pytest.approx(0.01)
    unknown = fp8_check(math.nan, math.nan).to_json()
    assert [unknown[name] for name in ("relative_l2", "specification_l2", "quantization_l2")] == [None] * 3


def test_steps_are_told(checkpoint):
    steps = []
    verify_layer(checkpoint, 0, tokens=1, tell=steps.append, **CPU)
    assert steps == ["loading layer 0", "running layer 0 on 1 tokens", "layer 0 in fp64"]
