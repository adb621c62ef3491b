"""What a fault is, and how a test is named by it."""

from typing import NamedTuple


class Fault(NamedTuple):
    """A text of one file replaced by another, which makes a difference, and who should notice."""

    path: str  # of the file, from the project's root
    old: str  # stands in it once
    new: str
    tests: tuple[str, ...]  # what pytest is given: at least one test must fail
    unseen: str = ""  # why no test can see it; then all tests must pass

    def apply(self, text: str) -> str:
        """Return the file's text with the fault in it."""
        if text.count(self.old) != 1:
            raise ValueError(
                f"{self.old!r} must stand in {self.path} once, not {text.count(self.old)} times"
            )
        return text.replace(self.old, self.new)
