"""The JSON Schema (draft 2020-12) of config files, made from the signatures and docstrings of the classes."""
