"""Progress of encoding the options of an opened model, over all of its blocks."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from qcompress.measuring.candidates import EncodeProgress
from qcompress.model.parts import Part


class EncodingOfBlocks:
    """Turns reports of single blocks into reports of the whole model.

    Args:
        parts: all parts of the model.
        tell: function that the reports are for.
    """

    def __init__(self, parts: Sequence[Part], tell: Callable[[EncodeProgress], None]) -> None:
        self._weights = {part.name: part.target.num_weights for part in parts}
        self._tell, self._done = tell, dict[str, None]()
        self._encoded, self._earlier_s, self._block_s = 0, 0.0, 0.0

    def __call__(self, progress: EncodeProgress) -> None:
        """Report a part that has been encoded; the forecast follows from the weights that are left."""
        if progress.parts == 1:  # of the next block
            self._earlier_s += self._block_s
        self._block_s = progress.elapsed_s
        self._encoded += self._weights[progress.part]
        self.skip([progress.part])
        elapsed_s = self._earlier_s + self._block_s
        left = sum(weights for name, weights in self._weights.items() if name not in self._done)
        self._tell(
            replace(
                progress,
                parts=len(self._done),
                total_parts=len(self._weights),
                elapsed_s=elapsed_s,
                remaining_s=elapsed_s / self._encoded * left,
            )
        )

    def skip(self, parts: Iterable[str]) -> None:
        """Count parts as done, of blocks that an interrupted call had measured."""
        self._done.update(dict.fromkeys(parts))
