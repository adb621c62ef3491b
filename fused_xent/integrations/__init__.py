"""One-line use of this library in other frameworks; each module needs its framework."""
