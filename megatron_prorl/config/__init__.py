"""The run configuration: its schema, and loading with one-line errors. Imports neither torch, Megatron nor vLLM."""
