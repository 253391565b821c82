"""DevicePrefetcher: batches on the device while the step before still runs.

    loader -> pinned staging (used again) -> device, on a stream of its own -> normalised there

The next batch is asked for, staged and sent before the current one is handed out; the consumer's
stream waits for the copy, never the consumer. So the loader is a batch further than the consumer:
states are taken from here (`DevicePrefetcher.state_dict`). Pictures travel as uint8 in the memory
order of the batch, and become contiguous tensors of the wanted type on the device. On a CPU the
same happens without staging and streams.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import closing
from typing import Any, TypeVar

import torch

from loader.assembly import MEAN_STD, Normalization, normalize
from loader.dataloader import StreamLoader
from shardspec.errors import ConfigError, nearest

_Sent = TypeVar("_Sent")


class DevicePrefetcher:
    """Iterates over a loader and gives its batches on a device."""

    def __init__(
        self,
        loader: Iterable[Mapping[str, Any]],
        device: torch.device | str,
        *,
        normalization: Normalization | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Wraps a loader.

        Args:
          loader: A `StreamLoader`, or anything else that gives batches.
          device: Where batches should be.
          normalization: Maps uint8 crops there to what the encoder was trained with; None leaves
            them as they are. For crops only: patches have no axis of channels.
          dtype: Of `images` there, such as torch.bfloat16; None: float32 where they are normalised,
            otherwise as they come.

        Raises:
          ConfigError: `normalization`, for an unknown name; `device`, there is no such device here.
        """
        if normalization is not None and normalization not in MEAN_STD:
            raise ConfigError(
                "normalization", hint=nearest(normalization, MEAN_STD), got=normalization
            )
        self.loader = loader
        self.device = _require_device(device)
        self.normalization, self.dtype = normalization, dtype
        self._staging = _Staging()
        self._state: dict[str, Any] | None = None
        self._pass = _Pass()

    def state_dict(self) -> dict[str, Any]:
        """Describes how far the run is after the batch that was handed out last."""
        loader: Any = self.loader
        state: dict[str, Any] = loader.state_dict() if self._state is None else self._state
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a saved state of the loader; see `StreamLoader.load_state_dict`."""
        loader: Any = self.loader
        loader.load_state_dict(state)
        self._pass.ahead.clear()
        self._state, self._pass = None, _Pass()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """Gives a pass of the loader; tensors are on the device and contiguous."""
        if self.device.type != "cuda":
            for batch in self.loader:
                yield self._finished({name: self._moved(value) for name, value in batch.items()})
            return
        yield from self._from_stream()

    def _from_stream(self) -> Iterator[dict[str, Any]]:
        stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        with closing(self._one_ahead(lambda batch: self._sent(batch, stream))) as batches:
            for sent, done in batches:
                yield self._arrived(sent, done)

    def _one_ahead(
        self, send: Callable[[Mapping[str, Any]], _Sent]
    ) -> Generator[_Sent, None, None]:
        """Sends each batch while the one before is still to be handed out."""
        loader = self.loader
        take_state = getattr(loader, "state_dict", dict)
        self._go_back()  # where a pass before was left, and its iterator is still kept
        self._state = take_state()
        self._pass = this = _Pass()
        try:
            for batch in loader:
                this.newest, this.turn = take_state(), getattr(loader, "_turn", 0)
                this.ahead.append((send(batch), this.newest))
                del batch
                if len(this.ahead) > 1:
                    sent, self._state = this.ahead.popleft()
                    yield sent
            while this.ahead:
                sent, self._state = this.ahead.popleft()
                yield sent
        finally:
            if self._pass is this:
                self._go_back()

    def _go_back(self) -> None:
        """Moves the loader back to after the batch that was handed out last.

        Not where the user has moved it to another step meanwhile. A change that was made meanwhile
        stays, and begins at the step that it was made for.
        """
        loader, state, left = self.loader, self._state, self._pass
        if not isinstance(loader, StreamLoader):
            return  # other loaders cannot: the state that is kept is right nevertheless
        self._state, self._pass = None, _Pass()
        left.ahead.clear()  # an iterator that is still kept gives no batch twice
        if state is None or left.newest is None or state["step"] == left.newest["step"]:
            return
        here = loader.state_dict()
        was_loaded = loader._turn != left.turn and here == left.newest
        if here["step"] == left.newest["step"] and not was_loaded:
            progress = ("step", "streams", "bad")
            kept = {name: here[name] for name in here if name not in progress}
            loader.load_state_dict({**kept, **{n: state[n] for n in progress if n in state}})

    def _sent(
        self, batch: Mapping[str, Any], stream: torch.cuda.Stream
    ) -> tuple[dict[str, Any], torch.cuda.Event]:
        sent: dict[str, Any] = {}
        with torch.cuda.stream(stream):
            for name, value in batch.items():
                sent[name] = _each_tensor(
                    value, lambda tensor: self._staging.send(tensor, self.device, stream)
                )
            sent = self._finished(sent)
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record(stream)
        return sent, done

    def _arrived(self, batch: dict[str, Any], done: torch.cuda.Event) -> dict[str, Any]:
        current = torch.cuda.current_stream(self.device)
        current.wait_event(done)
        # Its memory belongs to the copying stream: it must outlive the consumer's work too.
        _each_tensor(batch, lambda tensor: tensor.record_stream(current))
        return batch

    def _moved(self, value: Any) -> Any:
        return _each_tensor(value, lambda tensor: tensor.to(self.device))

    def _finished(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Normalises and converts the pictures where they are; all tensors contiguous."""
        images = batch.get("images")
        if images is not None:  # other loaders' batches may be of text alone
            if self.normalization is not None and images.dtype == torch.uint8 and images.ndim == 5:
                images = normalize(images, kind=self.normalization)
            if self.dtype is not None:
                images = images.to(self.dtype)
            batch["images"] = images
        return {name: _each_tensor(v, torch.Tensor.contiguous) for name, v in batch.items()}


