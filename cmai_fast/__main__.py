"""`python -m cmai_fast`: the command `cmai-fast`, where its script is not on the PATH."""

from cmai_fast.cli import app

if __name__ == "__main__":
    app(prog_name="cmai-fast")
