"""What surrounds a run of the command line: its trainer, what it prints, and what its libraries may print."""
