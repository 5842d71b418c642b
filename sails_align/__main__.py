"""`python -m sails_align`: the command `sails`, where scripts are not on the path."""

from sails_align.cli import main

if __name__ == "__main__":
    main()
