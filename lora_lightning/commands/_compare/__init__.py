"""The parts of the command `compare`: entries and budget, trials and their measures, and what is written."""
