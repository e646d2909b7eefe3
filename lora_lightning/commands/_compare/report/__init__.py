"""What a comparison writes: tables, CSV, charts, a page, and the words beside the figures."""
