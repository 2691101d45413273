"""``python -m hfcompress`` is the ``hfcompress`` command."""

from hfcompress.cli import main

main()
