"""The run configuration: every option, its unit and its range. Imports neither torch, Megatron nor vLLM."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from megatron_prorl.config.checks import config_problems

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
NonEmpty = Annotated[str, Field(min_length=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class ModelConfig(Section):
    path: NonEmpty = Field(description="Hugging Face model folder: config.json, safetensors, tokenizer")
    dtype: Literal["bf16", "fp32"] = Field("bf16", description="dtype of the weights and of the forward pass")
    layers: Literal["auto", "local", "transformer_engine"] = Field(
        "auto", description="Megatron layer spec; auto is transformer_engine on CUDA, local on the CPU"
    )
    fp8: Literal["none", "hybrid", "e4m3"] = Field("none", description="Transformer Engine FP8 recipe for the layers")
    recompute: Literal["none", "selective", "full"] = Field("none", description="activation recomputation")


class ParallelConfig(Section):
    nodes: Positive = 1
    ranks_per_node: Positive = Field(1, description="trainer processes a node, one a GPU")
    tensor: Positive = 1
    pipeline: Positive = 1
    context: Positive = 1
    expert: Positive = Field(1, description="expert parallelism, over data-parallel ranks, of a mixture of experts")
    sequence: bool = Field(False, description="sequence parallelism inside the tensor-parallel group")

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node

    @property
    def data(self) -> int:
        return self.world_size // (self.tensor * self.pipeline * self.context)


class TaskConfig(Section):
    task: str = Field(description="Reasoning Gym task name")
    weight: float = Field(1.0, ge=0, description="share of the mix, relative to the other tasks and sources")
    level: NonNegative | None = Field(
        None, description="step of the task's curriculum in Reasoning Gym, which sets params; those given go before"
    )
    params: dict[str, Any] = Field(default_factory=dict, description="passed to the task's dataset")


class SourceConfig(Section):
    path: NonEmpty = Field(description="problem file, .jsonl or .parquet; docs/data.md has its schema")
    weight: float = Field(1.0, ge=0, description="share of the mix, relative to the other tasks and sources")
    validation_path: NonEmpty | None = Field(
        None, description="problem file to hold problems out of; without it they are taken out of `path`"
    )


class DataConfig(Section):
    tasks: list[TaskConfig] = Field(default_factory=list, description="Reasoning Gym tasks to train on")
    sources: list[SourceConfig] = Field(default_factory=list, description="problem files to train on")
    validation_problems: Positive = Field(
        64, description="held-out problems, shared out evenly over the tasks and sources"
    )
    system_prompt: str = Field("", description="of the problems of `tasks`; those of `sources` bring their own")

    @property
    def weights(self) -> list[float]:
        """Of the tasks, then of the sources."""
        return [task.weight for task in self.tasks] + [source.weight for source in self.sources]


class EngineConfig(Section):
    count: Positive = Field(1, description="vLLM engines, each a server process of its own")
    tensor: Positive = Field(1, description="tensor parallelism inside an engine")
    placement: Literal["shared", "separate"] = Field(
        "shared", description="on the trainer's GPUs, or on GPUs of their own"
    )
    port: NonNegative = Field(0, description="first port; 0 takes free ones")
    kv_cache_gib: float = Field(1.0, gt=0, description="key-value cache of one engine on the CPU, GiB")
    gpu_memory_fraction: float = Field(0.5, gt=0, le=0.95, description="share of GPU memory an engine may take")
    max_running: Positive = Field(256, description="sequences an engine decodes at once")
    startup_timeout_seconds: float = Field(300.0, gt=0)
    request_timeout_seconds: float = Field(
        600.0,
        gt=0,
        description="an engine that gives no sign of life for so long is restarted; others take its requests",
    )


class RolloutConfig(Section):
    prompts_per_step: Positive = Field(description="P: groups a step learns from")
    rollouts_per_prompt: int = Field(ge=2, description="G: responses a prompt")
    max_prompt_tokens: Positive
    max_response_tokens: Positive
    temperature: float = Field(1.0, gt=0)
    dynamic_sampling: bool = Field(True, description="drop groups whose rewards are all equal and draw others")
    draw_limit: float = Field(
        4.0, ge=1, description="at most draw_limit * prompts_per_step problems a step; then the batch stays smaller"
    )
    engines: EngineConfig = EngineConfig()


class VerifierConfig(Section):
    workers: Positive = Field(2, description="verifier processes")
    timeout_seconds: float = Field(
        10.0, gt=0, description="one verdict's limit; then its worker is killed and the score is 0"
    )


class CodeConfig(Section):
    isolation: Literal["auto", "required"] = Field(
        "auto", description="of solutions; required refuses to verify code where the kernel gives no namespaces"
    )
    timeout_seconds: float = Field(5.0, gt=0, description="wall time of all tests of one solution together")
    memory_mib: int = Field(1024, ge=256, description="address space of a solution, MiB")
    languages: list[Literal["python", "cpp"]] = Field(
        ["python"],
        min_length=1,
        description="that solutions may be in; cpp needs g++ and a kernel that gives namespaces",
    )
    compile_seconds: float = Field(10.0, gt=0, description="wall time of compiling a solution, not in timeout_seconds")


class TasksConfig(Section):
    code: CodeConfig = CodeConfig()


class KLConfig(Section):
    coefficient: float = Field(1e-4, ge=0, description="beta; 0 needs no reference model")
    estimator: Literal["k1", "k2", "k3"] = "k2"
    unbiased: bool = Field(False, description="weight the estimate by the policy's importance ratio")
    log_ratio_clamp: float | None = Field(
        None, gt=0, description="clamp log(policy / reference) to plus or minus this, nats"
    )


# The window in which each correction's source leaves rho as it is.
CORRECTION_WINDOWS = {
    "none": (0.0, 2.0),  # corrects nothing: for the metric correction/outside_window
    "tis": (0.0, 2.0),  # Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training"
    "icepop": (0.5, 5.0),  # arXiv:2510.18855
    "seq_mask": (0.999, 1.002),  # ProRL v2.1, of the geometric mean over a sequence
}


class CorrectionConfig(Section):
    """Correction for sampler != trainer, with rho = exp(trainer - sampler log-prob).

    A bound that is not given is that of `kind` in CORRECTION_WINDOWS.
    """

    kind: Literal["none", "tis", "icepop", "seq_mask"] = "tis"
    low: float | None = Field(None, ge=0, description="lower end of the window for rho")
    high: float | None = Field(None, gt=0, description="upper end of the window for rho")

    @property
    def window(self) -> tuple[float, float]:
        low, high = CORRECTION_WINDOWS[self.kind]
        return low if self.low is None else self.low, high if self.high is None else self.high


class ShapingConfig(Section):
    """Reward shaping by length; the paper does not state the numbers of its own penalties."""

    overlong_buffer_tokens: NonNegative = Field(
        0, description="DAPO soft overlong punishment: the penalty grows over the last so many tokens; 0 is off"
    )
    overlong_penalty: float = Field(1.0, ge=0, description="penalty at the full length")
    cosine_penalty: float = Field(
        0.0, ge=0, description="ProRL v2 cosine length penalty: grows with the length to this at the full length"
    )
    unterminated_penalty: float = Field(
        0.0, ge=0, description="subtracted from the reward of a response without an end token ('stop properly')"
    )


class AlgorithmConfig(Section):
    advantage: Literal["grpo", "reinforce_pp_baseline"] = "grpo"
    clip_low: float = Field(0.2, ge=0, lt=1, description="ratio is clipped at 1 - clip_low")
    clip_high: float = Field(0.4, ge=0, description="ratio is clipped at 1 + clip_high")
    kl: KLConfig = KLConfig()
    correction: CorrectionConfig = CorrectionConfig()
    shaping: ShapingConfig = ShapingConfig()
    entropy_coefficient: float = Field(0.0, ge=0, description="bonus for the policy's entropy")


class OptimizerConfig(Section):
    learning_rate: float = Field(2e-6, gt=0)
    warmup_updates: NonNegative = Field(0, description="linear warm-up from 0 over so many updates, then constant")
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.999, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.0, ge=0)
    grad_clip: float = Field(1.0, gt=0, description="global gradient norm is clipped to this")
    updates_per_step: Positive = Field(
        4, description="minibatches (optimizer updates) a step; must divide prompts_per_step"
    )
    distributed: bool = Field(True, description="shard optimizer state over data-parallel ranks")


class BatchingConfig(Section):
    tokens_per_microbatch: Positive = Field(
        16384, description="token budget of one packed microbatch on one data-parallel rank"
    )
    logprob_chunk_tokens: Positive = Field(1024, description="tokens whose logits exist at once")


class PlateauConfig(Section):
    patience: Positive = Field(description="validations in a row without a better one")
    min_delta: float = Field(0.0, ge=0, description="by how much a better one is better")


class DropConfig(Section):
    by: float = Field(gt=0, description="how far below the best since the last event")
    patience: Positive = Field(1, description="validations in a row that are so low")


class ResetConfig(Section):
    """When the reference is reset besides by guards and by hand, and how; arXiv:2505.24864, section 3.3."""

    every_steps: NonNegative = Field(0, description="reset the reference every so many steps; 0 never")
    plateau: PlateauConfig | None = Field(None, description="reset when validation stagnates")
    drop: DropConfig | None = Field(None, description="reset when validation degrades")
    score: str = Field(
        "validation/reward",
        pattern="^validation/",
        description="metric by which validations compare: validation/reward, validation/<task> or "
        "validation/domain/<domain>",
    )
    cooldown_steps: NonNegative = Field(0, description="no reset but one by hand within so many steps of the last")
    target: Literal["current", "best"] = Field(
        "current", description="what policy and reference become: the policy as it is, or the best checkpoint's"
    )
    optimizer: Literal["clear", "keep"] = "clear"
    warmup_updates: NonNegative | None = Field(
        None, description="warm-up after a reset; by default that of the optimizer where it is cleared, else none"
    )


class GuardConfig(Section):
    low: float | None = Field(None, description="the guard acts below this")
    high: float | None = Field(None, description="the guard acts above this")
    steps: Positive = Field(1, description="steps in a row before it acts")
    action: Literal["warn", "reset", "rollback", "stop"] = Field(
        "warn", description="rollback: to the last checkpoint before these steps, without their problems"
    )


class GuardsConfig(Section):
    """What is watched after every step; a guard that is not given is off."""

    entropy: GuardConfig | None = Field(None, description="policy/entropy, nats a token")
    kl: GuardConfig | None = Field(None, description="policy/kl_reference, nats a token")
    truncation: GuardConfig | None = Field(None, description="rollout/truncated_fraction")
    mismatch: GuardConfig | None = Field(None, description="mismatch/logprob_diff_mean, nats")
    non_finite: GuardConfig | None = Field(
        GuardConfig(steps=3, action="stop"),
        description="loss or gradient norm NaN or infinite (such updates are skipped)",
    )
    silent_domain: GuardConfig | None = Field(
        GuardConfig(steps=50, action="warn"), description="a domain, or the whole step, without any reward"
    )
    max_rollbacks: Positive = Field(
        3, description="in a row, without getting as far as another checkpoint; the next one stops the run"
    )


class StageConfig(Section):
    """One of a plan's stages, which ends after `steps`, on a trigger, or by `prorl advance`."""

    name: NonEmpty
    steps: Positive | None = Field(None, description="length at most; without it and ends_on_trigger: until told")
    ends_on_trigger: bool = Field(False, description="what would reset the reference ends the stage instead")
    reset: Literal["none", "clear", "keep"] = Field(
        "none", description="begin with a reset that clears or keeps the optimizer"
    )
    options: dict[str, Any] = Field(
        default_factory=dict,
        description="options of this stage, as rollout.rollouts_per_prompt: 32; over the file's own",
    )


