"""FeatureCache: features of pictures in memory, for inference: one computation per picture.

A picture is known by its content and the backbone by its identity, so a picture that comes again
(a further question about it, another request) costs a hash. What was not used for longest goes
first. Safe to share between threads; threads that want the same picture at the same time wait for
the one that computes it.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import numpy as np
import torch

from shardspec.errors import ConfigError


class FeatureCache:
    """Features by the content of pictures, at most so many bytes of them."""

    def __init__(self, identity: str, *, max_bytes: int = 2**30) -> None:
        """Makes an empty cache.

        Args:
          identity: Of all that features follow from but the picture, such as `Backbone.identity`.
          max_bytes: Most bytes of tensors that are kept, >= 0; a larger one is handed out only.

        Raises:
          ConfigError: `argument`.
        """
        whole = isinstance(max_bytes, int) and not isinstance(max_bytes, bool)
        if not whole or max_bytes < 0:
            raise ConfigError(
                "argument", name="max_bytes", got=repr(max_bytes), wanted="a whole number >= 0"
            )
        self.identity, self.max_bytes = identity, max_bytes
        self.hits = self.misses = 0
        """Pictures that were there, or were being computed; and others."""
        # All below are guarded by the lock: `num_bytes` is that of `_kept`, which is in the order
        # of last use; a picture that is being computed is in `_coming` alone.
        self._lock = threading.Lock()
        self._kept: OrderedDict[bytes, torch.Tensor] = OrderedDict()
        self._coming: dict[bytes, Future[torch.Tensor]] = {}
        self.num_bytes = 0
        """Bytes of the tensors that are kept."""

    def __len__(self) -> int:
        return len(self._kept)

    def key(self, picture: Any, **further: Any) -> bytes:
        """Hashes the content of a picture, with its type and shape, and the identity.

        Args:
          picture: A tensor or an array of pixels, or the bytes of a file.
          further: What features follow from besides, such as `grid_thw` of patches; each of a
            picture's types.
        """
        hashed = hashlib.sha256(self.identity.encode())
        for name, value in (("", picture), *sorted(further.items())):
            kind, shape, payload = _content(value)
            hashed.update(f"\n{name} {kind} {shape}\n".encode())
            hashed.update(payload)
        return hashed.digest()

    def get(
        self, picture: Any, compute: Callable[..., torch.Tensor], **further: Any
    ) -> torch.Tensor:
        """Gives the features of a picture.

        Args:
          picture: As of `key`.
          compute: Makes them of the picture and `further`; called where they are not there. What
            it raises is raised to all that wait for it, and nothing is kept.
          further: As of `key`: patches of one content are different pictures on other grids.

        Returns:
          The tensor that is kept: it must not be written to.
        """
        key = self.key(picture, **further)
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                self.hits += 1
                return self._kept[key]
            coming = self._coming.get(key)
            if coming is None:
                own = self._coming[key] = Future()
                self.misses += 1
            else:
                self.hits += 1
        if coming is not None:
            return coming.result()
        try:
            made = compute(picture, **further).detach()
        except BaseException as error:
            with self._lock:
                del self._coming[key]
            own.set_exception(error)
            raise
        with self._lock:
            del self._coming[key]
            self._keep(key, made)
        own.set_result(made)
        return made

    def clear(self) -> None:
        """Drops everything that is kept."""
        with self._lock:
            self._kept.clear()
            self.num_bytes = 0

    def _keep(self, key: bytes, made: torch.Tensor) -> None:
        if made.nbytes > self.max_bytes:
            return
        # A view would keep the whole of what it shows.
        made = made if made.untyped_storage().nbytes() == made.nbytes else made.clone()
        self._kept[key] = made
        self.num_bytes += made.nbytes
        while self.num_bytes > self.max_bytes:
            _, oldest = self._kept.popitem(last=False)
            self.num_bytes -= oldest.nbytes


def _content(value: Any) -> tuple[str, tuple[int, ...], Any]:
    """Gives the type, the shape and the bytes of a picture."""
    if isinstance(value, torch.Tensor):
        flat = value.detach().cpu().contiguous().reshape(-1)
        return str(value.dtype), tuple(value.shape), flat.view(torch.uint8).numpy()
    if isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, np.ascontiguousarray(value).reshape(-1).view(np.uint8)
    return "file", (len(value),), value
