"""The client of one engine: generation on an event loop, control calls from any thread."""

from __future__ import annotations

import asyncio
import http.client
import json
import struct
import urllib.error
import urllib.request
from typing import Any

import aiohttp
import numpy as np

from megatron_prorl import heartbeat
from megatron_prorl.types import Completion

UNSYNCED = -1  # weight version of an engine that has its start model and no sync yet

# Seconds for which an idle connection is used again, and for which the server keeps it. A server that closes one at the
# moment a request is sent on it looks like an engine that died, so ours has to end first.
KEEP_ALIVE_SECONDS = 60
SERVER_KEEP_ALIVE_SECONDS = 300

_CORE_DIED = "EngineCore encountered an issue"  # vllm/v1/engine/exceptions.py, EngineDeadError

# Engines are on this machine or on the cluster's own network: never through a proxy of the environment.
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class EngineDied(ConnectionError):
    """No answer, or a lost connection; the request can go to another engine."""


class EngineRefused(RuntimeError):
    """The engine lives and answered with an error; the message is the engine's."""


class EngineClient:
    """One engine by its URL. Raises EngineDied when it does not answer and EngineRefused when it answers with an error.

    `token` is what the engine's server asks for (rollout/auth.py). `timeout_seconds` bounds every control call; a
    generation may take longer as long as the engine core gives a sign of life so often. `generate` belongs to one event
    loop, on which `close` ends it; the other calls block and may come from any thread.
    """

    def __init__(self, url: str, token: str, *, timeout_seconds: float = 600.0) -> None:
        self.url = url
        self._headers = {"Authorization": f"Bearer {token}"}
        self._timeout_seconds = timeout_seconds
        self._session: aiohttp.ClientSession | None = None

    async def generate(
        self,
        prompt_token_ids: list[int],
        *,
        n: int,
        temperature: float,
        top_p: float,
        max_tokens: int,
        seed: int | None = None,
    ) -> list[Completion]:
        """`n` responses to one prompt. Log-probs are of the distribution after temperature and top-p, in nats.

        With `seed` response i is drawn with seed + i, whatever else the engine does; without, with the engine's own.
        """
        body = {
            "prompt_token_ids": prompt_token_ids,
            "n": n,
            "temperature": temperature,
            "top_p": top_p,
            "max_tokens": max_tokens,
            "seed": seed,
        }
        answer = asyncio.create_task(self._ask("POST", "/rollouts", body))
        try:
            while not (await asyncio.wait({answer}, timeout=self._timeout_seconds))[0]:
                # The core answers this between two decoding steps: a busy one does, one that hangs does not.
                await self._ask("GET", "/weight_info", timeout_seconds=self._timeout_seconds)
            content = answer.result()
        finally:
            answer.cancel()
            await asyncio.gather(answer, return_exceptions=True)
        try:
            return parse_completions(content)
        except (ValueError, struct.error) as error:
            raise EngineDied(f"{self.url}: a broken answer ({error!r})") from error

    async def _ask(
        self, method: str, path: str, body: dict[str, Any] | None = None, *, timeout_seconds: float | None = None
    ) -> bytes:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEEP_ALIVE_SECONDS), headers=self._headers
            )
        timeout = aiohttp.ClientTimeout(total=timeout_seconds)
        try:
            with heartbeat.waiting("engine", self.url, path):
                async with self._session.request(method, self.url + path, json=body, timeout=timeout) as response:
                    content = await response.read()
        except TimeoutError as error:
            raise EngineDied(f"{self.url}: no sign of life within {timeout_seconds:g} s") from error
        except (aiohttp.ClientError, OSError) as error:
            raise EngineDied(f"{self.url}: {error!r}") from error
        if response.status != 200:
            raise _failure(self.url, response.status, content)
        return content

    async def close(self) -> None:
        """End the connections of `generate`."""
        if self._session:
            await self._session.close()
            self._session = None

    def is_healthy(self, *, timeout_seconds: float = 10.0) -> bool:
        """Whether the engine's own server answers and its core has not ended."""
        try:
            self._call("GET", "/health", timeout_seconds=timeout_seconds)
        except (EngineDied, EngineRefused):
            return False
        return True

    def core_answers(self, *, timeout_seconds: float) -> bool:
        """Whether the engine core, which does the work, gives a sign of life; a busy one does after a decoding step."""
        try:
            self._call("GET", "/weight_info", timeout_seconds=timeout_seconds)
        except (EngineDied, EngineRefused):
            return False
        return True

    def pause(self) -> None:
        """Let running requests end and start none until `resume`."""
        self._call("POST", "/pause?mode=wait")

    def resume(self) -> None:
        self._call("POST", "/resume")

    def reset_prefix_cache(self) -> None:
        """Forget key-value blocks of earlier prompts: they belong to the weights that computed them."""
        self._call("POST", "/reset_prefix_cache")

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self._call("POST", "/init_weight_transfer_engine", {"init_info": init_info})

    def start_weight_update(self) -> None:
        self._call("POST", "/start_weight_update")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        self._call("POST", "/update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self._call("POST", "/finish_weight_update", {"weight_version": weight_version})

    def weight_version(self) -> int:
        """Version of the engine's weights; UNSYNCED for the model that it started with."""
        return _version(self._call("GET", "/weight_info")["weight_version"])

    def set_weight_version(self, version: int) -> None:
        self._call("POST", "/update_weight_version", {"new_version": str(version)})

    def world_size(self) -> int:
        """Number of the engine's workers."""
        return self._call("GET", "/get_world_size")["world_size"]

    def score(self, token_ids: list[int]) -> list[float]:
        """Log-probs at temperature 1 of every token after the first, each given the tokens before it, in nats."""
        body = {"model": "policy", "prompt": token_ids, "max_tokens": 1, "prompt_logprobs": 0, "temperature": 0.0}
        rows = self._call("POST", "/v1/completions", body)["choices"][0]["prompt_logprobs"]
        return [row[str(token)]["logprob"] for row, token in zip(rows[1:], token_ids[1:], strict=True)]

    def _call(
        self, method: str, path: str, body: dict[str, Any] | None = None, *, timeout_seconds: float | None = None
    ) -> Any:
        request = urllib.request.Request(
            self.url + path,
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"Content-Type": "application/json"} | self._headers,
        )
        try:
            try:
                with (
                    heartbeat.waiting("engine", self.url, path),
                    _opener.open(request, timeout=timeout_seconds or self._timeout_seconds) as response,
                ):
                    content = response.read()
            except urllib.error.HTTPError as error:
                raise _failure(self.url + path, error.code, error.read()) from None
            return json.loads(content) if content else None
        except EngineDied:  # an OSError as well
            raise
        except (OSError, http.client.HTTPException, ValueError) as error:  # refused, reset, timed out, cut short
            raise EngineDied(f"{self.url}{path}: {error!r}") from error


