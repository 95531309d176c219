"""`python -m scheduler.process`: start a scheduler as a process of its own."""

from scheduler.main import run
from schemas.start import start

if __name__ == "__main__":
    start(run, "scheduler")
