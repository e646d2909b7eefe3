"""From records to divided rows: checked, without copies, in one file a split."""
