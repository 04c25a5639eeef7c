import sys

from sssd.cli import main

sys.exit(main())
