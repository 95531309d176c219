"""Writes docs/benchmarks.md and its picture from one run."""


def write(made, found): ...
