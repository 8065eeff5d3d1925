"""``python -m tpuvid``: the command."""

from tpuvid.cli.main import main

if __name__ == "__main__":
    main()
