"""`python -m workers.process`: start a worker as a process of its own."""

from schemas.start import start
from workers.main import run

if __name__ == "__main__":
    start(run, "worker")
