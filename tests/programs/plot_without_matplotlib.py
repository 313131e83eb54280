"""tools.plot where matplotlib is not installed."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
from tools import plot

# None in sys.modules makes an import fail
sys.modules["matplotlib.pyplot"] = None
plot.run_tool(plot.PlotConfig, "", plot.main)
