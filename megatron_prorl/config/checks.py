"""What one field cannot know: options that must fit each other, and the model folder. Each problem is one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_prorl.config.hf import hf_folder, is_megatron_checkpoint, num_experts

if TYPE_CHECKING:
    from megatron_prorl.config.schema import Config

_SIZES = (  # of config.json
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "num_hidden_layers",
    "max_position_embeddings",
    "vocab_size",
)
_FILE_KEYS = ("path", "validation_path")
_LONGEST_HEADER_BYTES = 100_000_000  # safetensors reads no longer one


def config_problems(cfg: Config) -> list[str]:
    """Options that contradict each other, as `where: what is wrong`; empty when all is well."""
    return [
        *_layout_problems(cfg),
        *_precision_problems(cfg),
        *_batch_problems(cfg),
        *_data_problems(cfg),
        *_algorithm_problems(cfg),
        *_reset_problems(cfg),
        *_stage_problems(cfg),
        *_engine_problems(cfg),
        *_verifier_problems(cfg),
        *_stall_problems(cfg),
    ]


def _layout_problems(cfg: Config) -> list[str]:
    p = cfg.parallel
    problems = []
    ranks_a_replica = p.tensor * p.pipeline * p.context
    if p.world_size % ranks_a_replica:
        problems.append(
            f"parallel: tensor*pipeline*context = {p.tensor}*{p.pipeline}*{p.context} = {ranks_a_replica} "
            f"does not divide world size {p.world_size}"
        )
    ranks_with_all_experts = p.tensor * p.pipeline * p.expert
    if p.expert > 1 and p.world_size % ranks_with_all_experts:
        problems.append(
            f"parallel: tensor*pipeline*expert = {p.tensor}*{p.pipeline}*{p.expert} = {ranks_with_all_experts} "
            f"does not divide world size {p.world_size}"
        )
    if p.sequence and p.tensor == 1:
        problems.append("parallel.sequence: needs parallel.tensor above 1")
    if p.context > 1:
        # Packed sequences would have to be split in 2 * context chunks each, which `batching` does not do.
        problems.append(
            f"parallel.context: {p.context} is not supported yet; set it to 1 and raise tensor with sequence"
        )
    return problems


def _precision_problems(cfg: Config) -> list[str]:
    model = cfg.model
    problems = []
    if model.layers == "transformer_engine" and cfg.device == "cpu":
        problems.append("model.layers: transformer_engine needs device cuda; use local or auto")
    if model.fp8 != "none":
        if model.layers == "local" or cfg.device == "cpu":
            problems.append(
                f"model.fp8: {model.fp8} needs device cuda and model.layers transformer_engine or auto, "
                f"got device {cfg.device} and layers {model.layers}"
            )
        if model.dtype != "bf16":
            problems.append(f"model.fp8: {model.fp8} needs model.dtype bf16, got {model.dtype}")
    return problems


def _batch_problems(cfg: Config) -> list[str]:
    rollout, updates, data_ranks = cfg.rollout, cfg.optimizer.updates_per_step, cfg.parallel.data
    problems = []
    samples = rollout.prompts_per_step * rollout.rollouts_per_prompt
    if rollout.prompts_per_step % updates:
        problems.append(
            f"optimizer.updates_per_step: {updates} does not divide "
            f"rollout.prompts_per_step = {rollout.prompts_per_step}"
        )
    elif samples // updates < data_ranks:
        problems.append(
            "rollout: prompts_per_step*rollouts_per_prompt/updates_per_step = "
            f"{rollout.prompts_per_step}*{rollout.rollouts_per_prompt}/{updates} = {samples // updates} samples "
            f"an update, fewer than the {data_ranks} data-parallel ranks"
        )
    longest = rollout.max_prompt_tokens + rollout.max_response_tokens
    if cfg.batching.tokens_per_microbatch < longest:
        problems.append(
            f"batching.tokens_per_microbatch: {cfg.batching.tokens_per_microbatch} is below the longest sample, "
            "rollout.max_prompt_tokens + rollout.max_response_tokens = "
            f"{rollout.max_prompt_tokens} + {rollout.max_response_tokens} = {longest}"
        )
    return problems


def _data_problems(cfg: Config) -> list[str]:
    data, problems = cfg.data, []
    num_parts = len(data.tasks) + len(data.sources)
    if not num_parts:
        problems.append("data: has neither tasks nor sources; name something to train on")
    elif not any(data.weights):
        problems.append("data: every weight is 0; give something to train on a weight")
    if data.validation_problems < num_parts:
        problems.append(
            f"data.validation_problems: {data.validation_problems} is below "
            f"the number of data.tasks and data.sources, {num_parts}"
        )
    problems += [
        f"{where}: {path}: a problem file ends with .jsonl or .parquet"
        for where, path in _problem_files(cfg)
        if Path(path).suffix not in (".jsonl", ".parquet")
    ]
    return problems


def file_problems(cfg: Config) -> list[str]:
    """Problem files that are not there."""
    return [f"{where}: {path}: no such file" for where, path in _problem_files(cfg) if not Path(path).is_file()]


def _problem_files(cfg: Config) -> list[tuple[str, str]]:
    """(option, path)"""
    sources = enumerate(cfg.data.sources)
    named = [(f"data.sources.{i}.{key}", getattr(source, key)) for i, source in sources for key in _FILE_KEYS]
    return [(where, path) for where, path in named if path is not None]


def _algorithm_problems(cfg: Config) -> list[str]:
    algorithm = cfg.algorithm
    problems = []
    low, high = algorithm.correction.window
    if low >= high:
        problems.append(f"algorithm.correction: low = {low:g} must be below high = {high:g}")
    overlong = algorithm.shaping.overlong_buffer_tokens
    if overlong >= cfg.rollout.max_response_tokens:
        problems.append(
            f"algorithm.shaping.overlong_buffer_tokens: {overlong} must be below rollout.max_response_tokens = "
            f"{cfg.rollout.max_response_tokens}"
        )
    return problems


def _reset_problems(cfg: Config) -> list[str]:
    reset, problems = cfg.reset, []
    triggers = {
        "reset.every_steps": reset.every_steps,
        "reset.plateau": reset.plateau,
        "reset.drop": reset.drop,
    }
    if cfg.algorithm.kl.coefficient == 0:
        problems += [
            f"{name}: resets a reference model that algorithm.kl.coefficient = 0 does not use; "
            f"leave {name} out or set the coefficient above 0"
            for name, wanted in triggers.items()
            if wanted
        ]
    if 0 < reset.every_steps < reset.cooldown_steps:
        problems.append(
            f"reset.every_steps: {reset.every_steps} is below reset.cooldown_steps = {reset.cooldown_steps}"
        )
    validated = cfg.validation.every_steps
    problems += [
        f"{name}: needs validations; set validation.every_steps above 0"
        for name in ("reset.plateau", "reset.drop")
        if triggers[name] and not validated
    ]
    for name in ("entropy", "kl", "truncation", "mismatch"):
        guard = getattr(cfg.guards, name)
        if guard and guard.low is None and guard.high is None:
            problems.append(f"guards.{name}: has neither low nor high, so it never acts; give one")
        if guard and guard.low is not None and guard.high is not None and guard.low >= guard.high:
            problems.append(f"guards.{name}: low = {guard.low:g} must be below high = {guard.high:g}")
    if cfg.guards.kl and cfg.algorithm.kl.coefficient == 0:
        problems.append(
            "guards.kl: there is no reference with algorithm.kl.coefficient = 0; raise it or drop the guard"
        )
    for name in ("non_finite", "silent_domain"):
        guard = getattr(cfg.guards, name)
        if guard and (guard.low is not None or guard.high is not None):
            problems.append(f"guards.{name}: takes neither low nor high")
    return problems


def _stage_problems(cfg: Config) -> list[str]:
    from megatron_prorl.config.load import ConfigError  # which imports the schema, which imports this
    from megatron_prorl.config.stages import stage_config

    problems = []
    names = [stage.name for stage in cfg.stages]
    problems += [f"stages.{i}.name: {name} is there twice" for i, name in enumerate(names) if name in names[:i]]
    for i in range(len(cfg.stages)):
        try:
            coefficient = stage_config(cfg, i).algorithm.kl.coefficient
        except ConfigError as error:
            problems += error.problems
            continue
        if (coefficient > 0) != (cfg.algorithm.kl.coefficient > 0):
            problems.append(
                f"stages.{i}.options.algorithm.kl.coefficient: {coefficient:g} beside {cfg.algorithm.kl.coefficient:g} "
                "outside: either all stages have a reference model or none has"
            )
    return problems


def _engine_problems(cfg: Config) -> list[str]:
    engines = cfg.rollout.engines
    problems = []
    last_port = engines.port + engines.count - 1
    if engines.port and last_port > 65535:
        problems.append(
            f"rollout.engines: port + count - 1 = {engines.port} + {engines.count} - 1 = {last_port} is above 65535"
        )
    layout = cfg.parallel
    if engines.count % layout.nodes:
        problems.append(f"rollout.engines.count: parallel.nodes = {layout.nodes} does not divide {engines.count}")
        return problems
    gpus = engines.count // layout.nodes * engines.tensor
    if cfg.device == "cuda" and engines.placement == "shared" and gpus > layout.ranks_per_node:
        problems.append(
            f"rollout.engines: count/nodes*tensor = {engines.count}/{layout.nodes}*{engines.tensor} = {gpus} GPUs a "
            f"node are to be shared with {layout.ranks_per_node} trainer ranks (parallel.ranks_per_node)"
        )
    if cfg.device == "cpu" and engines.tensor > 1:
        problems.append("rollout.engines.tensor: must be 1 on the CPU; raise rollout.engines.count instead")
    return problems


def _verifier_problems(cfg: Config) -> list[str]:
    code, verdict = cfg.tasks.code, cfg.verifier.timeout_seconds
    tests = code.timeout_seconds
    if tests >= verdict:
        return [f"tasks.code.timeout_seconds: {tests:g} must be below verifier.timeout_seconds, which is {verdict:g}"]
    if "cpp" in code.languages and tests + code.compile_seconds >= verdict:
        return [
            f"tasks.code.compile_seconds: with timeout_seconds {tests + code.compile_seconds:g}, must be below "
            f"verifier.timeout_seconds, which is {verdict:g}"
        ]
    return []


def _stall_problems(cfg: Config) -> list[str]:
    """An engine or verifier that hangs is to be noticed, and replaced, before the run counts as stalled."""
    request, verdict = cfg.rollout.engines.request_timeout_seconds, cfg.verifier.timeout_seconds
    if not cfg.stall_seconds or cfg.stall_seconds > max(2 * request, verdict):
        return []
    return [
        f"stall_seconds: {cfg.stall_seconds:g} must be above 2*rollout.engines.request_timeout_seconds = "
        f"{2 * request:g} and verifier.timeout_seconds = {verdict:g}"
    ]


def model_problems(cfg: Config) -> list[str]:
    """What the model folder refuses: missing files, a layout that does not divide it, sequences too long for it."""
    path = Path(cfg.model.path)
    if not path.is_dir():
        return [
            f"model.path: {path}: no such folder; give one with config.json, *.safetensors and tokenizer.json, or a "
            "Megatron checkpoint"
        ]
    folder = hf_folder(path)
    missing = [name for name in ("config.json", "tokenizer.json") if not (folder / name).is_file()]
    if not is_megatron_checkpoint(path) and not any(path.glob("*.safetensors")):
        missing.append("*.safetensors")
    if missing:
        return [f"model.path: {folder} has no {', no '.join(missing)}"]
    try:
        hf, last_token_id = _read_sizes(folder / "config.json"), _read_last_token_id(folder / "tokenizer.json")
        for weights in sorted(path.glob("*.safetensors")):
            _check_safetensors(weights)
    except ValueError as error:
        return [f"model.path: {error}"]
    except OSError as error:
        return [f"model.path: cannot read {error.filename}: {(error.strerror or str(error)).lower()}"]
    problems = _shape_problems(cfg, hf)
    if last_token_id >= hf["vocab_size"]:
        problems.append(
            f"model.path: {folder / 'tokenizer.json'} has token id {last_token_id}, but the model's vocab_size is "
            f"{hf['vocab_size']}; they are not of the same model"
        )
    return problems


def _read_json_object(path: Path) -> dict[str, Any]:
    """Raises ValueError, naming the file, where it holds anything else."""
    try:
        document = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(document, dict):
        raise ValueError(f"{path} is not a JSON object")
    return document


def _read_sizes(path: Path) -> dict[str, int]:
    """The sizes in config.json, and num_experts, 0 in a dense model. Raises ValueError.

    Key-value heads are as many as heads where it does not say.
    """
    hf = _read_json_object(path)
    if hf.get("num_key_value_heads") is None:
        hf["num_key_value_heads"] = hf.get("num_attention_heads")
    hf["num_experts"] = num_experts(hf)
    sizes = _SIZES if hf["num_experts"] == 0 else (*_SIZES, "num_experts", "moe_intermediate_size")
    for key in sizes:
        if key not in hf:
            raise ValueError(f"{path} has no {key}")
        if type(hf[key]) is not int or hf[key] < 1:
            raise ValueError(f"{path}: {key}: expected a whole number above 0, got {json.dumps(hf[key])}")
    return {key: hf[key] for key in (*sizes, "num_experts")}


def _read_last_token_id(path: Path) -> int:
    """The highest id in tokenizer.json's vocabulary and added tokens. Raises ValueError where it has none."""
    tokenizer = _read_json_object(path)
    try:
        pieces = tokenizer["model"]["vocab"]
        ids = list(pieces.values()) if isinstance(pieces, dict) else list(range(len(pieces)))  # Unigram: [piece, score]
        return int(max(ids + [token["id"] for token in tokenizer.get("added_tokens") or []]))
    except (ValueError, LookupError, TypeError, AttributeError):
        raise ValueError(f"{path} has no model.vocab with token ids; is it a tokenizer's?") from None


