"""`python -m dpsynth.cli` is `dpsynth`."""
import sys

from dpsynth.cli.entry import main

if __name__ == "__main__":
    sys.exit(main())
