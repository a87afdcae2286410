"""The control service is tested inside a simulated node, whose helpers lie with the node's tests."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "node"))
