"""Is the engine exact on this machine? The oracle behind `dendrite verify`."""

from dendrite.verify.oracle import verify
from dendrite.verify.report import Report, Row

__all__ = ["Report", "Row", "verify"]
