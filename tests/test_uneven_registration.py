"""``import hfcompress`` registers the loader in any order of imports; without it an uneven checkpoint never loads."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from hfcompress.structure.shapes import record_shapes
from tests.forks import Forks
from tests.uneven import FAMILIES

ROOT = str(Path(__file__).parent.parent)
KNOWN = "from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING as known; assert 'hfcompress' in known; "
ORDERS = {
    # Also: imported twice, imported anew, and the tables loaded anew, all in one process.
    "before": "import sys, importlib, hfcompress; sys.modules.pop('hfcompress'); "
    "import hfcompress; import transformers.quantizers.auto as tables; "
    "[sys.modules.pop(name) for name in list(sys.modules) if name.startswith('hfcompress')]; import hfcompress; "
    "assert sum(type(f).__module__ == 'hfcompress.loading.hook' for f in sys.meta_path) == 1; "
    "importlib.reload(tables); "
    "assert type(tables.__loader__).__name__ == 'SourceFileLoader'; " + KNOWN,
    "after": "import transformers.modeling_utils, hfcompress; " + KNOWN,
    "in another thread": "import threading, hfcompress; "
    "t = threading.Thread(target=lambda: __import__('transformers.modeling_utils')); t.start(); t.join(); " + KNOWN,
}


def python(code: str) -> subprocess.CompletedProcess[str]:
    """Run code as a fresh process."""
    return subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )


@pytest.mark.parametrize("order", ORDERS)
def test_registers_in_any_order(order: str) -> None:
    run = python(ORDERS[order])
    assert run.returncode == 0, run.stderr


def test_a_fault_of_ours_never_breaks_their_import() -> None:
    """As if a later Transformers had moved what the loader builds on."""
    code = (
        "import sys, warnings, hfcompress; sys.modules['hfcompress.loading.quantizer'] = None\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    from transformers import BertModel\n"
        "assert any('hfcompress could not register its checkpoint loader' in str(w.message) for w in caught)"
    )
    run = python(code)
    assert run.returncode == 0, run.stderr


STOCK = """
import sys
import transformers
for argument in sys.argv[1:]:
    kind, folder, ignore = argument.split(",")
    try:
        getattr(transformers, kind).from_pretrained(folder, ignore_mismatched_sizes=bool(ignore))
        print(folder, "loaded")
    except RuntimeError as error:
        print(folder, "RuntimeError", error)
assert "hfcompress" not in sys.modules
"""


def test_stock_transformers_stops(tmp_path: Path, forks: Forks) -> None:
    """Only told to ignore sizes does it load: nothing in a checkpoint stops that option, but its report names all."""
    asked = []
    for name, make in FAMILIES.items():
        model = make()
        record_shapes(model)
        model.save_pretrained(tmp_path / name)
        asked.append(f"{type(model).__name__},{name},")
    run = forks.run(["-c", STOCK, *asked, "BertForSequenceClassification,bert,yes"], tmp_path)
    answers = dict(line.split(" ", 1) for line in run.stdout.splitlines()[:-1])
    assert {name: answer.split()[0] for name, answer in answers.items()} == dict.fromkeys(FAMILIES, "RuntimeError")
    assert run.stdout.splitlines()[-1] == "bert loaded"
    assert "MISMATCH" in run.stderr.rpartition("bert")[0]
    assert "Unknown quantization type, got hfcompress" in run.stderr
