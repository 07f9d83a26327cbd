import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="needs the extra [hf]")
sys.path.insert(0, str(Path(__file__).parent))
