"""The first rungs of the ladder: thin scripts over `mfm_ref` that end in minutes on a laptop."""
