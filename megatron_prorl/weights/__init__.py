"""Weights between Hugging Face folders, Megatron shards and vLLM engines, by one name table per model family."""
