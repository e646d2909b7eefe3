"""The import paths that jsonargparse may import by name."""

from __future__ import annotations

from jsonargparse import set_parsing_settings

from lora_lightning.trust import allowed_prefixes


def set_import_policy() -> None:
    """Set the import paths that values may name in jsonargparse: in strict mode only the allowed list.

    It checks class paths, callables and modules before it imports them, and again the path where the found object is
    defined. Outside strict mode its own list of refused modules (`os`, `subprocess`, ...) applies.
    """
    prefixes = allowed_prefixes()
    set_parsing_settings(
        # With a list, even an empty one, jsonargparse enforces its own list.
        import_path_denylist=[] if prefixes is None else ["*"],
        import_path_allowlist=[] if prefixes is None else list(prefixes),
        instantiate_subclass_spec_in_any=False,
    )
