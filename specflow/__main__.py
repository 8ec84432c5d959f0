"""`python -m specflow`: the `specflow` command."""

from specflow.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
