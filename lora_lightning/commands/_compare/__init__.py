"""The parts of the command `compare`: entries and budget, trials and their measures; `report/` writes the results."""
