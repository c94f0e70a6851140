"""One request through vLLM's engine, behind this project's routes.

The engine samples; what a request may say, how its messages become tokens, and what its answer
looks like is decided here exactly as for the embedded server. Log-probs are those of the
distribution that was sampled from, ``softmax(logits / temperature)``: vLLM is started with
``--logprobs-mode processed_logprobs``.
"""

from __future__ import annotations

import asyncio
import logging
import math
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import HTTPException
from transformers import GenerationConfig

from cartridge_distill.cartridge.kv_shape import KvShape, text_config
from cartridge_distill.engines.vllm.catalogue import Catalogue, NoCartridge
from cartridge_distill.engines.vllm.options import CONNECTOR, Options
from cartridge_distill.engines.vllm.wanted import Wanted
from cartridge_distill.model.reading import read_tokenizer
from cartridge_distill.rollout.fingerprint import Completion
from cartridge_distill.server.answering import (
    Admitted,
    Answering,
    end_token_ids,
    without_truncation,
)
from cartridge_distill.server.cartridges import CartridgeRefused
from cartridge_distill.server.protocol import (
    AnyRequest,
    Job,
    Limits,
    Refused,
    TooLong,
    longest_text,
)
from cartridge_distill.server.rows import NewToken
from cartridge_distill.server.sampling import RequestSeeds
from cartridge_distill.util.errors import ConfigError

logger = logging.getLogger(__name__)

_LEAST_TEMPERATURE = 0.01
"""vLLM raises what is lower to this, without a word in the answer."""


@dataclass(frozen=True)
class _Behind(Admitted):
    """An admitted request with the cartridges that stand before its prompt."""

    wanted: Wanted | None


class VllmAnswers(Answering):
    """vLLM's engine behind the routes.

    Args:
        engine: vLLM's ``AsyncLLM``, as its HTTP server has it.
        config: its ``VllmConfig``.
        options: as the connector has them.

    Raises:
        ConfigError: a setting of vLLM's with which answers would not be what they say.
    """

    def __init__(self, engine: Any, config: Any, options: Options) -> None:
        _check_config(config)
        model = config.model_config
        self._engine = engine
        self._limit = int(model.max_model_len)
        self.model_name = options.model_name or model.served_model_name
        if isinstance(self.model_name, list):
            self.model_name = self.model_name[0]
        self.idle_s = options.idle_s
        self.tokenizer = without_truncation(read_tokenizer(model.tokenizer))
        most = min(options.max_tokens_per_request or self._limit, self._limit)
        vocabulary = text_config(model.hf_config).vocab_size
        self.limits = Limits(most, vocabulary, longest_text(self.tokenizer, most))
        self.end_ids = end_token_ids(_generation_config(model.model), self.tokenizer)
        self._catalogue = Catalogue(options, KvShape.of(model.hf_config))
        self._seeds = RequestSeeds(options.seed)
        # On a CPU a seeded request whose prompt is cut in pieces ends vLLM's engine.
        self._cuts_seeded = (
            config.scheduler_config.enable_chunked_prefill
            and config.device_config.device_type == "cpu"
        )
        self._answered: set[str] = set()

    @property
    def loaded_ids(self) -> list[str]:
        return sorted(self._answered)

    async def admit(self, request: AnyRequest, document: Sequence[int] = ()) -> Admitted:
        job = await self.read_job(request, document)
        if 0 < job.temperature < _LEAST_TEMPERATURE:
            raise Refused(
                f"temperature={job.temperature}: vLLM samples with {_LEAST_TEMPERATURE} at least; "
                "use 0 (greedy) or that"
            )
        if request.seed is not None and self._cuts_seeded:
            raise Refused(
                "seed: vLLM's engine for CPUs dies of a seeded request whose prompt it cuts in "
                "pieces; start the server with --no-enable-chunked-prefill, or leave it out"
            )
        wanted = None
        if job.cartridges:
            ids = [ref.id for ref in job.cartridges]
            try:  # reading and hashing files take time
                wanted = await asyncio.to_thread(self._catalogue.wanted, ids)
            except NoCartridge as error:
                raise CartridgeRefused(str(error)) from error
            prompt = len(job.prompt_ids)
            if wanted.tokens + prompt + job.max_new_tokens > self._limit:
                raise TooLong(prompt, job.max_new_tokens, self._limit - wanted.tokens)
        return _Behind(job, request.seed, wanted)

    async def compute(
        self,
        admitted: Admitted,
        on_token: Callable[[int, NewToken], None] | None = None,
        top_logprobs: int = 0,
    ) -> list[Completion]:
        assert isinstance(admitted, _Behind)
        job, ids = admitted.job, sorted(ref.id for ref in admitted.job.cartridges)
        seeds: list[int | None] = [None] * job.num_choices
        if admitted.seed is not None:
            drawn = self._seeds.generators(job.prompt_ids, ids, job.num_choices, admitted.seed)
            seeds = [generator.getrandbits(63) for generator in drawn]
        rows = [
            asyncio.create_task(self._row(admitted, index, seed, on_token, top_logprobs))
            for index, seed in enumerate(seeds)
        ]
        try:
            results = list(await asyncio.gather(*rows))
        except BaseException:
            for row in rows:
                row.cancel()  # vLLM takes a request out whose generator is left
            await asyncio.gather(*rows, return_exceptions=True)
            raise
        self._answered.update(ids)
        return results

    async def _row(
        self,
        admitted: _Behind,
        index: int,
        seed: int | None,
        on_token: Callable[[int, NewToken], None] | None,
        top_logprobs: int,
    ) -> Completion:
        job, wanted = admitted.job, admitted.wanted
        prompt = job.prompt_ids if wanted is None else wanted.prompt(job.prompt_ids)
        sampling = self._sampling(job, wanted, seed, top_logprobs)
        tokens: list[NewToken] = []
        reason, shared = None, 0
        try:
            outputs = self._engine.generate(
                {"prompt_token_ids": prompt}, sampling, f"cartridge-{uuid.uuid4().hex}"
            )
            async for output in outputs:
                [part] = output.outputs
                for new in _new_tokens(part, top_logprobs):
                    if not math.isfinite(new.logprob):
                        raise HTTPException(
                            400,
                            "the model's log-probs are not finite here: the cartridge's numbers "
                            "are too large for the served dtype",
                        )
                    tokens.append(new)
                    if on_token is not None:
                        on_token(index, new)
                reason = part.finish_reason
                shared = output.num_cached_tokens or 0
        except HTTPException:
            raise
        except Exception as error:  # vLLM's kinds of errors differ between its releases
            raise _as_http(error, self._engine) from error
        if reason not in ("stop", "length"):
            raise HTTPException(
                500, f"vLLM ended the request with {reason!r}; its own log says why"
            )
        return Completion(
            token_ids=[new.id for new in tokens],
            logprobs=[new.logprob for new in tokens],
            finish_reason=reason,
            shared_tokens=max(0, shared - (wanted.tokens if wanted is not None else 0)),
        )

    def _sampling(
        self, job: Job, wanted: Wanted | None, seed: int | None, top_logprobs: int
    ) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        extra = {} if wanted is None else {"kv_transfer_params": wanted.parameters()}
        return SamplingParams(
            max_tokens=job.max_new_tokens,
            temperature=job.temperature,
            seed=seed,
            stop=job.stop or None,
            include_stop_str_in_output=True,
            stop_token_ids=[] if job.ignore_eos else sorted(self.end_ids),
            ignore_eos=job.ignore_eos,
            logprobs=top_logprobs,
            detokenize=bool(job.stop),  # texts are made here
            skip_special_tokens=False,
            output_kind=RequestOutputKind.DELTA,
            extra_args=extra or None,
        )


