"""`python -m audit.process [--accept-loss REASON]`: start a sealer as a process of its own."""

import sys
from functools import partial

from audit.main import run
from schemas.start import start

if __name__ == "__main__":
    _option, _reason = [*sys.argv[1:], None, None][:2]
    start(partial(run, accepted_loss=_reason if _option == "--accept-loss" else None), "sealer")
