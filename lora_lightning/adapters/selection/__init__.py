"""Which adapters act: the blocks that choose, and how threads, tasks, compiled code and checkpointing follow them."""
