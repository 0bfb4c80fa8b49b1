"""``python -m epivi``: the command line."""

from epivi.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
