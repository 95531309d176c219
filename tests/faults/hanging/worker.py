"""`python -m tests.faults.hanging.worker`: a worker with a source in which a thread hangs."""

from pathlib import Path

from connectors import sources
from schemas.start import start
from workers.main import run

if __name__ == "__main__":
    sources.__path__.append(str(Path(__file__).parent / "sources"))
    start(run, "worker")
