"""Whether a Megatron checkpoint is the model in a Hugging Face folder: every tensor, and the logits of both."""

from __future__ import annotations

import itertools
import json
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_prorl import comm
from megatron_prorl.checkpoint.sharded import load_model_state, model_state, read_folder
from megatron_prorl.config.hf import read_hf_config
from megatron_prorl.config.schema import Config, ModelConfig, OptimizerConfig, ParallelConfig
from megatron_prorl.errors import UserError
from megatron_prorl.launch.local import end_with_launcher, launch_ranks, report_user_error
from megatron_prorl.policy.device import init_device, shutdown_device
from megatron_prorl.policy.model import build_model
from megatron_prorl.weights.checksum import checksum
from megatron_prorl.weights.convert import MegatronTensors, hf_files
from megatron_prorl.weights.hf import HfTensors, check_tensors, same_bits
from megatron_prorl.weights.tables import hf_shapes

SEQUENCES, TOKENS = 4, 64
TOLERANCE = 1e-4  # of the largest logit, or of 1: what another order of float32 sums makes of a deep model


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """What was found; logits in float32 on the same random tokens."""

    tensors: int
    different_tensors: list[str]  # Hugging Face names
    digest: str  # CRC-32 over the checkpoint's tensors, in the order of the Hugging Face names' table
    tokens: int
    max_abs_logit: float
    max_abs_diff: float
    top1_agreement: float  # share of the tokens

    @property
    def same(self) -> bool:
        return not self.different_tensors and self.max_abs_diff <= TOLERANCE * max(1.0, self.max_abs_logit)


def verify(
    hf_dir: str | Path, megatron_dir: str | Path, *, tensor: int = 1, pipeline: int = 1, as_json: bool = False
) -> bool:
    """Compare, print what was found, and return whether it is the same model; Megatron computes on tensor * pipeline
    ranks of this machine.

    A tensor that the checkpoint has in another dtype is compared after the same rounding, and so are the logits. Raises
    UserError if either side is incomplete, or if their tensors differ in name or shape.
    """
    hf_dir, megatron_dir = Path(hf_dir), Path(megatron_dir)
    hf = read_hf_config(hf_files(megatron_dir))
    for option, parts, heads in (
        ("--tensor", tensor, "num_key_value_heads"),
        ("--pipeline", pipeline, "num_hidden_layers"),
    ):
        if parts < 1 or hf[heads] % parts:
            raise UserError(f"{option}: {parts} does not divide the model's {heads} = {hf[heads]}")
    tensors = HfTensors(hf_dir)
    hf_of_folder = read_hf_config(hf_dir)
    check_tensors(tensors, hf_of_folder)
    ours, theirs = hf_shapes(hf), hf_shapes(hf_of_folder)
    if odd := [name for name in (ours | theirs) if ours.get(name) != theirs.get(name)]:
        name = odd[0]
        raise UserError(
            f"{megatron_dir} is not the model in {hf_dir}: {name} has shape {ours.get(name)} there and "
            f"{theirs.get(name)} here (None: is absent), and {len(odd) - 1} more tensors differ so"
        )
    stored = MegatronTensors(megatron_dir, hf)
    stored.check_committed()
    different, digest = [], 0
    for name, values in stored.tensors():
        digest = checksum(torch.tensor([digest, checksum(values)]))
        if not same_bits(tensors.slice(name)[:].to(values.dtype), values):
            different.append(name)

    token_ids = torch.randint(
        hf["vocab_size"],
        (SEQUENCES, min(TOKENS, hf["max_position_embeddings"])),
        generator=torch.Generator().manual_seed(0),
    )
    logits = _megatron_logits(megatron_dir, token_ids, tensor, pipeline)
    expected = _hf_logits(hf_dir, token_ids, stored.dtype or torch.float32)
    found = Comparison(
        tensors=len(stored.specs),
        different_tensors=different,
        digest=f"{digest:08x}",
        tokens=token_ids.numel(),
        max_abs_logit=expected.abs().max().item(),
        max_abs_diff=(expected - logits).abs().max().item(),
        top1_agreement=(expected.argmax(1) == logits.argmax(1)).float().mean().item(),
    )
    if as_json:
        finite = {name: None if value != value else value for name, value in asdict(found).items()}
        print(json.dumps(finite | {"same": found.same}, indent=1), flush=True)
    else:
        print(_table(found), flush=True)
    return found.same


