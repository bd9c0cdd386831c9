"""The algorithm as pure functions of tensors and numbers: no model, no engine, no process group.

Per-token quantities are one-dimensional over T packed tokens and line up with `PackedBatch.targets_T`; log-probs are
in nats after temperature. Whose they are: `policy_` the weights being trained (with gradient), `trainer_` the
trainer's before the step's first update, `sampler_` the engine's, `reference_` the frozen reference's. Every loss term
and every metric is a *share*: a sum over this microbatch's trained tokens divided by the token count of the whole
minibatch, so shares of microbatches and of data-parallel ranks are combined by adding (keys that end in `_max`: by the
maximum).
"""
