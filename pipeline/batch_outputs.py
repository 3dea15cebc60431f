"""The files that a batch run writes, and what earlier runs of the same job have left in them."""

from contextlib import ExitStack
from pathlib import Path
from typing import Self

import numpy as np

from ..errors import InflashError
from .batch_file import BatchFile
from .result_file import ResultFile, ResultStream, open_results

OPEN, SUCCEEDED, UNSUCCESSFUL = 0, 1, 2


class BatchOutputs:
    """The result file and perhaps an error file, locked; a context manager until a `ResultWriter` takes them over.

    Attributes:
      results: where answers go.
      errors: where refused and failed requests go; None: to the answers.
      resumable: whether a later run could go on from here; not after standard output or a pipe.
      fresh: there are no results yet.
    """

    def __init__(self, output: Path, error_file: Path | None) -> None:
        """Opens them.

        Raises:
          InflashError: another run is writing them, or they cannot be written.
        """
        with ExitStack() as stack:
            self.results = stack.enter_context(_Closing(open_results(output))).place
            self.errors = stack.enter_context(_Closing(open_results(error_file))).place if error_file is not None else None
            self.resumable = isinstance(self.results, ResultFile)
            self.fresh = self.held is None
            self._kept = stack.pop_all()
        self._taken = False

    @property
    def held(self) -> Path | None:
        """A file that holds results."""
        return next((file.path for file in self._files() if file.path.stat().st_size), None)

    def finished(self, batch: BatchFile) -> np.ndarray:
        """[len(batch)] int8: OPEN, SUCCEEDED or UNSUCCESSFUL.

        Raises:
          InflashError: there is something else in the files than results of this batch.
        """
        states = np.zeros(len(batch), np.int8)
        for file in self._files():
            for custom_id, succeeded in file.results():
                index = batch.index_of(custom_id)
                if index is None:
                    raise InflashError(
                        f"{file.name} has an answer to {custom_id!r}, which {batch.path} does not ask; "
                        "choose another output, or --no-resume to overwrite it"
                    )
                if states[index] != SUCCEEDED:  # it may have failed in one run, and succeeded in another that had no error file
                    states[index] = SUCCEEDED if succeeded else UNSUCCESSFUL
        return states

    def drop_unsuccessful(self) -> None:
        """Takes refused and failed requests out of the files, so that they are tried again."""
        for file in self._files():
            file.drop_unsuccessful()

    def begin(self, *, resume: bool) -> None:
        """Makes the files ready for more lines; without `resume` for the first ones."""
        for file in self._files():
            file.begin(resume=resume)

    def take(self) -> tuple[ResultFile | ResultStream, ResultFile | ResultStream | None]:
        """Both, for who closes them from now on."""
        self._taken = True
        return self.results, self.errors

    def _files(self) -> list[ResultFile]:
        return [place for place in (self.results, self.errors) if isinstance(place, ResultFile)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Closes what nobody has taken, and removes files that were made for nothing."""
        if not self._taken:
            self._kept.close()


class _Closing:
    """Closes a place for results that got none; a file that was made for it goes, too."""

    def __init__(self, place: ResultFile | ResultStream) -> None:
        self.place = place

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if isinstance(self.place, ResultFile):
            self.place.discard()
        else:
            self.place.close()
