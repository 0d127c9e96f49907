"""The curves of a run: what TensorBoard shows of each step, written by one rank."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from stillroom.cache.errors import StorageError


class Curves:
    """TensorBoard's event files of a run.

    Args:
        folder: where they lie.
        writes: whether this process writes them; of several, one does.
    """

    def __init__(self, folder: Path, *, writes: bool) -> None:
        """Write nothing yet."""
        self._folder, self._writes = folder, writes
        self._writer: Any = None

    def open(self, step: int) -> None:
        """Go on after so many steps. Points of later ones are from before the run was ended, which
        takes these steps anew: TensorBoard shows them no more.

        Raises:
            StorageError: the folder cannot be written.
        """
        if self._writes:
            from torch.utils.tensorboard import SummaryWriter

            with self._told():
                self._writer = SummaryWriter(str(self._folder), purge_step=step + 1)

    def add(self, values: Mapping[str, float], step: int) -> None:
        """Add a point to each curve, by its name; on the disk when this returns.

        Raises:
            StorageError: it cannot be written.
        """
        if self._writer is not None and values:
            with self._told():
                for name, value in values.items():
                    self._writer.add_scalar(name, value, global_step=step)
                self._writer.flush()

    def close(self) -> None:
        """End the files; what was added is on the disk already, or was said not to be."""
        if self._writer is not None:
            with suppress(OSError):
                self._writer.close()

    @contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            do = "Make room on the disk, or check that the folder can be written."
            raise StorageError(str(self._folder), "to write curves", str(error), do) from error
