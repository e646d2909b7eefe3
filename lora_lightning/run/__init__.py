"""Setup of a run on the command line: its trainer, its messages, and the filters on messages of libraries."""
