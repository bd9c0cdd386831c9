"""Checkpoints and references of a run: torch.distributed checkpoints in folders that appear complete or not at all."""
