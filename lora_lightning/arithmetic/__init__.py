"""Adding low-rank adapters and cutting them, in product space: on factors alone, without the base's weights."""
