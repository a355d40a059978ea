"""``python -m lavis_xformer``: the ``lavis-xformer`` command where its script is not on the path."""

import sys

from lavis_xformer.cli import main

sys.exit(main())
