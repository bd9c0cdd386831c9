"""Rollouts: vLLM engines, their client, and the collector that fills a step's batch."""
