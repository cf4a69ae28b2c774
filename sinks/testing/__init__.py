"""For tests of sinks: `SinkConformance` is what every sink must do, `MemorySink` does what a test says.

`destination.py` is what the suite asks of a destination, `plugin.py` is `pytest --sink NAME`. It needs pytest and
pytest-asyncio, which the product does not.
"""

from sinks.testing.conformance import SinkConformance
from sinks.testing.destination import Destination, decode, sample
from sinks.testing.memory import MemorySink

__all__ = ["Destination", "MemorySink", "SinkConformance", "decode", "sample"]
