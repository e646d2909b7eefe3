"""Meanings of the names of other tools, and of settings in the wrong section."""
