"""What a cartridge of the served model must look like."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import AutoConfig

from cartridge_distill.cartridge.kv_shape import PAGE_TOKENS, KvShape
from cartridge_distill.sync.upload import Description
from cartridge_distill.util.errors import CartridgeFormatError, ConfigError


@dataclass(frozen=True)
class ModelShape:
    """What a cartridge must agree with: the base model's name, and the numbers of its KV."""

    base_model: str
    kv: KvShape

    @classmethod
    def of(cls, model: str, base_model: str) -> ModelShape:
        """Reads the model's configuration; its weights are not loaded.

        Args:
            model: folder or hub id.
            base_model: what uploads call it.

        Raises:
            ConfigError: there is no such model.
        """
        try:
            config = AutoConfig.from_pretrained(model)
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"model {model!r} has no readable configuration: {error}; fix: name the "
                "folder of a model, or a hub id"
            ) from error
        return cls(base_model, KvShape.of(config))

    def max_upload_bytes(self, max_tokens: int) -> int:
        """Bytes of the largest upload that can be right: float32, and a header."""
        return max_tokens * self.kv.numbers * 4 + 2**21

    def check(self, header: Description, max_tokens: int) -> None:
        """Refuses what this model, or the real server, could not use.

        Raises:
            CartridgeFormatError: naming the number that differs.
        """
        found = header.kv
        for what, got, want in (
            ("base_model", header.base_model, self.base_model),
            ("num_layers", found.num_layers, self.kv.num_layers),
            ("kv_heads", found.kv_heads, self.kv.kv_heads),
            ("head_dim", found.head_dim, self.kv.head_dim),
        ):
            if got != want:
                raise CartridgeFormatError(
                    f"the upload has {what}={got!r}, this server has {want!r}: the cartridge was "
                    "made for another model"
                )
        if header.num_tokens > max_tokens:
            raise CartridgeFormatError(
                f"num_tokens={header.num_tokens} is over this server's max_cartridge_tokens="
                f"{max_tokens}"
            )
        if header.num_tokens % PAGE_TOKENS:
            raise CartridgeFormatError(
                f"num_tokens={header.num_tokens} is no multiple of {PAGE_TOKENS}; the real "
                "server's model process dies of it"
            )
