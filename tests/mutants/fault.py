"""The definition of a fault."""

from typing import NamedTuple


class Fault(NamedTuple):
    """A change of one file's text that breaks something, and the tests that must notice it."""

    path: str  # of the file, relative to the project's root
    old: str  # occurs once in the file
    new: str
    tests: tuple[str, ...]  # arguments of pytest; at least one test must fail
    unseen: str = ""  # why no test can notice it; if set, all tests must pass

    def apply(self, text: str) -> str:
        """Return the text of the file with the fault applied."""
        if text.count(self.old) != 1:
            raise ValueError(
                f"{self.old!r} must stand in {self.path} once, not {text.count(self.old)} times"
            )
        return text.replace(self.old, self.new)
