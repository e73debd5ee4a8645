"""`python -m dspfx`: the command line."""

from dspfx.commands.app import app

if __name__ == "__main__":
    app(prog_name="dspfx")
