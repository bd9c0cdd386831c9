"""The policy: device and layout, model, log-probs, optimizer, scoring and updates. Everything here is collective."""

import warnings

# Megatron-Core warns in six places that Transformer Engine and Apex are missing: a supported state.
# `init_device` says in one line when the configuration needs them.
warnings.filterwarnings("ignore", message="(Transformer Engine and )?Apex (is|are) not installed")
