import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="needs the extra [hf]")
pytest.importorskip("accelerate", reason="needs the extra [hf]")
for folder in (Path(__file__).parent, Path(__file__).parents[1]):
    sys.path.insert(0, str(folder))
