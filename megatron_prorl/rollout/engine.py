"""vLLM engines as processes of the trainer: started, watched, restarted, and never left behind."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Literal

from megatron_prorl import heartbeat
from megatron_prorl.config.hf import head_dim, hf_folder, is_megatron_checkpoint
from megatron_prorl.config.schema import Config
from megatron_prorl.errors import UserError
from megatron_prorl.rollout.auth import MIDDLEWARE, TOKEN_VARIABLE
from megatron_prorl.rollout.client import SERVER_KEEP_ALIVE_SECONDS, EngineClient
from megatron_prorl.rollout.leftovers import remove_leftovers, scratch_folder
from megatron_prorl.rollout.plugin import PARENT_VARIABLE
from megatron_prorl.rollout.server import FORK_VARIABLE

logger = logging.getLogger(__name__)

LOOPBACK = "127.0.0.1"
STOP_SECONDS = 10.0  # between SIGTERM and SIGKILL
POLL_SECONDS = 0.1

# A trainer rank's place in its process group, which is not the engine's.
_TRAINER_VARIABLES = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}

_LIBRARY_FOLDERS = (f"{sys.prefix}/lib", "/usr/lib/*-linux-gnu", "/usr/lib64", "/usr/lib", "/usr/local/lib")
_LIBRARIES = {"libtcmalloc*.so.4": "Debian: libtcmalloc-minimal4", "libiomp5.so": "pip: intel-openmp"}

_CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)  # vllm/v1/attention/backends/cpu_attn.py
_SMALL_MODEL_BYTES = 64 * 2**20  # below, threads of one step wait for each other longer than they compute


@dataclass(frozen=True, slots=True)
class EngineAddress:
    """Where an engine is reached, the same over its restarts. The token is secret: in no file, log or command line."""

    index: int  # over all nodes
    url: str
    token: str = field(repr=False)
    host: str
    machine: str  # equal where processes can read each other's /proc

    def client(self, cfg: Config) -> EngineClient:
        return EngineClient(self.url, self.token, timeout_seconds=cfg.rollout.engines.request_timeout_seconds)


@dataclass(slots=True)
class _Engine:
    address: EngineAddress
    reserved: socket.socket  # keeps the port ours over restarts: bound, never listening
    process: subprocess.Popen[bytes] | None = None
    log: IO[bytes] | None = None
    started: float = 0.0  # Unix time
    num_starts: int = 0
    log_start: int = 0  # where the current process's part of the log begins, bytes


class EngineNotStarted(UserError):
    """An engine did not come up: a mistake, or a machine that was busy or ill, so that another attempt is worth it."""

    exit_code = 1


class EngineSupervisor:
    """Node `node`'s share of the `cfg.rollout.engines.count` engines on the model folder `model_path`, on this machine.

    Each has a log and an announcement (pid, url, host, start time) in `run_dir`/engines. They end with this process,
    however it ends. `start_step` is the step that the run goes on from. Raises UserError for what a user can fix: a
    taken port, a model that vLLM cannot load, too little memory. `restart` may be called from any thread; the rest
    belongs to one.
    """

    def __init__(
        self, cfg: Config, model_path: str | Path, run_dir: str | Path, *, node: int = 0, start_step: int = 0
    ) -> None:
        self._cfg = cfg
        self._model_path = str(model_path)
        self._folder = Path(run_dir) / "engines"
        self._device = engine_device(cfg)
        count = cfg.rollout.engines.count // cfg.parallel.nodes
        self._share = range(node * count, (node + 1) * count)
        self._start_step = start_step
        self._engines: list[_Engine] = []
        self._restarting = threading.Lock()
        self._stopped = False

    @property
    def addresses(self) -> list[EngineAddress]:
        """Of this node's engines, by index."""
        return [engine.address for engine in self._engines]

    def start(self) -> None:
        """Start every engine and return at once; `wait_ready` waits for them."""
        check_model(self._model_path, self._device)
        remove_leftovers()
        self._folder.mkdir(parents=True, exist_ok=True)
        first_port, host = self._cfg.rollout.engines.port, node_address(self._cfg)
        try:
            for index in self._share:
                reserved = reserve_port(first_port + index if first_port else 0, host)
                address = EngineAddress(
                    index=index,
                    url=f"http://{host}:{reserved.getsockname()[1]}",
                    token=secrets.token_urlsafe(32),
                    host=socket.gethostname(),
                    machine=_machine(),
                )
                engine = _Engine(address, reserved)
                self._engines.append(engine)
                self._start_one(engine)
        except BaseException:
            self.stop()
            raise

    def wait_ready(self) -> None:
        """Return when every engine answers. Raises UserError with its last error if one ends, or takes too long."""
        for engine in self._engines:
            self._wait_one(engine)

    def restart(self, indices: Iterable[int]) -> list[int]:
        """End those of `indices` that are this node's, start them again, and return them when they are ready.

        Whether they look alive or not: one that failed may hang, or be in the middle of a weight update. They come back
        with the weights of `model_path`: give them the current ones before they serve.
        """
        with self._restarting:
            ours = [engine for engine in self._engines if engine.address.index in set(indices)]
            for engine in ours:
                logger.warning("engine %d (%s) failed: restarting it", engine.address.index, engine.address.url)
                _end(engine, self._scratch(engine))
                self._start_one(engine)
            for engine in ours:
                self._wait_one(engine)
            return [engine.address.index for engine in ours]

    def stop(self) -> None:
        """End every engine; returns when no process of theirs is left, and none is started any more."""
        self._stopped = True  # ends a restart that another thread waits for
        with self._restarting:
            for engine in self._engines:
                if engine.process and engine.process.poll() is None:
                    engine.process.terminate()
            for engine in self._engines:
                _end(engine, self._scratch(engine), patience_seconds=STOP_SECONDS)
                engine.reserved.close()
                self._announcement(engine).unlink(missing_ok=True)
            self._engines.clear()
        remove_leftovers()

    def kill(self) -> None:
        """End every engine at once, from any thread: for a process that is to end while its main thread hangs."""
        self._stopped = True
        for engine in self._engines:
            if process := engine.process:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
            shutil.rmtree(self._scratch(engine), ignore_errors=True)

    def __enter__(self) -> EngineSupervisor:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _announcement(self, engine: _Engine) -> Path:
        return self._folder / f"engine-{engine.address.index}.json"

    def _log(self, engine: _Engine) -> Path:
        return self._folder / f"engine-{engine.address.index}.log"

    def _scratch(self, engine: _Engine) -> Path:
        return scratch_folder(engine.address.index)

    def _start_one(self, engine: _Engine) -> None:
        if self._stopped:
            raise RuntimeError("the engines are being stopped")
        address, log_path = engine.address, self._log(engine)
        engine.log = log_path.open("ab")
        engine.log_start = log_path.stat().st_size
        engine.started = time.time()
        inherited = {name: value for name, value in os.environ.items() if name not in _TRAINER_VARIABLES}
        place = address.index - self._share.start
        environment = inherited | engine_environment(self._cfg, self._device, self._model_path, place)
        scratch = self._scratch(engine)
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(mode=0o700)
        host, port = engine.reserved.getsockname()
        arguments = engine_arguments(
            self._cfg,
            self._device,
            model_path=self._model_path,
            host=host,
            port=port,
            seed=engine_seed(self._cfg.seed, address.index, self._start_step, engine.num_starts),
        )
        engine.num_starts += 1
        engine.process = subprocess.Popen(
            [sys.executable, "-m", "megatron_prorl.rollout.server", *arguments],
            env=environment | {"TMPDIR": str(scratch), TOKEN_VARIABLE: address.token},
            stdin=subprocess.DEVNULL,
            stdout=engine.log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is the trainer's, which ends its engines
        )
        _write_atomically(
            self._announcement(engine),
            {
                "pid": engine.process.pid,
                "url": address.url,
                "host": address.host,
                "started": engine.started,
                "num_starts": engine.num_starts,
            },
        )

    def _wait_one(self, engine: _Engine) -> None:
        """Return when our process serves: nobody else's server takes our token, and a process that ended serves not."""
        index, client = engine.address.index, engine.address.client(self._cfg)
        limit = self._cfg.rollout.engines.startup_timeout_seconds
        assert engine.process
        while True:
            healthy = client.is_healthy(timeout_seconds=2.0)
            if engine.process.poll() is not None:
                raise EngineNotStarted(f"engine {index} did not start: {self._last_error(engine)}")
            if healthy:
                break
            if self._stopped:
                raise RuntimeError("the engines are being stopped")
            if time.time() > engine.started + limit:
                raise EngineNotStarted(
                    f"engine {index} did not start within {limit:g} s "
                    f"(rollout.engines.startup_timeout_seconds); see {self._log(engine)}"
                )
            heartbeat.beat()  # this wait has a limit of its own
            time.sleep(POLL_SECONDS)
        logger.info("engine %d serves on %s after %.1f s", index, engine.address.url, time.time() - engine.started)

    def _last_error(self, engine: _Engine) -> str:
        path = self._log(engine)
        with path.open("rb") as log:
            log.seek(engine.log_start)
            text = log.read().decode(errors="replace")
        return f"{last_error(text)} (see {path})"