def _new_tokens(part: Any, top_logprobs: int) -> list[NewToken]:
    """What an output of vLLM brings: ids, with the log-probs that it gives for each place."""
    found = []
    for token, place in zip(part.token_ids, part.logprobs or (), strict=True):
        ranked = sorted(place.items(), key=lambda item: -item[1].logprob)
        likeliest = [(int(id_), float(one.logprob)) for id_, one in ranked[:top_logprobs]]
        found.append(NewToken(int(token), float(place[token].logprob), likeliest))
    return found


def _as_http(error: Exception, engine: Any) -> HTTPException:
    """An error of vLLM's as HTTP: 400 for a request that it does not take."""
    if isinstance(error, ValueError):
        return HTTPException(400, f"vLLM refuses the request: {error}")
    if getattr(engine, "errored", False):
        return HTTPException(503, "vLLM's engine has died and is being ended; ask again")
    return HTTPException(500, f"vLLM failed: {type(error).__name__}: {error}")


def _generation_config(model: str) -> Any:
    try:
        return GenerationConfig.from_pretrained(model)
    except (OSError, ValueError):
        return None  # the model has no such file


def _check_config(config: Any) -> None:
    """Settings with which the answers would not be what they say.

    Raises:
        ConfigError: naming the setting.
    """
    model, transfer = config.model_config, config.kv_transfer_config
    if transfer is None or transfer.kv_connector != CONNECTOR:
        raise ConfigError(
            "this server has the front for cartridges and not their connector: what stands for a "
            "cartridge would be computed as text; fix: start it with the --kv-transfer-config that "
            "`cartridge-distill serve --engine vllm` prints"
        )
    if model.logprobs_mode != "processed_logprobs":
        raise ConfigError(
            f"--logprobs-mode {model.logprobs_mode}: answers promise the log-probs of what was "
            "sampled from; fix: say --logprobs-mode processed_logprobs"
        )
    if model.generation_config != "vllm":
        raise ConfigError(
            f"--generation-config {model.generation_config}: defaults of the model's own "
            "generation_config.json would change how requests are sampled; fix: say "
            "--generation-config vllm"
        )