def _each_tensor(value: Any, change: Callable[[torch.Tensor], Any]) -> Any:
    """Changes a tensor, or those of a dictionary: the masks of Gemma 3's packs."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, dict):
        return {name: _each_tensor(each, change) for name, each in value.items()}
    return value


def _require_device(device: torch.device | str) -> torch.device:
    """Refuses a device that this process cannot use; starts none, as children may be forked yet."""
    try:
        found = torch.device(device)
        if found.type == "cuda":
            count = torch.cuda.device_count()
            if (found.index or 0) >= count:
                raise RuntimeError(f"this process sees {count} CUDA devices")
        elif found.type != "cpu":
            torch.empty(0, device=found)
    except (RuntimeError, TypeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError("device", got=repr(device), why=reason[:200]) from error
    return found


class _Pass:
    """How far a pass is ahead of its consumer."""

    def __init__(self) -> None:
        self.ahead: deque[tuple[Any, dict[str, Any]]] = deque()
        """What was sent and not handed out, each with the loader's state after it."""
        self.newest: dict[str, Any] | None = None
        """The loader's state after the batch that it gave last."""
        self.turn = 0
        """The loader's turn then: it has another one if something else has moved the loader."""


class _Staging:
    """Pinned buffers, each free again when the copy out of it is done."""

    def __init__(self) -> None:
        self._buffers: list[tuple[torch.Tensor, torch.cuda.Event]] = []

    def send(
        self, tensor: torch.Tensor, device: torch.device, stream: torch.cuda.Stream
    ) -> torch.Tensor:
        """Copies a tensor to the device without waiting for it; its memory order is kept."""
        strides = tensor.stride()
        order = sorted(range(tensor.ndim), key=lambda axis: -strides[axis])
        memory = tensor.permute(order)  # contiguous, as batches are
        if not memory.is_contiguous():
            memory = memory.contiguous()
        buffer, event = self._take(memory.nbytes)
        staged = buffer[: memory.nbytes].view(memory.dtype).view(memory.shape)
        staged.copy_(memory)
        sent = staged.to(device, non_blocking=True)
        event.record(stream)
        self._buffers.append((buffer, event))
        back = sorted(range(tensor.ndim), key=order.__getitem__)
        return sent.permute(back)

    def _take(self, num_bytes: int) -> tuple[torch.Tensor, torch.cuda.Event]:
        size = 1 << max(0, num_bytes - 1).bit_length()
        for i, (buffer, event) in enumerate(self._buffers):
            if buffer.nbytes == size and event.query():  # type: ignore[no-untyped-call]
                return self._buffers.pop(i)
        fresh = torch.cuda.Event()  # type: ignore[no-untyped-call]
        return torch.empty(size, dtype=torch.uint8, pin_memory=True), fresh