def node_address(cfg: Config) -> str:
    """The address at which this node's engines are reached: the loopback of a single node, else the one from which this
    node reaches the first, as torchrun names it."""
    if cfg.parallel.nodes == 1:
        return LOOPBACK
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((os.environ["MASTER_ADDR"], 9))  # of a datagram socket: nothing is sent
        return probe.getsockname()[0]


def check_one_machine(addresses: list[EngineAddress]) -> None:
    """Raise UserError unless all engines run where rank 0 does: on the CPU they read the weights from its memory."""
    for address in addresses:
        if address.machine != addresses[0].machine:
            raise UserError(
                f"parallel.nodes: on the CPU the engines take the weights from the first node's memory, but engine "
                f"{address.index} is on {address.host}, not on {addresses[0].host}; use one node, or device cuda"
            )


def _machine() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip() + os.readlink("/proc/self/ns/pid")


def engine_seed(seed: int, index: int, start_step: int, num_starts: int) -> int:
    """Of an engine's sampler: another one for every engine, and after every restart of the engine or of the run."""
    text = f"{seed} {index} {start_step} {num_starts}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1


def engine_device(cfg: Config) -> Literal["cuda", "cpu"]:
    """What the engines run on: as configured, or CUDA if there is any."""
    if cfg.device != "auto":
        return cfg.device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def engine_arguments(
    cfg: Config, device: Literal["cuda", "cpu"], *, model_path: str, host: str, port: int, seed: int
) -> list[str]:
    """The command line of vLLM's server for one engine. Raises UserError for what an engine cannot do."""
    rollout, engines = cfg.rollout, cfg.rollout.engines
    max_tokens = rollout.max_prompt_tokens + rollout.max_response_tokens
    options = {
        "model": str(hf_folder(model_path)),
        "served-model-name": "policy",
        "host": host,
        "port": str(port),
        "seed": str(seed),
        "dtype": {"bf16": "bfloat16", "fp32": "float32"}[cfg.model.dtype],
        "max-model-len": str(max_tokens),
        "max-num-seqs": str(engines.max_running),
        "max-num-batched-tokens": str(max(8192, max_tokens)),
        "logprobs-mode": "processed_logprobs",  # of the distribution that was sampled from, temperature included
        "generation-config": "vllm",  # sampling defaults come from us, not from the model folder
        "weight-transfer-config": json.dumps({"backend": transfer_backend(cfg, device)}),
        "uvicorn-log-level": "warning",
        "middleware": MIDDLEWARE,
    }
    if is_megatron_checkpoint(Path(model_path)):
        options["load-format"] = "dummy"  # the first sync brings the weights
    flags = ["enable-prefix-caching", "disable-log-stats", "disable-uvicorn-access-log", "disable-fastapi-docs"]
    if device == "cpu":
        if engines.tensor > 1:
            raise UserError("rollout.engines.tensor: must be 1 on the CPU; raise rollout.engines.count instead")
        options |= {
            "kv-cache-memory-bytes": str(int(engines.kv_cache_gib * 2**30)),
            "gpu-memory-utilization": "0.01",  # unused beside an explicit cache size, but checked against free memory
            "distributed-executor-backend": "uni",  # model and scheduler in one process: no copies, no third process
        }
        flags.append("enforce-eager")  # compiling costs 40 s at start; see docs/decisions/0002-vllm-on-cpu.md
        # After a part of a prompt vLLM rewinds a seeded request's generator, which ends the engine: a CPU's cannot.
        flags.append("no-enable-chunked-prefill")
    else:
        options |= {
            "tensor-parallel-size": str(engines.tensor),
            "gpu-memory-utilization": str(engines.gpu_memory_fraction),
        }
    return [part for key, value in options.items() for part in (f"--{key}", value)] + [f"--{flag}" for flag in flags]