@torch.no_grad()
def _hf_logits(hf_dir: Path, token_ids: Tensor, dtype: torch.dtype) -> Tensor:
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(hf_dir, dtype=dtype).float().eval()
    return torch.cat([model(row[None]).logits[0] for row in token_ids])


def _megatron_logits(folder: Path, token_ids: Tensor, tensor: int, pipeline: int) -> Tensor:
    """Logits [tokens, vocabulary] of all sequences end to end, computed on ranks of their own."""
    with tempfile.TemporaryDirectory(prefix="prorl-verify-") as scratch:
        torch.save(token_ids, f"{scratch}/token_ids.pt")
        command = ["-W", "ignore", "-m", __name__, str(folder), scratch, str(tensor), str(pipeline)]
        if launch_ranks(command, num_ranks=tensor * pipeline):
            raise UserError(f"{folder}: loading it on {tensor * pipeline} ranks failed")
        return torch.load(f"{scratch}/logits.pt")


def _model_config(tensor: int, pipeline: int) -> Config:
    """What building a float32 model on the CPU asks of a config, and nothing else."""
    return Config.model_construct(  # type: ignore[call-arg]
        device="cpu",
        seed=0,
        model=ModelConfig(path=".", dtype="fp32", layers="local"),
        parallel=ParallelConfig(ranks_per_node=tensor * pipeline, tensor=tensor, pipeline=pipeline),
        optimizer=OptimizerConfig(),
    )


@torch.no_grad()
def _rank_main(folder: Path, scratch: Path, tensor: int, pipeline: int) -> None:
    """One of the ranks: its part of the model on all sequences, packed; rank 0 saves the logits of all."""
    token_ids = torch.load(scratch / "token_ids.pt")
    cfg, hf = _model_config(tensor, pipeline), read_hf_config(hf_files(folder))
    device = init_device(cfg)
    comm.init_control_group()
    chunks = build_model(hf, cfg, device, trainable=False)
    load_model_state(chunks, read_folder(folder, model_state(chunks)))
    num_sequences, length = token_ids.shape
    cu_seqlens = torch.arange(0, num_sequences * length + 1, length, dtype=torch.int32)
    inputs = {
        "input_ids": token_ids.reshape(1, -1),
        "position_ids": torch.arange(length).repeat(num_sequences)[None],
        "attention_mask": None,
        "packed_seq_params": PackedSeqParams(
            qkv_format="thd", cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens, max_seqlen_q=length,
            max_seqlen_kv=length,
        ),
    }  # fmt: skip

    def forward_step(data: Iterator[dict[str, Any]], model: torch.nn.Module) -> tuple[Tensor, Callable]:
        def logits(hidden_T1H: Tensor, non_loss_data: bool) -> Tensor:
            return hidden_T1H.squeeze(1) @ model.head_weight().T  # type: ignore[operator]

        return model(**next(data)), logits

    shards = get_forward_backward_func()(
        forward_step_func=forward_step, data_iterator=iter([inputs]), model=chunks, num_microbatches=1, seq_length=1,
        micro_batch_size=1, forward_only=True, collect_non_loss_data=True,
    )  # fmt: skip
    mine = [(parallel_state.get_tensor_model_parallel_rank(), shard) for shard in shards]
    by_rank = dict(itertools.chain.from_iterable(comm.gather(mine)))
    if comm.is_rank_zero():
        logits = torch.cat([by_rank[rank] for rank in sorted(by_rank)], dim=1)[:, : hf["vocab_size"]]
        torch.save(logits.clone(), scratch / "logits.pt")
    shutdown_device()


def _table(found: Comparison) -> str:
    lines = [
        f"tensors        {found.tensors - len(found.different_tensors)} of {found.tensors} bit-identical"
        f" (digest {found.digest})",
        *(f"               different: {name}" for name in found.different_tensors),
        f"logits         at most {found.max_abs_diff:.3g} apart on {found.tokens} tokens, the largest is "
        f"{found.max_abs_logit:.3g}",
        f"top-1          the same on {found.top1_agreement:.1%}",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    end_with_launcher()
    try:
        _rank_main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
    except UserError as problem:
        report_user_error(problem)
        sys.exit(2)
