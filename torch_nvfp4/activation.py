"""The former name of ``torch_nvfp4.gate``."""

from torch_nvfp4.gate import Activation, check_gate, gate_error, gated_activation, parse_activation

__all__ = ["Activation", "check_gate", "gate_error", "gated_activation", "parse_activation"]
