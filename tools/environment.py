"""Makes the virtual environment of the Makefile, or says what the machine lacks.

usage: python3 tools/environment.py DIRECTORY
"""

import sys

if sys.version_info < (3, 11):  # noqa: UP036  # nothing has asked before this file runs
    sys.exit(
        f"Relay needs Python 3.11 or later; {sys.executable} is {sys.version.split()[0]}. Try: make PYTHON=python3.12"
    )
try:
    import ensurepip  # noqa: F401  # Debian ships venv without it
    import venv
except ImportError:
    sys.exit(f"{sys.executable} can't make virtual environments; on Debian: apt-get install python3-venv")

venv.create(sys.argv[1], with_pip=True, clear=True)
