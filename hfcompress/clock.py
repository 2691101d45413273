"""How long a stage took, with the earlier attempts whose work it goes on with."""

from __future__ import annotations

import json
import time
from pathlib import Path

from hfcompress.checkpoint.atomic import write_text

CLOCK = "clock.json"


def begin_attempt(work: Path) -> float:
    """Write down that an attempt at a stage begins; return the seconds that earlier ones spent.

    work: where the stage keeps what survives a kill.  An earlier attempt counts up to the last file that it left
    there: what it did afterwards is done again.
    """
    file, now, earlier = work / CLOCK, time.time(), 0.0
    if file.is_file():
        told = json.loads(file.read_text(encoding="utf-8"))
        last = max(path.stat().st_mtime for path in work.rglob("*") if path.is_file())
        earlier = float(told["earlier"]) + max(0.0, last - float(told["began"]))
    work.mkdir(parents=True, exist_ok=True)
    write_text(file, json.dumps({"began": now, "earlier": earlier}) + "\n")
    return earlier
