"""Prolonged reinforcement learning for Qwen models on Megatron-Core and vLLM."""

__version__ = "0.1.0"
