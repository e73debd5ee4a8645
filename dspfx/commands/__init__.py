"""The sub-commands of `dspfx`, one file each."""
