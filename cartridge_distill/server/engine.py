"""The engine: one thread that computes whatever is in flight, a forward at a time.

Continuous batching. Each turn of the loop takes new rows in (up to ``max_batch`` rows and a bound
on KV memory), builds one packed forward out of prompt pieces and single decoded tokens, and samples
a token for every row whose prompt is complete. A row that ends leaves at once; the last row moves
into its slot, so that slots stay dense. Rows of different cartridges share the forward; only the
attention tells them apart.

The rest of the server talks to it through :meth:`Engine.submit` and futures. It knows nothing of
HTTP, chat templates or files. Prompts that begin alike (the same chat header, the
same question) compute the common tokens once when they start in the same forward; a long common
beginning (a document) is kept from then on, see ``beginnings``. Not done here: paging,
speculation, more than one device.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections import defaultdict, deque
from collections.abc import Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass
from itertools import islice
from typing import Literal

import torch
from torch import Tensor, nn

from cartridge_distill.cartridge.kv_shape import KvShape, kv_sources, text_config
from cartridge_distill.cartridge.prefix import Prefix
from cartridge_distill.model.token_trie import ROOT, TokenTrie
from cartridge_distill.rollout.fingerprint import Completion
from cartridge_distill.server.attention import SERVING_ATTENTION, register
from cartridge_distill.server.beginnings import Beginnings
from cartridge_distill.server.layout import RowBuffers, RowPart, ServingBatch
from cartridge_distill.server.rows import EngineError, NewToken, Row
from cartridge_distill.server.sampling import choose, likeliest
from cartridge_distill.server.settings import ServerSettings
from cartridge_distill.util.errors import ConfigError

logger = logging.getLogger(__name__)

# When idle, the first request waits for company until none has come for this long, and at most so
# often: a burst takes a while to parse, and prompts in one forward share what they have in common.
_GATHER_SECONDS = 0.005
_GATHER_TIMES = 40


@dataclass
class EngineStats:
    """Counts since the start, for the log and for tests."""

    forwards: int = 0
    prompt_tokens: int = 0  # computed
    shared_tokens: int = 0  # not computed: another row of the same forward had them, or kept
    new_tokens: int = 0
    largest_batch: int = 0


class Engine:
    """Serves rows with one model. The model's attention implementation is taken over.

    Args:
        model: a frozen decoder from :func:`cartridge_distill.model.loading.load_model`.
        settings: ``max_batch``, ``max_kv_tokens``, ``prefill_tokens``, ``prefill_chunk``,
            ``prefix_cache_tokens``.
        threads: torch threads of the engine's thread; None leaves torch's default.
    """

    def __init__(
        self, model: nn.Module, settings: ServerSettings, threads: int | None = None
    ) -> None:
        register()
        model.set_attn_implementation(SERVING_ATTENTION)  # type: ignore[operator]
        model.requires_grad_(False)
        model.eval()
        self._model = model
        self._settings = settings
        self._threads = threads
        config = text_config(model.config)
        if config._attn_implementation != SERVING_ATTENTION:
            raise ConfigError(
                f"{type(model).__name__} does not take a custom attention function; fix: "
                "use another model"
            )
        self._query_heads: int = config.num_attention_heads
        kv, self._kv_sources = KvShape.of(config), kv_sources(config)
        self._own_layers = kv.num_layers  # the others read the KV of one of these
        parameter = next(model.parameters())
        self._device = parameter.device
        # A layer without KV of its own is handed that of another, and keeps a copy here.
        shapes = [kv.layer(source) for source in self._kv_sources]
        self._buffer_shape = (shapes, parameter.dtype, parameter.device)
        self._buffers = RowBuffers(*self._buffer_shape)
        self._beginnings = Beginnings(
            self._prefill, settings.prefix_cache_tokens, settings.prefix_cache_min_tokens
        )
        self._inbox: queue.SimpleQueue[Row | None] = queue.SimpleQueue()
        self._waiting: deque[Row] = deque()
        self._rows: list[Row] = []
        self._stopping = threading.Event()
        self._submit_lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.stats = EngineStats()
        self._check_model()

    def _check_model(self) -> None:
        """One token through the model: what cannot be served is refused before the first request.

        Raises:
            ConfigError: some layer does not come through the serving attention.
        """
        self._buffers.reserve(1, 1, 0)
        batch = self._batch([RowPart(0, 0, 1, None)], self._buffers)
        with torch.no_grad():
            self._forward([0], [0], [0], batch)
        batch.check_used_by_all(len(self._kv_sources))
        self._buffers.release()

    def _batch(self, parts: Sequence[RowPart], buffers: RowBuffers) -> ServingBatch:
        return ServingBatch(parts, buffers, self._query_heads, self._kv_sources)

    def _forward(
        self, ids: list[int], positions: list[int], logits_to_keep: list[int], batch: ServingBatch
    ) -> Tensor:
        """Logits ``[len(logits_to_keep), V]`` of some of T packed tokens; writes their KV."""
        output = self._model(
            input_ids=torch.tensor([ids], device=self._device),
            position_ids=torch.tensor([positions], device=self._device),
            use_cache=False,
            serving_batch=batch,
            # Only these rows go through the vocabulary projection.
            logits_to_keep=torch.tensor(logits_to_keep, device=self._device),
        )
        logits: Tensor = output.logits[0]
        return logits

    @torch.inference_mode()
    def expect(self, ids: Sequence[int]) -> int:
        """Computes and keeps the KV of a document that prompts will begin with; before ``start``.

        Where ``prefix_cache_tokens`` does not hold all that is expected, what was used longest ago
        goes, and is computed again when it is asked for.

        Returns:
            The tokens that are kept; 0 for a document that is too short to keep.
        """
        self._beginnings.expect(ids)
        (found,) = self._beginnings.find([[*ids, 0]])
        return 0 if found is None else len(found.ids)

    @property
    def is_alive(self) -> bool:
        """Whether rows that are submitted are computed."""
        return self._thread.is_alive() and not self._stopping.is_set()

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self, timeout: float = 30.0) -> None:
        """Ends the thread after the forward in progress; rows in flight fail with EngineError."""
        with self._submit_lock:
            self._stopping.set()
            self._inbox.put(None)
        if self._thread.is_alive():
            self._thread.join(timeout)

    def submit(self, row: Row) -> Future[Completion]:
        """Puts a row in line. Cancelling the future takes the row out.

        Raises:
            EngineError: the engine has stopped.
        """
        with self._submit_lock:
            if self._stopping.is_set():
                raise EngineError("the server is shutting down", retryable=True)
            self._inbox.put(row)
        return row.future

    @torch.no_grad()
    def run(self, rows: Sequence[Row]) -> list[Completion]:
        """Computes rows here and now, in the caller's thread, on an engine that was not started.

        The same rows take the same forwards, whatever the clock says; several ranks that run the
        same rows of a sharded model stay together.

        Raises:
            EngineError: a row's logits are not finite.
        """
        self._waiting.extend(rows)
        try:
            while self._waiting or self._rows:
                self._admit()
                self._step()
        finally:
            self._waiting.clear()
            self._rows.clear()
            self._buffers.release()
        return [row.future.result() for row in rows]

    # --- the thread -------------------------------------------------------------------------

    def _run(self) -> None:
        if self._threads is not None:
            torch.set_num_threads(self._threads)
        with torch.inference_mode():
            while not self._stopping.is_set():
                self._receive()
                self._drop_cancelled()
                try:
                    self._share_beginnings()
                    self._admit()
                    if self._rows:
                        self._step()
                except Exception as error:
                    # Whatever went wrong, every waiting client hears of it, and the next one finds
                    # an engine with empty buffers.
                    logger.exception("a forward failed; %d rows are given up", len(self._rows))
                    for row in self._rows:
                        message = f"the forward failed: {type(error).__name__}: {error}"
                        self._fail(row, message, retryable=True)
                    self._rows.clear()
                    self._buffers.release()
        self._receive()
        for row in (*self._rows, *self._waiting):
            self._fail(row, "the server is shutting down", retryable=True)

    def _receive(self) -> None:
        """Empties the inbox; with nothing to compute, waits for a row."""
        if not self._rows and not self._waiting and not self._stopping.is_set():
            self._buffers.release()
            first = self._inbox.get()
            if first is not None:
                self._waiting.append(first)
                for _ in range(_GATHER_TIMES):
                    self._stopping.wait(_GATHER_SECONDS)
                    if self._inbox.empty() or len(self._waiting) >= self._settings.max_batch:
                        break
                    while not self._inbox.empty():
                        if (row := self._inbox.get()) is not None:
                            self._waiting.append(row)
        while True:
            try:
                row = self._inbox.get_nowait()
            except queue.Empty:
                return
            if row is not None:
                self._waiting.append(row)

    def _drop_cancelled(self) -> None:
        self._waiting = deque(row for row in self._waiting if not row.future.cancelled())
        self._leave([row for row in self._rows if row.future.cancelled()])

    def _share_beginnings(self) -> None:
        """Gives the rows that are next in line the KV of long beginnings they share."""
        free = self._settings.max_batch - len(self._rows)
        new = [row for row in islice(self._waiting, free) if not row.sought]
        for row in new:
            row.sought = True  # also when it fails: the row then computes its whole prompt
        plain = [row for row in new if row.prefix is None]
        found = self._beginnings.find([row.prompt_ids for row in plain])
        for row, beginning in zip(plain, found, strict=True):
            if beginning is not None:
                row.prefix = beginning.prefix
                row.prompt_ids = row.prompt_ids[len(beginning.ids) :]
                row.shared = len(beginning.ids)
                self.stats.shared_tokens += row.shared

    def _prefill(self, ids: list[int], before: Prefix | None) -> Prefix:
        """The KV of ``ids`` behind a prefix, computed at once. Nothing else runs meanwhile."""
        buffers = RowBuffers(*self._buffer_shape)
        buffers.reserve(1, len(ids), 0)
        first = before.num_tokens if before is not None else 0
        for done in range(0, len(ids), self._settings.prefill_chunk):
            piece = ids[done : done + self._settings.prefill_chunk]
            batch = self._batch([RowPart(0, done, len(piece), before)], buffers)
            positions = range(first + done, first + done + len(piece))
            self._forward(piece, list(positions), [0], batch)
            self.stats.forwards += 1
            self.stats.prompt_tokens += len(piece)
        row = (slice(0, 1), slice(None), slice(0, len(ids)))
        keys, values = (kind[: self._own_layers] for kind in (buffers.keys, buffers.values))
        return Prefix([key[row] for key in keys], [value[row] for value in values])

    def _admit(self) -> None:
        """Takes rows in, first come first served."""
        new: list[Row] = []
        longest = max((row.need for row in self._rows), default=0)
        while self._waiting and len(self._rows) + len(new) < self._settings.max_batch:
            need = max(longest, self._waiting[0].need)
            count = len(self._rows) + len(new) + 1
            if count > 1 and count * need > self._settings.max_kv_tokens:
                break
            longest = need
            new.append(self._waiting.popleft())
        if not new:
            return
        # Neighbours of like length share one attention product.
        new.sort(key=lambda row: len(row.prompt_ids))
        used = len(self._rows)
        self._buffers.reserve(used + len(new), longest, used)
        self._rows += new
        self.stats.largest_batch = max(self.stats.largest_batch, len(self._rows))

    def _step(self) -> None:
        """One forward, and one token for each row whose prompt is complete."""
        parts: list[RowPart] = []
        ids: list[int] = []
        positions: list[int] = []
        sampled: list[Row] = []
        last_places: list[int] = []
        # What rows that begin in this forward have in common is computed by the first of them.
        tries: defaultdict[int, TokenTrie] = defaultdict(TokenTrie)
        budget = self._settings.prefill_tokens
        for slot, row in enumerate(self._rows):
            begins, trie = row.done == 0, tries[id(row.prefix)]
            # The last token is computed in any case: its logits are needed.
            borrowed = trie.find(row.prompt_ids[:-1]) if begins and budget > 0 else []
            row.done += len(borrowed)
            row.shared += len(borrowed)
            self.stats.shared_tokens += len(borrowed)
            length = row.pending
            if not row.new_ids:
                length = min(length, self._settings.prefill_chunk, budget)
                budget -= length
                self.stats.prompt_tokens += length
            if length == 0:
                continue
            start = row.prefix.num_tokens + row.done if row.prefix is not None else row.done
            parts.append(RowPart(slot, row.done, length, row.prefix, borrowed))
            fed = row.tokens(row.done, length)
            if begins:
                trie.add(fed, len(ids), borrowed[-1] if borrowed else ROOT)
            ids += fed
            positions += range(start, start + length)
            if length == row.pending:
                sampled.append(row)
                last_places.append(len(ids) - 1)
            row.done += length
        batch = self._batch(parts, self._buffers)
        logits = self._forward(ids, positions, last_places or [0], batch)
        self.stats.forwards += 1
        if not sampled:
            return
        temperatures = [row.temperature for row in sampled]
        tokens, logprobs = choose(logits, temperatures, [row.generator for row in sampled])
        tops = likeliest(logits, temperatures, [row.top_logprobs for row in sampled])
        self.stats.new_tokens += len(sampled)
        self._leave(
            [
                row
                for row, token, logprob, top in zip(sampled, tokens, logprobs, tops, strict=True)
                if self._append(row, NewToken(token, logprob, top))
            ]
        )

    def _append(self, row: Row, new: NewToken) -> bool:
        """Adds a token; true when the row is finished (or has failed)."""
        if new.logprob != new.logprob:
            self._fail(
                row,
                "the model's logits are not finite for this prompt and cartridge; the cartridge's "
                "training has diverged, or the model overflows in this dtype",
                retryable=False,
            )
            return True
        row.new_ids.append(new.id)
        row.logprobs.append(new.logprob)
        if row.on_token is not None:
            row.on_token(new)
        reason: Literal["stop", "length"]
        if len(row.new_ids) == row.max_new_tokens:
            # As on the real server: an end token in the very last place still counts as "length".
            reason = "length"
        elif new.id in row.end_ids or (row.ends_with_stop and row.ends_with_stop(row.new_ids)):
            reason = "stop"
        else:
            return False
        try:
            row.future.set_result(Completion(row.new_ids, row.logprobs, reason, row.shared))
        except InvalidStateError:
            pass  # Cancelled in this moment: nobody waits for the result.
        return True

    def _leave(self, rows: list[Row]) -> None:
        """Takes rows out and keeps the slots dense."""
        for row in rows:
            slot = self._rows.index(row)
            last = self._rows.pop()
            if last is not row:
                self._buffers.move(len(self._rows), slot, last.done)
                self._rows[slot] = last

    @staticmethod
    def _fail(row: Row, message: str, retryable: bool) -> None:
        try:
            row.future.set_exception(EngineError(message, retryable))
        except InvalidStateError:
            pass  # Cancelled: nobody waits for the result.
