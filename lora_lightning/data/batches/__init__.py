"""From encoded rows to batches: order, padding, packing, streaming."""
