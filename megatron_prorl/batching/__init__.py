"""Samples to balanced packed microbatches."""
