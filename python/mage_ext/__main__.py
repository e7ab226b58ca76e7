"""python -m mage_ext: the `mage` command."""

import sys

from mage_ext.cli import main

sys.exit(main())