def transfer_backend(cfg: Config, device: Literal["cuda", "cpu"]) -> str:
    """vLLM's name of the weight transfer: shared memory, CUDA IPC on shared GPUs, NCCL between separate ones."""
    if device == "cpu":
        return "shm"
    return "ipc" if cfg.rollout.engines.placement == "shared" else "nccl"


def engine_environment(cfg: Config, device: Literal["cuda", "cpu"], model_path: str, place: int) -> dict[str, str]:
    """What the environment of the `place`-th engine of a node adds to the trainer's, besides its secret."""
    environment = {
        PARENT_VARIABLE: str(os.getpid()),
        "VLLM_SERVER_DEV_MODE": "1",  # the routes for weight updates
        "VLLM_PLUGINS": "megatron_prorl",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": str(SERVER_KEEP_ALIVE_SECONDS),
        "HF_HUB_OFFLINE": "1",  # the model is a folder
        "TOKENIZERS_PARALLELISM": "false",
    }
    if device == "cuda":
        return environment | {
            "CUDA_VISIBLE_DEVICES": ",".join(_engine_gpus(cfg, place)),
            "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # CUDA IPC handles travel pickled
        }
    libraries = preload_libraries()
    if any("libiomp" in path for path in libraries):
        environment[FORK_VARIABLE] = "1"
    return environment | {
        "LD_PRELOAD": ":".join(libraries),
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # allows the "uni" executor on a CPU; the engine core keeps its process
        "TORCH_COMPILE_DISABLE": "1",  # else the sampler compiles a small function in the first step
        "OMP_NUM_THREADS": str(cpu_threads(model_path, cfg.rollout.engines.count // cfg.parallel.nodes)),
        "KMP_BLOCKTIME": "1",  # ms that an idle OpenMP thread spins: trainer and engines share the cores
    }


def _engine_gpus(cfg: Config, place: int) -> list[str]:
    """The GPUs of the `place`-th engine of a node, by the names that CUDA_VISIBLE_DEVICES gives them."""
    engines = cfg.rollout.engines
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible:
        names = visible.split(",")
    else:
        import torch

        names = [str(i) for i in range(torch.cuda.device_count())]
    first = place * engines.tensor + (cfg.parallel.ranks_per_node if engines.placement == "separate" else 0)
    if first + engines.tensor > len(names):
        raise UserError(
            f"rollout.engines: engine {place} of {socket.gethostname()} needs GPU {first + engines.tensor - 1}, but "
            f"the node shows {len(names)}; lower count or tensor"
        )
    if engines.placement == "shared" and first + engines.tensor > cfg.parallel.ranks_per_node:
        raise UserError(
            f"rollout.engines: engine {place} of a node shares GPU {first + engines.tensor - 1} with no trainer rank "
            f"(parallel.ranks_per_node is {cfg.parallel.ranks_per_node}); lower count or tensor, or set placement"
        )
    return names[first : first + engines.tensor]


def cpu_threads(model_path: str, num_engines: int) -> int:
    """OpenMP threads of one engine: its share of the cores, but one for a small model, where they would mostly wait."""
    weights = [path for kind in ("*.safetensors", "*.distcp") for path in Path(model_path).glob(kind)]
    if sum(path.stat().st_size for path in weights) < _SMALL_MODEL_BYTES:
        return 1
    return max(1, len(os.sched_getaffinity(0)) // num_engines)


def preload_libraries() -> list[str]:
    """tcmalloc and Intel's OpenMP, without which vLLM on a CPU is several times slower; says so where one is absent."""
    found = []
    for pattern, package in _LIBRARIES.items():
        paths = [path for folder in _LIBRARY_FOLDERS for path in sorted(glob.glob(f"{folder}/{pattern}"))]
        paths = [path for path in paths if "debug" not in path]
        if paths:
            found.append(paths[0])
        else:
            logger.warning("%s not found: rollouts on the CPU will be several times slower (%s)", pattern, package)
    return found


def check_model(model_path: str, device: Literal["cuda", "cpu"]) -> None:
    """Raise UserError for a model folder that no engine can serve."""
    try:
        hf = json.loads((hf_folder(model_path) / "config.json").read_text())
        head_size = head_dim(hf)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"model.path: {model_path} is no Hugging Face model folder ({error!r})") from None
    if device == "cpu" and head_size not in _CPU_HEAD_SIZES:
        raise UserError(f"model.path: vLLM on a CPU has no attention for head size {head_size}; use {_CPU_HEAD_SIZES}")


def reserve_port(port: int, host: str = LOOPBACK) -> socket.socket:
    """A socket bound to `port` (0: a free one) that never listens: an engine still can.

    Nobody who takes any free port gets this one. Whoever asks for just this one (another run with the same
    configuration) can, until an engine listens; the second to listen fails. Raises UserError if somebody listens now.
    """
    reserved = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        reserved.bind((host, port))
    except OSError as error:
        reserved.close()
        raise UserError(f"rollout.engines.port: port {port} is taken ({error.strerror}); give another, or 0") from None
    return reserved


# An exception's last line, or the line with which pydantic says what is wrong with a value.
_ERROR = re.compile(r"(?:^|\s)((?:\w+\.)*\w*(?:Error|Exception): .+|Value error, .+?)(?: \[type=.*)?$")
_SECOND_HAND = ("Engine core initialization failed", "Engine core proc", "See root cause above")


def last_error(log: str) -> str:
    """The line of an engine's log that says why it ended: the last exception that is not about another one."""
    errors = [match[1].strip() for line in log.splitlines() if (match := _ERROR.search(line))]
    first_hand = [error for error in errors if not any(words in error for words in _SECOND_HAND)]
    if first_hand:
        return first_hand[-1]
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    return lines[-1] if lines else "it ended without a word"


def _end(engine: _Engine, scratch: Path, *, patience_seconds: float = 0.0) -> None:
    """Kill the engine's whole process group after `patience_seconds`, and reap the server."""
    process = engine.process
    if process is None:
        return
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(timeout=patience_seconds)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    shutil.rmtree(scratch, ignore_errors=True)
    if engine.log:
        engine.log.close()
    engine.process = engine.log = None


def _write_atomically(path: Path, content: dict[str, object]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content))
    partial.replace(path)
