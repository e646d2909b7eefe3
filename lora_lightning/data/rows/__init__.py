"""From records to rows in splits: checked, deduplicated, one file per split."""