def _check_safetensors(path: Path) -> None:
    """Compare what its header says with the file's size: eight bytes with the header's length, JSON, then the tensors.

    Raises ValueError, naming the file, where they do not fit.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        try:
            if header_bytes > size:
                raise ValueError("its header is cut off")
            if header_bytes > _LONGEST_HEADER_BYTES:
                raise ValueError(f"a header of {header_bytes} bytes")
            header = json.loads(file.read(header_bytes))
            ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
            expected = 8 + header_bytes + max(ends, default=0)
            if size != expected:
                raise ValueError(f"{size} of {expected} bytes")
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: not a complete safetensors file ({error}); copy it again") from None


def _shape_problems(cfg: Config, hf: dict[str, int]) -> list[str]:
    heads, experts = hf["num_attention_heads"], hf["num_experts"]
    divisions = [
        ("parallel.tensor", cfg.parallel.tensor, "attention heads", heads),
        ("parallel.tensor", cfg.parallel.tensor, "key-value heads", hf["num_key_value_heads"]),
        ("parallel.tensor", cfg.parallel.tensor, "feed-forward columns", hf["intermediate_size"]),
        ("parallel.pipeline", cfg.parallel.pipeline, "layers", hf["num_hidden_layers"]),
        ("rollout.engines.tensor", cfg.rollout.engines.tensor, "attention heads", heads),
    ]
    if experts:
        divisions += [
            ("parallel.tensor", cfg.parallel.tensor, "feed-forward columns of an expert", hf["moe_intermediate_size"]),
            ("parallel.expert", cfg.parallel.expert, "experts", experts),
        ]
    problems = [
        f"{option}: {parts} does not divide the model's {whole} {name}"
        for option, parts, name, whole in divisions
        if whole % parts
    ]
    if not experts and cfg.parallel.expert > 1:
        problems.append(f"parallel.expert: {cfg.parallel.expert}, but the model has no experts; set it to 1")
    if experts and cfg.parallel.tensor > 1 and not cfg.parallel.sequence:
        problems.append(
            f"parallel.sequence: must be true to train a model with experts at parallel.tensor = {cfg.parallel.tensor}"
        )
    if cfg.parallel.expert > 1 and not cfg.optimizer.distributed:
        problems.append(f"optimizer.distributed: must be true with parallel.expert = {cfg.parallel.expert}")
    prompt, response = cfg.rollout.max_prompt_tokens, cfg.rollout.max_response_tokens
    if prompt + response > hf["max_position_embeddings"]:
        problems.append(
            f"rollout: max_prompt_tokens + max_response_tokens = {prompt} + {response} = {prompt + response} "
            f"is above the model's max_position_embeddings = {hf['max_position_embeddings']}"
        )
    return problems
