"""Peak memory of log-probs + entropy, forward and backward: the chunked function against plain log_softmax.

    python benchmarks/logprob_memory.py [--tokens 8192] [--vocab 151936] [--hidden 256] [--chunk-tokens 256]

Each measurement is a process of its own: the highest resident memory (ru_maxrss) less what it held before, i.e. without
torch, hidden states and weight. float32 on the CPU, one thread; the loss uses both results. The hidden size is small so
that the gradient of the head's weight (the same in both) hides nothing. Plain log_softmax at full length is run only if
the machine has the memory; otherwise it counts with a lower bound: the three float32 tensors of T x V that it must hold
at once in backward (log-probs, their exp, one gradient). Exits with 1 if the ratio at full length is above 1/10.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

GIB = 2**30
PLAIN_COPIES = 6  # T x V tensors that a run of plain log_softmax may need at once, used only to decide whether it fits


def measure(kind: str, tokens: int, vocab: int, hidden: int, chunk_tokens: int) -> dict[str, float]:
    """Run in a process of its own: peak bytes above the start, and seconds."""
    import torch

    from megatron_prorl.policy.logprob import logprobs_and_entropy

    torch.set_num_threads(1)
    torch.manual_seed(0)
    hidden_TH = torch.randn(tokens, hidden, requires_grad=True)
    weight_VH = torch.randn(vocab, hidden, requires_grad=True)
    targets_T = torch.randint(vocab, (tokens,))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    if kind == "plain":
        logits_TV = (hidden_TH @ weight_VH.T).div_(1.2)
        logprobs_TV = logits_TV.log_softmax(1)
        del logits_TV
        logprobs_T = logprobs_TV.gather(1, targets_T[:, None]).squeeze(1)
        entropy_T = -(logprobs_TV.exp() * logprobs_TV).sum(1)
    else:
        logprobs_T, entropy_T = logprobs_and_entropy(
            hidden_TH, weight_VH, targets_T, temperature=1.2, chunk_tokens=chunk_tokens, vocab_size=vocab
        )
    (logprobs_T.sum() + 0.01 * entropy_T.sum()).backward()
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"bytes": (peak - before) * 1024, "seconds": seconds}


def run(kind: str, tokens: int, options: argparse.Namespace) -> float:
    """Measure in a new process, print a row, return the bytes."""
    # A child inherits its parent's ru_maxrss, so this process must stay small: it never imports torch.
    command = [sys.executable, __file__, "--measure", kind, "--tokens", str(tokens), "--vocab", str(options.vocab)]
    command += ["--hidden", str(options.hidden), "--chunk-tokens", str(options.chunk_tokens)]
    row = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    print(f"{kind:8} {tokens:6} tokens   {row['bytes'] / GIB:6.2f} GiB   {row['seconds']:6.1f} s", flush=True)
    return row["bytes"]


def available_bytes() -> int:
    with open("/proc/meminfo") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--chunk-tokens", type=int, default=256)
    parser.add_argument("--measure", choices=["plain", "chunked"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options.tokens, options.vocab, options.hidden, options.chunk_tokens)))
        return 0

    print(f"vocabulary {options.vocab}, hidden size {options.hidden}, {options.chunk_tokens} tokens a chunk, float32")
    copy_bytes = options.tokens * options.vocab * 4
    chunked = run("chunked", options.tokens, options)
    if PLAIN_COPIES * copy_bytes < available_bytes():
        plain, how = run("plain", options.tokens, options), "measured"
    else:
        quarter = options.tokens // 4
        ratio = run("chunked", quarter, options) / run("plain", quarter, options)
        print(f"both measured at {quarter} tokens: ratio 1/{1 / ratio:.1f}")
        plain, how = 3.0 * copy_bytes, f"lower bound; running it needs some {PLAIN_COPIES * copy_bytes / GIB:.0f} GiB"
    print(f"plain at {options.tokens} tokens: {plain / GIB:.2f} GiB ({how})")
    print(f"ratio at {options.tokens} tokens: 1/{plain / chunked:.1f}")
    return 0 if chunked <= plain / 10 else 1


if __name__ == "__main__":
    sys.exit(main())
