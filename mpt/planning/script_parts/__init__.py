"""The pieces of which `mpt.planning.script` makes a training script: Python text, and what joins it."""