def parse_completions(content: bytes) -> list[Completion]:
    """The answer of the route in rollout/route.py, which says what the bytes are. ValueError if they are not that."""
    (header_bytes,) = struct.unpack_from("<I", content)
    start = 4 + header_bytes
    header = json.loads(content[4:start])
    lengths = header["lengths"]
    middle = start + 4 * sum(lengths)
    all_ids = np.frombuffer(content[start:middle], dtype="<i4")
    all_logprobs = np.frombuffer(content[middle:], dtype="<f4")
    if not len(all_ids) == len(all_logprobs) == sum(lengths):
        raise ValueError(f"{len(all_ids)} token ids and {len(all_logprobs)} log-probs instead of {sum(lengths)}")
    completions = []
    end = 0
    for length, reason, versions in zip(lengths, header["finish_reasons"], header["weight_versions"], strict=True):
        begin, end = end, end + length
        if reason not in ("stop", "length"):
            raise EngineDied(f"the engine ended a response with reason {reason!r}")
        completions.append(
            Completion(
                token_ids=all_ids[begin:end],
                sampler_logprobs=all_logprobs[begin:end],
                finish_reason=reason,
                weight_version=min(map(_version, versions)),
            )
        )
    return completions


def _version(name: str) -> int:
    return UNSYNCED if name == "default" else int(name)


def _failure(where: str, status: int, content: bytes) -> EngineDied | EngineRefused:
    try:
        message = json.loads(content)["error"]
        message = message["message"] if isinstance(message, dict) else message
    except (ValueError, KeyError, TypeError):
        message = content.decode(errors="replace")[:500]
    kind = EngineDied if status == 503 or _CORE_DIED in message else EngineRefused
    return kind(f"{where}: HTTP {status}: {message}")
