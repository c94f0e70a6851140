"""Cartridges over vLLM's ``LLM``, without a server: a notebook, a script, a batch.

>>> llm = CartridgeLLM("MODEL", {"anna": "runs/anna/cartridge"})
>>> llm.ask("anna", "Which medicine does the patient take?")
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cartridge_distill.cartridge.hub import pull
from cartridge_distill.cartridge.hub_id import is_hub_id
from cartridge_distill.cartridge.kv_shape import KvShape
from cartridge_distill.engines.vllm.catalogue import Catalogue
from cartridge_distill.engines.vllm.launch import CPU_CACHE_BYTES
from cartridge_distill.engines.vllm.options import Options
from cartridge_distill.engines.vllm.versions import installed
from cartridge_distill.engines.vllm.wanted import check_request
from cartridge_distill.model.prompts import render_alone, render_prompt
from cartridge_distill.model.reading import read_tokenizer
from cartridge_distill.server.answering import without_truncation


def place_of(source: str | Path) -> str:
    """The absolute path of a cartridge; one of the Hub is fetched and checked.

    Raises:
        HubError: the Hub does not give it.
    """
    path = Path(source).expanduser()
    if not path.exists() and is_hub_id(str(source)):
        path = pull(str(source))
    return str(path.resolve())


class CartridgeLLM:
    """vLLM's ``LLM`` with cartridges by name.

    Args:
        model: folder or hub id.
        cartridges: file, folder or hub id of each, by its name.
        vllm_options: further arguments of vLLM's ``LLM``, as they are. On a CPU keys and values
            get 4 GiB, unless one of them says otherwise.

    Attributes:
        llm: vLLM's own object.

    Raises:
        ConfigError: vLLM is not installed, or is an unknown version.
    """

    def __init__(
        self, model: str, cartridges: Mapping[str, str | Path], **vllm_options: Any
    ) -> None:
        is_cpu = installed().is_cpu
        from vllm import LLM
        from vllm.config import KVTransferConfig

        options = Options(cartridges={name: place_of(p) for name, p in cartridges.items()})
        vllm_options.setdefault("generation_config", "vllm")
        vllm_options.setdefault("logprobs_mode", "processed_logprobs")
        if is_cpu and "gpu_memory_utilization" not in vllm_options:
            vllm_options.setdefault("kv_cache_memory_bytes", CPU_CACHE_BYTES)
        self.llm = LLM(
            model=model,
            kv_transfer_config=KVTransferConfig(**options.transfer_config()),
            **vllm_options,
        )
        config = self.llm.llm_engine.vllm_config.model_config.hf_config
        self._catalogue = Catalogue(options, KvShape.of(config))
        self._tokenizer = without_truncation(read_tokenizer(model))

    def ask(
        self, cartridge: str | None, message: str, max_tokens: int = 256, temperature: float = 0.0
    ) -> str:
        """The answer to one message of a user, as text.

        Args:
            cartridge: name of a cartridge; None asks the bare model.

        Raises:
            NoCartridge: no cartridge of that name can be served.
        """
        from vllm import SamplingParams

        messages = [{"role": "user", "content": message}]
        render = render_alone if cartridge is None else render_prompt
        prompt = render(self._tokenizer, messages)
        sampling = SamplingParams(max_tokens=max_tokens, temperature=temperature)
        [output] = self.generate([] if cartridge is None else [cartridge], [prompt], sampling)
        return str(output.outputs[0].text)

    def generate(
        self, cartridges: Sequence[str], prompts: Sequence[Sequence[int]], sampling: Any
    ) -> list[Any]:
        """vLLM's outputs for prompts behind some cartridges, which are joined by name.

        Args:
            cartridges: names; none for the bare model.
            prompts: token ids; no begin-of-text token follows a cartridge.
            sampling: vLLM's ``SamplingParams``; its ``extra_args`` are set here.

        Raises:
            NoCartridge: a cartridge cannot be served.
            Misused: a parameter would compute or count the cartridge's placeholders.
        """
        if cartridges:
            wanted = self._catalogue.wanted(cartridges)
            prompts = [wanted.prompt(prompt) for prompt in prompts]
            for prompt in prompts:
                check_request(wanted, prompt, sampling)
            sampling = sampling.clone()
            sampling.extra_args = {"kv_transfer_params": wanted.parameters()}
        asked = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        done: list[Any] = self.llm.generate(asked, sampling, use_tqdm=False)
        return done
