"""What a run writes for people: metrics, the rollout ledger, the live display, pictures. Only rank 0 uses it."""
