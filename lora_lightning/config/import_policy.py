"""What jsonargparse may import because a value names it."""

from __future__ import annotations

from jsonargparse import set_parsing_settings

from lora_lightning.trust import allowed_prefixes


def set_import_policy() -> None:
    """Tell jsonargparse what values may name: in strict mode the allowed list alone.

    It asks before it imports, for class paths, callables and modules alike, and again for the place where the found
    object is defined. Outside strict mode its own list of refused modules (`os`, `subprocess`, ...) holds.
    """
    prefixes = allowed_prefixes()
    set_parsing_settings(
        # Giving a list, be it empty, makes jsonargparse enforce the one that it comes with.
        import_path_denylist=[] if prefixes is None else ["*"],
        import_path_allowlist=[] if prefixes is None else list(prefixes),
        instantiate_subclass_spec_in_any=False,
    )
