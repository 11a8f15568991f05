"""The notebooks, `mini_mfm.py`, and `run.py`, which executes the notebooks."""
