"""What a text encoder with eyes sees of pictures: made once for all texts that speak of them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class SeenOnce:
    """The pictures of one task before the text encoder of a pipeline such as Qwen-Image-Edit.

    Within `looking` the pipeline's own code runs on them; from the second time on it is handed what the processor's part
    for pictures and the encoder's part for vision made the first time. An encoder without such a part does it all anew.
    """

    def __init__(self, pipe: Any) -> None:
        self._processor = pipe.processor
        self._encoder: Any = getattr(pipe.text_encoder, "model", None)
        self._prepared = Kept(pipe.processor.image_processor)
        features = getattr(self._encoder, "get_image_features", None)
        self._features = Kept(features) if features is not None else None

    @contextmanager
    def looking(self) -> Iterator[None]:
        """The pipeline sees no pictures but this task's until the block ends."""
        usual = self._processor.image_processor
        self._processor.image_processor = self._prepared
        if self._features is not None:
            self._encoder.get_image_features = self._features
        try:
            yield
        finally:
            self._processor.image_processor = usual
            if self._features is not None:
                del self._encoder.get_image_features


class Kept:
    """A function's first result for every later call, a shallow copy each time; else what the function itself is."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._made: Any = None

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        """The first result; the arguments count the first time only."""
        if self._made is None:
            self._made = self._function(*arguments, **named)
        return copy.copy(self._made)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._function, name)