class ValidationConfig(Section):
    every_steps: NonNegative = Field(10, description="0 validates only before the first and after the last step")
    samples: Positive = Field(4, description="responses a held-out problem")
    temperature: float = Field(0.6, gt=0)
    top_p: float = Field(0.95, gt=0, le=1)


class CheckpointConfig(Section):
    every_steps: Positive = 10
    keep: Positive = Field(2, description="how many of the newest stay on disk; the best and those of resets do too")
    keep_every_steps: NonNegative = Field(0, description="checkpoints of every so many steps stay too; 0: none")


class WandbConfig(Section):
    project: str
    name: str | None = None
    mode: Literal["online", "offline"] = "online"


class TrackingConfig(Section):
    tensorboard: bool = True
    wandb: WandbConfig | None = None


class Config(Section):
    run_dir: NonEmpty = Field(description="everything a run writes; the same folder resumes it")
    steps: Positive = Field(description="steps of the whole run; one step is one collection and its updates")
    seed: NonNegative = 0
    device: Literal["auto", "cuda", "cpu"] = "auto"
    stall_seconds: float = Field(
        1800.0, ge=0, description="a run in which nothing moves for so long ends, to be started again; 0: it never does"
    )
    model: ModelConfig
    parallel: ParallelConfig = ParallelConfig()
    data: DataConfig
    rollout: RolloutConfig
    verifier: VerifierConfig = VerifierConfig()
    tasks: TasksConfig = TasksConfig()
    algorithm: AlgorithmConfig = AlgorithmConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    batching: BatchingConfig = BatchingConfig()
    reset: ResetConfig = ResetConfig()
    guards: GuardsConfig = GuardsConfig()
    stages: list[StageConfig] = Field(default_factory=list, description="the run's stages, in turn; none: it is one")
    validation: ValidationConfig = ValidationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _options_fit_each_other(self) -> Config:
        problems = config_problems(self)
        if problems:
            raise PydanticCustomError("problems", "{text}", {"text": "; ".join(problems), "problems": problems})
        return self
