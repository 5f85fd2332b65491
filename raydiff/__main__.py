"""`python -m raydiff` is `raydiff`."""

from raydiff.cli import main

if __name__ == "__main__":
    main()
