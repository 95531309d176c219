"""`python -m benchmarks.noop.worker`: a worker that knows one connector more."""

from pathlib import Path

from connectors import destinations, sources
from schemas.start import start
from workers.main import run

if __name__ == "__main__":
    sources.__path__.append(str(Path(__file__).parent / "sources"))
    destinations.__path__.append(str(Path(__file__).parent / "destinations"))
    start(run, "worker")
