"""Load, faults and fuzzing from outside, on a server process. `make test` runs them small, `make soak` in full."""
