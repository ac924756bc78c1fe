"""``python -m hashattention``: the command line."""

from hashattention.cli import main

if __name__ == "__main__":
    main()
